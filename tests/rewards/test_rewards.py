"""Rewards: functions are found, wrong scores are named, weights are applied, models are asked with the sampled ids."""

import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from coati.errors import UserError
from coati.rewards import (
    AdapterReward,
    FunctionReward,
    ModelReward,
    Reward,
    RunningMoments,
    Scorer,
    ScoringConfig,
    load_function,
    load_rewards,
)
from coati.rewards.base import Outcome
from coati.samples import Sample
from tests.conftest import functions, reward_model
from tests.models.families import PAD, padded, rows, tiny_config
from tests.rewards.samples import Constant, of_reward, rewards_of, samples, scored, totals

RESPONSES = ["good", "a longer answer", ""]
PROMPTS = [""] * 3
SAMPLES = samples(PROMPTS, RESPONSES)


@pytest.fixture
def write_module(tmp_path):
    def write(text, name="scores.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_function_of_a_file_gets_prompts_responses_and_columns(write_module):
    path = write_module(
        "def exact(prompts, responses, *, answer, **columns):\n"
        "    return [float(p + r == a) for p, r, a in zip(prompts, responses, answer)]\n"
    )
    reward = load_function(f"{path}:exact")
    assert reward.name == "exact"
    assert reward.score(samples(["1+", "2+"], ["1", "3"], answer=["1+1", "2+2"])) == [1.0, 0.0]


def test_a_function_of_a_module(write_module, monkeypatch):
    path = write_module(
        "def length(prompts, responses, **columns):\n    return [len(r) for r in responses]\n", "lens.py"
    )
    monkeypatch.syspath_prepend(path.rpartition("/")[0])
    assert load_function("lens:length").score(SAMPLES) == [4, 15, 0]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("no_colon.py", "FILE.py:function or module:function"),
        (":f", "FILE.py:function or module:function"),
        ("f.py:", "FILE.py:function or module:function"),
        ("/nowhere/f.py:f", "/nowhere/f.py does not exist"),
        ("no_such_module_at_all:f", "No module named"),
        ("math:no_such_function", "math has no 'no_such_function'"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(place, says):
    with pytest.raises(UserError) as error:
        load_function(place)
    assert repr(place) in str(error.value)
    assert says in str(error.value)


def test_a_file_without_the_function_is_named(write_module):
    path = write_module("x = 1\n")
    with pytest.raises(UserError, match="has no 'length'"):
        load_function(f"{path}:length")


def test_the_mistake_inside_a_reward_file_is_not_reported_as_a_missing_function(write_module):
    """A file that raises AttributeError while it is imported has a mistake of its own, which the user must see."""
    path = write_module("import math\nscale = math.no_such_name\ndef length(prompts, responses, **c):\n    return []\n")
    with pytest.raises((UserError, AttributeError)) as error:
        load_function(f"{path}:length")
    assert "no_such_name" in str(error.value)


def test_a_reward_file_may_define_a_dataclass(write_module):
    """`dataclass` looks its module up in sys.modules when annotations are strings."""
    path = write_module(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Rule:\n"
        "    weight: float = 2.0\n\ndef rule(prompts, responses, **c):\n    return [Rule().weight] * len(responses)\n"
    )
    assert load_function(f"{path}:rule").score(SAMPLES) == [2.0] * 3


def test_a_callable_without_a_name_is_a_reward_too(write_module):
    path = write_module(
        "import functools\ndef scaled(prompts, responses, scale, **columns):\n    return [scale] * len(responses)\n"
        "half = functools.partial(scaled, scale=0.5)\n"
    )
    assert load_function(f"{path}:half").score(SAMPLES) == [0.5] * 3


def test_the_weighted_sum_and_its_parts():
    short = FunctionReward(lambda prompts, responses, **c: [-len(r) for r in responses], "short")
    polite = FunctionReward(lambda prompts, responses, **c: torch.tensor([1.0, 0.0, 2.0]), "polite")
    found = scored(Scorer([(short, 0.5), (polite, 2.0)]), PROMPTS, RESPONSES)
    assert [sample.score for sample in found] == [sample.total_reward for sample in found] == [0.0, -7.5, 4.0]
    assert of_reward("short", found) == [-4, -15, 0] and of_reward("polite", found) == [1, 0, 2]
    assert all(sample.token_rewards is None and not sample.failed for sample in found)


def test_scoring_again_starts_anew():
    rewards = Scorer([(Constant(1.0), 2.0), (TokenIds(), 1.0)])
    once, twice = tokens(), tokens()
    rewards.score(once)
    for _ in range(2):
        rewards.score(twice)
    assert once == twice


def test_each_reward_is_timed():
    def slow(prompts, responses, **columns):
        time.sleep(0.05)
        return [0.0] * len(responses)

    seconds = Scorer([(FunctionReward(slow), 1.0), (Constant(0.0, "quick"), 1.0)]).score(samples(PROMPTS, RESPONSES))
    assert seconds["slow"] >= 0.05 > seconds["quick"] >= 0


class Elsewhere(Constant):
    """Works outside this process."""

    def __init__(self, value: float):
        super().__init__(value, "elsewhere")
        self.per_response, self.pending = True, []

    def begin(self, sample):
        self.pending.append(Pending())
        return self.pending[-1]


class Pending(Future):
    def result(self, timeout=None):
        assert self.done(), "waited for before this process has done its own part"
        return super().result(timeout)


class Here(Constant):
    """Takes long enough for the other to be done."""

    def __init__(self, value: float, other: Elsewhere):
        super().__init__(value, "here")
        self.other = other

    def score(self, samples):
        for future in self.other.pending:
            future.set_result(Outcome(self.other.value))
        return super().score(samples)


def test_rewards_that_work_elsewhere_are_waited_for_last():
    """Though they stand first, so that this process computes its own meanwhile."""
    elsewhere = Elsewhere(2.0)
    found = samples(["p"] * 2, ["r"] * 2)
    seconds = Scorer([(elsewhere, 1.0), (Here(3.0, elsewhere), 0.5)]).score(found)
    assert [sample.score for sample in found] == [3.5, 3.5] and set(seconds) == {"elsewhere", "here"}
    assert list(found[0].rewards) == ["elsewhere", "here"], "in their own order"


def test_two_functions_of_one_name_keep_their_parts_apart(tmp_path):
    """Each in its own file, each called `reward`, as users call them."""
    places = []
    for i in (1, 2):
        (tmp_path / f"r{i}.py").write_text(
            f"def reward(prompts, responses, **c):\n    return [{i}.0] * len(responses)\n"
        )
        places.append(f"{tmp_path}/r{i}.py:reward")
    listed = rewards_of(*functions(*places, weights=[1.0, 10.0]))
    found = scored(load_rewards(listed, ScoringConfig()), PROMPTS, RESPONSES)
    assert [sample.score for sample in found] == [21.0] * 3
    assert [sample.rewards for sample in found] == [{"reward": 1.0, "reward_2": 2.0}] * 3


def test_a_reward_that_skips_a_response_leaves_the_others_alone(caplog):
    """REPORT 30: None is no 0 of its own; with tokens too."""
    some = FunctionReward(lambda prompts, responses, **c: [None, 3.0, None], "some")
    other = FunctionReward(lambda prompts, responses, **c: (1.0, None, None), "other")
    found = scored(Scorer([(some, 0.5), (other, 2.0)]), PROMPTS, RESPONSES)
    assert [sample.score for sample in found] == [2.0, 1.5, 0.0]
    assert of_reward("some", found) == [None, 3.0, None] and of_reward("other", found) == [1.0, None, None]
    [line] = [record.getMessage() for record in caplog.records]
    assert "1 of 3 responses are scored by no reward and get 0, such as ''" in line


def test_a_reward_of_tokens_may_skip_a_sample(monkeypatch):
    """REPORT 30."""
    reward, made = TokenIds(), tokens()
    monkeypatch.setattr(reward, "score", lambda samples: [[0.0, 1.0, 2.0], None, [0.0] * 4])
    Scorer([(reward, 2.0), (Constant(1.0), 1.0)]).score(made)
    assert of_reward("ids", made) == [3.0, None, 0.0]
    assert [sample.total_reward for sample in made] == [7.0, 1.0, 1.0] and made[1].token_rewards is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_of_one_response_may_skip_it(write_module, workers):
    """REPORT 30: it has not failed."""
    path = write_module(
        "def some(prompts, responses, **columns):\n    return [len(responses[0]) or None]\nsome.per_response = True\n"
    )
    scorer = Scorer([(load_function(f"{path}:some"), 1.0), (Constant(1.0), 1.0)], workers=workers)
    found = scored(scorer, PROMPTS, RESPONSES)
    assert [sample.score for sample in found] == [5.0, 16.0, 1.0]
    assert [(sample.rewards["some"], sample.failed["some"]) for sample in found][2] == (None, False)
    if scorer.pool:
        scorer.pool.close()


def completions_only(completions, **kwargs):
    return [0.0] * len(completions)


def completions_first(completions, prompts, **kwargs):
    return [0.0] * len(completions)


def completions_and_answer(completions, answer):
    return [0.0] * len(completions)


def by_name(*, prompts, completions, **kwargs):
    return [0.0] * len(completions)


def nothing():
    return []


async def later(prompts, responses, **kwargs):
    return [0.0] * len(responses)


@pytest.mark.parametrize(
    "function", [completions_only, completions_first, completions_and_answer, by_name, nothing, later]
)
def test_a_function_with_another_signature_is_refused_at_the_start(function):
    """REPORT 30: in one line that has both signatures."""
    name = function.__name__
    with pytest.raises(UserError) as error:
        FunctionReward(function)
    line = str(error.value)
    assert f"reward function {name}(" in line and f"is called as {name}(prompts, responses, **columns)" in line
    assert "\n" not in line


def no_columns(prompts, completions):
    return [1.0] * len(completions)


def named(prompts, completions, answer, note="none", truncated=None):
    assert truncated is not None
    return [float(a is None and n is None) for a, n in zip(answer, note, strict=True)]


def only_by_name(prompts, responses, *, answer, **others):
    assert others.keys() == {"note", "truncated", "input_ids", "response_mask"}
    return [float(a is None) for a in answer]


def anything(*texts, **columns):
    return [float(len(texts) == 2)] * len(texts[1])


class Callable:
    def __call__(self, prompts, completions, **kwargs):
        return [1.0] * len(completions)


@pytest.mark.parametrize("function", [no_columns, named, only_by_name, anything, Callable()])
def test_a_function_gets_the_columns_that_it_takes(function):
    """REPORT 30: all of them, those that it names, or none; None where rows lack one."""
    reward = FunctionReward(function)
    reward.check([{"answer": "a"}, {"note": "b"}])
    assert reward.score(samples(["", ""], ["x", "y"], note=[None, None])) == [1.0, 1.0]


def test_what_every_function_is_given_is_no_field_of_the_data():
    """REPORT 30: a field `truncated` would be hidden by the column of that name."""
    from coati.data.records import RESERVED
    from coati.rewards.function import GIVEN

    assert {*GIVEN, "prompts", "responses"} <= {*RESERVED}


@pytest.mark.parametrize(("function", "lacking"), [(named, "answer"), (only_by_name, "answer")])
def test_a_column_that_no_row_has_is_named_before_anything_is_generated(function, lacking):
    """REPORT 30: with the columns that are there."""
    with pytest.raises(UserError) as error:
        Scorer([(Constant(1.0), 1.0), (FunctionReward(function), 1.0)]).check([{"gold": 1}, {"note": 2}])
    line = str(error.value)
    assert f"asks for {lacking}, but the columns are gold, input_ids, note, response_mask, truncated" in line


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_named_with_its_response(bad):
    """PITFALL 7: NaN is refused where it arises, before it meets a loss."""
    reward = FunctionReward(lambda prompts, responses, **c: [1.0, bad, bad], "shaky")
    with pytest.raises(UserError, match=r"'shaky' gave -?(nan|inf) for the response 'a longer answer'.*finite"):
        scored(Scorer([(reward, 1.0)]), PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    "scores", [[1.0], [1.0] * 4, [[1.0], [2.0], [3.0]], 1.0, torch.ones(3, 1), torch.ones(2), np.ones((3, 2))], ids=repr
)
def test_the_wrong_number_of_scores_is_named(scores):
    reward = FunctionReward(lambda prompts, responses, **c: scores, "odd")
    with pytest.raises(UserError, match=r"'odd' gave .*one number per response"):
        scored(Scorer([(reward, 1.0)]), PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    "scores", [None, ["1", "2", "3"], [[None], [1.0], [2.0]], "123", {1: 1.0, 2: 1.0, 3: 1.0}], ids=repr
)
def test_scores_that_are_no_numbers_at_all_are_named(scores):
    reward = FunctionReward(lambda prompts, responses, **c: scores, "odd")
    with pytest.raises(UserError, match="'odd'"):
        scored(Scorer([(reward, 1.0)]), PROMPTS, RESPONSES)


class TokenIds(Reward):
    """A reward of tokens: a tenth of the id, and NaN outside the response."""

    name, on_tokens = "ids", True

    def score(self, samples):
        return [
            [token / 10 if sampled else float("nan") for token, sampled in zip(s.tokens, s.response_mask, strict=True)]
            for s in samples
        ]


IDS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
MASKS = [[False, True, True], [False, True], [False, False, True, True]]


def tokens() -> list[Sample]:
    """Samples with tokens of their own."""
    made = samples(PROMPTS, RESPONSES)
    for sample, ids, mask in zip(made, IDS, MASKS, strict=True):
        sample.tokens, sample.response_mask = ids, mask
    return made


def test_rewards_of_tokens_stay_on_their_tokens():
    made = tokens()
    Scorer([(TokenIds(), 2.0), (Constant(1.0), 0.5), (TokenIds(), 1.0)]).score(made)
    expected = [[0.0, 0.6, 0.9], [0.0, 1.5], [0.0, 0.0, 2.4, 2.7]]
    for sample, rewards in zip(made, expected, strict=True):
        assert sample.token_rewards == pytest.approx(rewards)
        assert sample.total_reward == pytest.approx(0.5 + sum(rewards))
    assert [sample.score for sample in made] == [0.5] * 3
    assert of_reward("ids", made) == pytest.approx([0.5, 0.5, 1.7])
    assert of_reward("ids_2", made) == of_reward("ids", made)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(3), "'ids' gave 0.0.*one number per token"),
        (torch.zeros(3, 3), "'ids' gave 3 numbers for 2 tokens.*one number per token"),
        ([[0.0] * 3, [0.0] * 2], "'ids' gave rewards for 2 of 3 responses"),
        ("no numbers", "'ids' gave no numbers"),
        ([[0.0, "1", 0.0], [0.0] * 2, [0.0] * 4], "'ids' gave the text '1'.*one number per token"),
        ([[0.0, float("inf"), 0.0], [0.0] * 2, [0.0] * 4], "'ids' gave inf for the response 'good'"),
        ([[0.0, None, 0.0], [0.0] * 2, [0.0] * 4], "'ids' gave None.*one number per token"),
    ],
)
def test_wrong_rewards_of_tokens_are_named(given, says, monkeypatch):
    reward = TokenIds()
    monkeypatch.setattr(reward, "score", lambda samples: given)
    with pytest.raises(UserError, match=says):
        Scorer([(reward, 1.0)]).score(tokens())


