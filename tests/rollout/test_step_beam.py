"""Beam search over steps: it equals a slow loop, and finds what single steps don't."""

import pytest
from transformers import AutoTokenizer

from coati.errors import UserError
from coati.models import Actor
from coati.rewards.function import FunctionReward
from coati.rollout import GenerationConfig, step_beam, step_beam_search
from coati.rollout.generator import Completion

CONFIG = GenerationConfig(max_new_tokens=60)
# Steps that may follow each other: "good start" looks best, and leads nowhere.
NEXT = {"": ["fine\n", "good\n"], "good\n": ["bad"], "fine\n": ["better\n"], "fine\nbetter\n": ["best"]}
WORTH = {"good": 0.6, "fine": 0.5, "bad": 0.1, "better": 0.7, "best": 0.9}


def worth(prompts, responses, **columns):
    """Of the last step."""
    return [WORTH[response.split("\n")[-1]] for response in responses]


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return AutoTokenizer.from_pretrained(tiny_world["tokenizer"])


@pytest.fixture(scope="module")
def actor(tiny_world):
    return Actor(tiny_world["policy"]).eval()


class Scripted:
    """Goes on with one of the steps of `NEXT`, by turns."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @classmethod
    def of_actor(cls, actor, tokenizer, batch_size):
        return cls(tokenizer)

    def generate(self, requests, sampling):
        assert sampling.stop == ["\n"]
        completions = []
        for request in requests:
            begun = self.tokenizer.decode(request.prompt).partition(": ")[2]
            step = NEXT[begun][request.seed[-1] % len(NEXT[begun])]
            reason = "stop" if step.endswith("\n") else "eos"
            completions.append(Completion(self.tokenizer(step, add_special_tokens=False)["input_ids"], None, reason))
        return completions


def search(actor, tokenizer, **options):
    reward = FunctionReward(worth, "worth")
    return step_beam_search(actor, reward, ["Q: ", "P: "], tokenizer=tokenizer, config=CONFIG, **options)


def test_one_beam_takes_the_best_step_and_two_find_the_best_end(actor, tokenizer, monkeypatch):
    monkeypatch.setattr(step_beam, "PolicyGenerator", Scripted)
    for found in search(actor, tokenizer, beams=1, expansions=2):
        assert (found.response, found.scores) == ("good\nbad", [0.1])
    for found in search(actor, tokenizer, beams=2, expansions=2):
        assert (found.response, found.scores[0], found.best) == ("fine\nbetter\nbest", 0.9, 0)


def slow_search(actor, tokenizer, prompt: str, row: int, beams: int, expansions: int, reward) -> list[tuple]:
    """(score, text) of what is kept, one request at a time."""
    from dataclasses import replace

    from coati.rollout import PolicyGenerator, Request

    generator = PolicyGenerator.of_actor(actor, tokenizer)
    ids, kept, step = tokenizer(prompt, add_special_tokens=False)["input_ids"], [([], True, None)], 0
    while any(is_open for _, is_open, _ in kept):
        candidates = [one for one in kept if not one[1]]
        count = expansions if step else beams * expansions
        for place, (begun, is_open, _) in enumerate(kept):
            for i in range(count if is_open else 0):
                limit = CONFIG.max_new_tokens - len(begun)
                request = Request(ids + begun, [3, row, step, place * count + i], limit)
                [done] = generator.generate([request], replace(CONFIG, stop=["e"]))
                whole = begun + done.ids
                goes_on = done.finish_reason == "stop" and len(whole) < CONFIG.max_new_tokens
                text = tokenizer.decode([t for t in whole if t not in (1, 2)]).strip()
                candidates.append((whole, goes_on, reward([prompt], [text])[0]))
        distinct = [one for k, one in enumerate(candidates) if one[0] not in [other[0] for other in candidates[:k]]]
        kept, step = sorted(distinct, key=lambda one: -one[2])[:beams], step + 1
    return [(score, whole) for whole, _, score in kept]


@pytest.mark.parametrize(("beams", "expansions"), [(1, 3), (3, 2), (4, 1)])
def test_it_equals_a_slow_loop(beams, expansions, actor, tokenizer):
    """With a real model, whose steps end with the letter e."""

    def few_a(prompts, responses, **columns):
        return [len(r) / 50 - r.count("a") for r in responses]

    options = dict(beams=beams, expansions=expansions, separator="e", tokenizer=tokenizer, config=CONFIG, seed=3)
    prompts = ["User: red", "User: blue lamp"]
    found = step_beam_search(actor, FunctionReward(few_a, "few_a"), prompts, **options, batch_size=5)
    for row, one in enumerate(found):
        expected = slow_search(actor, tokenizer, prompts[row], row, beams, expansions, few_a)
        assert one.scores == pytest.approx([score for score, _ in expected])
        assert one.response == tokenizer.decode([t for t in expected[0][1] if t not in (1, 2)]).strip()
        assert 1 <= len(one.scores) <= beams


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(beams=0), "0 beams"),
        (dict(config=GenerationConfig(temperature=0)), "temperature above 0"),
        (dict(config=GenerationConfig(stop=["x"])), r"leave out stop \['x'\]"),
        (dict(prompts=[""]), "prompt 0 is empty"),
    ],
)
def test_what_cannot_be_searched_is_one_error(changes, says, actor, tokenizer):
    arguments = dict(prompts=["a"], tokenizer=tokenizer) | changes
    with pytest.raises(UserError, match=says):
        step_beam_search(actor, FunctionReward(worth, "worth"), **arguments)
