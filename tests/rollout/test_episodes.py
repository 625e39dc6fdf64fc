"""Episodes with environments: tokens, masks and rewards of every turn; limits, failures, and environments that hang."""

import asyncio
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from coati.config.environment import EnvironmentConfig
from coati.config.generation import GenerationConfig
from coati.environments.guess_the_number import GuessTheNumber
from coati.errors import UserError
from coati.rewards import EnvironmentReward, Scorer
from coati.rollout import (
    Completion,
    ConversationRenderer,
    EpisodeSampler,
    Observation,
    Prompt,
    ScoredGeneration,
    environment,
    load_environment,
)
from coati.rollout.environment import EnvironmentCalls, EpisodeFailed
from coati.rollout.generator import in_rounds, notify_done
from coati.rollout.source import mean_environment_metrics
from tests.conftest import ROOT


class Alone:
    """The only rank."""

    def gather(self, value):
        return [value]


class Says:
    """A generator that says a given text in each turn, one token per character and EOS, whatever it is asked.

    Attributes:
        started: how often it was asked to generate; calls: the requests of each turn.
    """

    def __init__(self, tokenizer, *texts: str, ends: bool = True):
        self.tokenizer, self.texts, self.ends, self.calls, self.started = tokenizer, texts, ends, [], 0

    def generate(self, requests, sampling, on_done=None, follow_ups=None):
        self.started += 1
        return in_rounds(self.say, requests, on_done, follow_ups)

    def say(self, requests, on_done):
        text = self.texts[min(len(self.calls), len(self.texts) - 1)]
        self.calls.append(requests)
        found = []
        for request in requests:
            ids = [id for character in text for id in self.tokenizer(character, add_special_tokens=False)["input_ids"]]
            ids = [*ids, self.tokenizer.eos_token_id][: request.max_new_tokens]
            reason = "eos" if ids[-1] == self.tokenizer.eos_token_id else "length"
            found.append(Completion(ids, [-0.5 - place for place in range(len(ids))], reason))
        return notify_done(found, on_done)


def play(
    tokenizer,
    environment,
    *texts,
    rows=({"secret": 5},),
    turn_rewards=False,
    renderer=None,
    call_format=None,
    **limits,
):
    """The samples, and the generator."""
    ends, generator = [tokenizer.eos_token_id], Says(tokenizer, *texts)
    sampler = EpisodeSampler(
        generator,
        tokenizer,
        ends,
        environment,
        renderer or ConversationRenderer(tokenizer, ends),
        EnvironmentConfig(**limits),
        call_format,
    )
    prompts = [Prompt(i, [0, i], [], "", row) for i, row in enumerate(rows)]
    longest = 32 if call_format is None else 1024
    generation = ScoredGeneration(sampler, Scorer([(EnvironmentReward(turn_rewards), 1.0)]))
    return generation.sample(prompts, GenerationConfig(max_new_tokens=longest)).samples, generator


def parts(tokenizer, sample, sampled: bool) -> str:
    """The text of the tokens that were, or were not, sampled, with a bar between parts."""
    text, before = "", sampled
    for token, mask in zip(sample.tokens, sample.response_mask, strict=True):
        if mask == sampled:
            text += ("" if before == sampled else "|") + tokenizer.decode([token])
        before = mask
    return text


def test_an_episode_is_trained_on_the_tokens_that_were_sampled_and_no_others(tokenizer):
    [sample], generator = play(tokenizer, GuessTheNumber, "3", "What?", "5")
    assert parts(tokenizer, sample, True) == "|3<|im_end|>|What?<|im_end|>|5<|im_end|>"
    asked = ["Guess a number from 1 to 16.", "Higher.", "Say one number from 1 to 16."]
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in asked]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert parts(tokenizer, sample, False) == "|\n".join([system + turns[0], *turns[1:]])
    assert sample.finish_reason == "done" and not sample.truncated and sample.score == 1.0
    assert [turn.reward for turn in sample.turns] == [0, 0, 1]
    for turn in sample.turns:
        assert sample.response_mask[turn.start : turn.end] == [True] * (turn.end - turn.start)
        assert sample.log_probs[turn.start : turn.end] == [-0.5 - place for place in range(turn.end - turn.start)]
    assert sum(sample.response_mask) == sum(turn.end - turn.start for turn in sample.turns)
    assert all(p == 0 for p, mask in zip(sample.log_probs, sample.response_mask, strict=True) if not mask)
    # each turn goes on from the ids so far, with noise of its own
    for turn, [request] in zip(sample.turns, generator.calls, strict=True):
        assert request.prompt == sample.tokens[: turn.start]
    assert [list(request.seed) for [request] in generator.calls] == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert sample.prompt == system + turns[0] and sample.response == "5"