def test_rewards_of_a_run():
    model = Constant(1.0, "model")
    listed = rewards_of(reward_model("folder", weight=3.0))
    scorer = load_rewards(listed, ScoringConfig(), lambda path, settings: model, given=[model])
    assert totals(scorer, RESPONSES) == [4.0] * 3
    with pytest.raises(UserError, match=r"no reward.*--rewards math"):
        load_rewards([], ScoringConfig())


def test_two_rewards_of_a_type_have_settings_and_names_of_their_own():
    boxes = [dict(type="regex", pattern="a"), dict(type="regex", pattern="b", name="bees", weight=0.5)]
    scorer = load_rewards(rewards_of(*boxes, dict(type="regex", pattern="c")), ScoringConfig(reward_workers=0))
    [sample] = scored(scorer, ["?"], ["ab"])
    assert sample.rewards == {"regex": 1.0, "bees": 1.0, "regex_2": 0.0} and sample.score == 1.5


def test_a_file_may_hold_a_whole_reward(write_module):
    path = write_module(
        "from coati.rewards import Reward\nclass First(Reward):\n    name = 'first'\n"
        "    def score(self, samples):\n        return [7.0] * len(samples)\nreward = First()\n"
    )
    assert load_function(f"{path}:reward").name == "first"
    rewards = load_rewards(rewards_of(*functions(f"{path}:reward")), ScoringConfig())
    assert of_reward("first", scored(rewards, PROMPTS, RESPONSES)) == [7.0] * 3