def test_other_tokens_of_the_same_text_stay_as_they_were_sampled(tokenizer):
    """Rendering the conversation again would merge them."""
    [sample], _ = play(tokenizer, Echo, "capital", max_turns=2)
    merged = tokenizer("capital", add_special_tokens=False)["input_ids"]
    sampled = [t for t, mask in zip(sample.tokens, sample.response_mask, strict=True) if mask]
    assert len(merged) < len("capital") and len(sampled) == 2 * (len("capital") + 1)


class Echo:
    """Answers forever; class attributes say how it misbehaves."""

    closed = 0

    def reset(self, row):
        self.row = row
        if row.get("fails"):
            raise RuntimeError("no such game")
        return [{"role": "user", "content": "hello"}]

    def step(self, message):
        how = self.row.get("step")
        if how == "raises":
            raise RuntimeError("it broke")
        if how == "exits":
            raise SystemExit(3)
        if how == "hangs":
            threading.Event().wait()
        if how == "returns text":
            return "ok"
        if how == "is not a number":
            return Observation([{"role": "user", "content": "x"}], reward=float("nan"))
        if how == "says nothing":
            return Observation()
        if how == "speaks for the policy":
            return Observation([{"role": "assistant", "content": "x"}])
        return Observation([{"role": "user", "content": message["content"]}], reward=0.25)

    def close(self):
        type(self).closed += 1
        if self.row.get("close fails"):
            raise RuntimeError("never mind")


MISBEHAVIORS = ("raises", "exits", "hangs", "returns text", "is not a number", "says nothing", "speaks for the policy")


def test_environments_that_fail_are_contained_counted_and_closed(tokenizer):
    rows = [{"step": how} for how in MISBEHAVIORS] + [{"fails": True}, {}, {"close fails": True}]
    Echo.closed = 0
    samples, _ = play(tokenizer, Echo, "a", rows=rows, max_turns=3, timeout=0.2)
    assert [sample.finish_reason for sample in samples] == ["failed"] * 8 + ["turns"] * 2
    assert [len(sample.turns) for sample in samples] == [1] * 7 + [0] + [3] * 2
    assert [sample.score for sample in samples] == [0.0] * 8 + [0.75] * 2
    assert all(sample.truncated for sample in samples) and Echo.closed == len(rows)
    metrics = mean_environment_metrics(samples, Alone())
    assert metrics["environment/failed"] == 8 / 10 and metrics["environment/turns"] == 13 / 10