@pytest.mark.parametrize("trailing", [(), (1,)])
def test_a_reward_adapter_is_read_at_the_last_sampled_token(trailing):
    class Adapted(torch.nn.Linear):
        def compute_reward_score(self, input_ids, attention_mask=None, **kwargs):
            assert len(input_ids) <= 2
            return (input_ids * 10 + attention_mask.cumsum(1)).reshape(*input_ids.shape, *trailing).bfloat16()

    scores = AdapterReward(Adapted(1, 1), micro_batch_size=2).score(tokens())
    expected = torch.tensor([ids[-1] * 10 + len(ids) for ids in IDS]).bfloat16().float()
    assert scores.dtype == torch.float32 and scores.equal(expected)


def test_a_reward_model_reads_the_sampled_ids_in_micro_batches():
    """PITFALL 19: scores are of the ids, whatever the texts say. PITFALL 5: at the last real token."""
    from coati.models import RewardModel

    torch.manual_seed(0)
    model = RewardModel(config=tiny_config("llama")).eval()
    made = tokens()
    for sample, ids in zip(made, rows(), strict=True):
        sample.tokens = ids.tolist()
    read = []
    forward = lambda inputs: read.extend(len(one["input_ids"]) for one in inputs) or [model(**one) for one in inputs]  # noqa: E731
    reward = ModelReward(forward, PAD, torch.device("cpu"), lambda lengths: [[2, 0], [1]])
    scores = reward.score(made)
    assert read == [2, 1] and not scores.requires_grad
    ids, mask = padded(rows(), "right")
    torch.testing.assert_close(scores, model(ids, mask).detach())


def test_running_moments_restore_from_their_fields():
    """PITFALL 25: the state that a checkpoint keeps is the whole state."""
    from dataclasses import asdict

    running = RunningMoments()
    running.update(torch.tensor([3.0, 6.0, 14.0]))
    assert (running.mean, running.std**2) == (2.0, pytest.approx(2 / 3))
    again = RunningMoments(**asdict(running))
    for moments in (running, again):
        moments.update(torch.tensor([1.0, 10.0, 100.0]))
    assert again == running