def test_environments_that_hang_together_take_one_timeout(monkeypatch):
    now, waited = [0.0], []

    def wait(futures, seconds):
        waited.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(environment, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(environment, "wait", wait)
    never, calls = threading.Event(), EnvironmentCalls(60.0)
    asked = [calls.begin(never.wait) for _ in range(8)]
    for call in asked:
        with pytest.raises(EpisodeFailed, match="no result within 60 s"):
            calls.result(call)
    never.set()
    assert waited == [60.0] + [0.0] * 7


class Blocks:
    """Some of its coroutines stop the loop that all share."""

    async def reset(self, row):
        self.row = row
        return "go"

    async def step(self, message):
        await asyncio.sleep(0)
        if self.row.get("blocks"):
            self.row["blocks"].wait()
        if self.row.get("hangs"):
            await asyncio.Event().wait()
        return Observation(reward=1.0, done=True)


def test_an_async_method_that_hangs_or_blocks_fails_its_episode_and_not_those_after_it(tokenizer):
    never, calls = threading.Event(), EnvironmentCalls(0.2)
    for row in ({"hangs": True}, {"blocks": never}):
        environment = Blocks()
        assert calls.result(calls.begin(environment.reset, row)) == "go"
        with pytest.raises(EpisodeFailed, match="no result within"):
            calls.result(calls.begin(environment.step, {}))
        after = Blocks()
        assert calls.result(calls.begin(after.reset, {})) == "go"
        assert calls.result(calls.begin(after.step, {})).done
    never.set()


HANGS = """
import threading
from coati.rollout.environment import EnvironmentCalls, EpisodeFailed

async def blocks():
    threading.Event().wait()

calls = EnvironmentCalls(0.1)
for method in (threading.Event().wait, blocks):
    try:
        calls.result(calls.begin(method))
    except EpisodeFailed as error:
        print(error)
"""


def test_a_process_ends_though_its_environments_hang():
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "no result within 0.1 s\n" * 2


def test_a_beginning_that_cannot_fit_is_not_tokenized(tokenizer):
    class Long:
        def reset(self, row):
            return "x" * 1_000_000

        def step(self, message): ...

    with pytest.raises(UserError, match="its first messages are too long"):
        play(tokenizer, Long, "a", max_tokens=100)


def test_environments_that_all_fail_end_the_run_with_the_reason(tokenizer):
    with pytest.raises(UserError, match=r"failed in all 2 episodes, the last with RuntimeError..no such game"):
        play(tokenizer, Echo, "a", rows=[{"fails": True}] * 2)


def test_an_episode_ends_where_its_tokens_or_turns_do(tokenizer):
    [sample], _ = play(tokenizer, Echo, "abc", max_turns=3)
    assert sample.finish_reason == "turns" and len(sample.turns) == 3 and len(sample.tokens) == sample.turns[-1].end
    full = len(sample.tokens)
    with pytest.raises(UserError, match=f"first messages have {sample.turns[0].start} tokens"):
        play(tokenizer, Echo, "abc", max_tokens=sample.turns[0].start)
    for limit in range(sample.turns[0].start + 1, full):
        [short], _ = play(tokenizer, Echo, "abc", max_turns=3, max_tokens=limit)
        assert len(short.tokens) <= limit and short.tokens == sample.tokens[: len(short.tokens)]
        assert short.finish_reason == "length"


def test_async_environments_run_side_by_side(tokenizer):
    together = threading.Semaphore(0)

    class Patient:
        async def reset(self, row):
            return [{"role": "user", "content": "wait"}]

        async def step(self, message):
            together.release()
            while not all_there():
                await asyncio.sleep(0.001)
            return Observation(reward=1.0, done=True)

    def all_there() -> bool:
        return together._value == 8

    samples, _ = play(tokenizer, Patient, "ok", rows=[{}] * 8)
    assert [sample.score for sample in samples] == [1.0] * 8


@pytest.mark.parametrize("secrets", [[5], [4, 5, 3], []])
def test_every_rank_generates_once_however_many_turns_it_has(tokenizer, secrets):
    """Gathering sharded weights needs all ranks."""
    samples, generator = play(tokenizer, GuessTheNumber, "5", "4", "3", rows=[{"secret": s} for s in secrets])
    assert generator.started == 1 and all(sample.finish_reason == "done" for sample in samples)


def test_rewards_of_turns_fall_on_their_last_tokens(tokenizer):
    [sample], _ = play(tokenizer, Echo, "abc", "d", max_turns=2, turn_rewards=True)
    assert sample.score == 0 and sample.total_reward == 0.5
    where = [place for place, reward in enumerate(sample.token_rewards) if reward]
    assert where == [turn.end - 1 for turn in sample.turns]


def test_what_is_no_environment_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Mine:\n    def step(self, message): return []\n\ndef make(): return Mine()\n")
    with pytest.raises(UserError, match="has no method reset"):
        load_environment(f"{path}:Mine")
    with pytest.raises(UserError, match="is no class"):
        load_environment(f"{path}:make")
    with pytest.raises(UserError, match="does not exist"):
        load_environment(f"{tmp_path / 'other.py'}:Mine")


NO_GUESSES = ("", "5 6", "17", "0", "-5", "five", "5.", "005", "٥", "1 2 3 4 5", "9" * 99)


@pytest.mark.parametrize(
    ("text", "told"), [("4", "Higher."), ("6", "Lower."), *((text, "Say one number") for text in NO_GUESSES)]
)
def test_guess_the_number_takes_one_number(text, told):
    game = GuessTheNumber()
    game.reset({"secret": 5})
    observation = game.step({"role": "assistant", "content": text})
    assert observation.messages[0]["content"].startswith(told) and not observation.done and observation.reward == 0
    assert game.step({"role": "assistant", "content": " 5\n"}).reward == 1


def games(guesses, secret: int, **row) -> list[Observation]:
    game = GuessTheNumber()
    game.reset({"secret": secret, "high": 32, **row})
    return [game.step({"role": "assistant", "content": str(guess)}) for guess in guesses]


@pytest.mark.parametrize("secret", range(1, 33))
def test_no_order_of_guesses_earns_more_than_finding_the_number(secret):
    """Counting up agrees with all answers too, but rules out little."""
    halving, least, most = [], 1, 32
    while (least + most) // 2 not in halving:
        guess = (least + most) // 2
        halving.append(guess)
        least, most = (guess + 1, most) if guess < secret else (least, guess - 1 if guess > secret else guess)
        if guess == secret:
            break
    for guesses in (halving, range(1, secret + 1), range(32, secret - 1, -1)):
        found = games(guesses, secret, narrowing=0.5)
        assert found[-1].done and sum(one.reward for one in found) == pytest.approx(1.5)
    counted = games(range(1, min(secret, 7)), secret, narrowing=0.5)
    assert sum(one.reward for one in counted) < 0.5 * 0.06
    assert sum(one.reward for one in games([secret - 1] * 9 if secret > 1 else [2] * 9, secret)) == 0
