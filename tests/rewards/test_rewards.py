"""Rewards: functions are found, wrong scores are named, weights are applied, models are asked with the sampled ids."""

import time

import pytest
import torch

from coati.errors import UserError
from coati.rewards import (
    AdapterReward,
    FunctionReward,
    ModelReward,
    RunningMoments,
    ScoringConfig,
    WeightedRewards,
    load_function,
    load_rewards,
)
from tests.models.families import padded, rows, tiny_config

RESPONSES = ["good", "a longer answer", ""]


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
    assert reward.score(["1+", "2+"], ["1", "3"], answer=["1+1", "2+2"], input_ids=None) == [1.0, 0.0]


def test_a_function_of_a_module(write_module, monkeypatch):
    path = write_module(
        "def length(prompts, responses, **columns):\n    return [len(r) for r in responses]\n", "lens.py"
    )
    monkeypatch.syspath_prepend(path.rpartition("/")[0])
    assert load_function("lens:length").score([], RESPONSES) == [4, 15, 0]


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
    assert load_function(f"{path}:rule").score([], RESPONSES) == [2.0] * 3


def test_a_callable_without_a_name_is_a_reward_too(write_module):
    path = write_module(
        "import functools\ndef scaled(prompts, responses, scale, **columns):\n    return [scale] * len(responses)\n"
        "half = functools.partial(scaled, scale=0.5)\n"
    )
    assert load_function(f"{path}:half").score([], RESPONSES) == [0.5] * 3


def test_the_weighted_sum_and_its_parts():
    short = FunctionReward(lambda prompts, responses, **c: [-len(r) for r in responses], "short")
    polite = FunctionReward(lambda prompts, responses, **c: torch.tensor([1.0, 0.0, 2.0]), "polite")
    scores = WeightedRewards([(short, 0.5), (polite, 2.0)]).score([], RESPONSES)
    assert scores.total.dtype == torch.float32
    assert scores.total.tolist() == [0.0, -7.5, 4.0]
    assert {name: x.tolist() for name, x in scores.parts.items()} == {"short": [-4, -15, 0], "polite": [1, 0, 2]}
    assert scores.per_token is None


def test_each_reward_is_timed():
    def slow(prompts, responses, **columns):
        time.sleep(0.05)
        return [0.0] * len(responses)

    quick = FunctionReward(lambda prompts, responses, **c: [0.0] * len(responses), "quick")
    seconds = WeightedRewards([(FunctionReward(slow), 1.0), (quick, 1.0)]).score([], RESPONSES).seconds
    assert seconds["slow"] >= 0.05 > seconds["quick"] >= 0


def test_two_functions_of_one_name_keep_their_parts_apart(tmp_path):
    """Each in its own file, each called `reward`, as users call them."""
    places = []
    for i in (1, 2):
        (tmp_path / f"r{i}.py").write_text(
            f"def reward(prompts, responses, **c):\n    return [{i}.0] * len(responses)\n"
        )
        places.append(f"{tmp_path}/r{i}.py:reward")
    config = ScoringConfig(reward_functions=places, reward_function_weights=[1.0, 10.0])
    scores = load_rewards(config).score([], RESPONSES)
    assert scores.total.tolist() == [21.0] * 3
    assert sorted(x[0].item() for x in scores.parts.values()) == [1.0, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_named_with_its_response(bad):
    """PITFALL 7: NaN is refused where it arises, before it meets a loss."""
    reward = FunctionReward(lambda prompts, responses, **c: [1.0, bad, bad], "shaky")
    with pytest.raises(UserError, match=r"'shaky' gave -?(nan|inf) for the response 'a longer answer'.*finite"):
        WeightedRewards([(reward, 1.0)]).score([], RESPONSES)


@pytest.mark.parametrize("scores", [[1.0], [1.0] * 4, [[1.0], [2.0], [3.0]], 1.0])
def test_the_wrong_number_of_scores_is_named(scores):
    reward = FunctionReward(lambda prompts, responses, **c: scores, "odd")
    with pytest.raises(UserError, match=r"'odd' gave shape \[.*\] for 3 responses.*one number a response"):
        WeightedRewards([(reward, 1.0)]).score([], RESPONSES)


@pytest.mark.parametrize("scores", [None, [None, 1.0, 2.0], ["1", "2", "3"]])
def test_scores_that_are_no_numbers_at_all_are_named(scores):
    reward = FunctionReward(lambda prompts, responses, **c: scores, "odd")
    with pytest.raises(UserError, match="'odd'"):
        WeightedRewards([(reward, 1.0)]).score([], RESPONSES)


class TokenIds:
    """A reward of tokens: a tenth of the id, and NaN outside the response."""

    name = "ids"

    def score(self, prompts, responses, **columns):
        raise AssertionError("the reward of tokens is asked")

    def score_tokens(self, prompts, responses, *, input_ids, response_mask, **columns):
        return torch.where(response_mask, input_ids / 10, float("nan"))


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]])
MASK = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
COLUMNS = dict(input_ids=IDS, response_mask=MASK)


def test_rewards_of_tokens_stay_on_their_tokens():
    ones = FunctionReward(lambda prompts, responses, **c: [1.0] * len(responses), "ones")
    scores = WeightedRewards([(TokenIds(), 2.0), (ones, 0.5), (TokenIds(), 1.0)]).score([], RESPONSES, **COLUMNS)
    expected = torch.where(MASK, IDS, 0) * 0.3
    torch.testing.assert_close(scores.per_token, expected)
    assert scores.sequence.tolist() == [0.5] * 3
    torch.testing.assert_close(scores.total, 0.5 + expected.sum(1))
    torch.testing.assert_close(scores.parts["ids"], torch.tensor([0.5, 0.5, 1.7]))
    assert scores.parts["ids_2"].equal(scores.parts["ids"])


def test_a_reward_of_tokens_without_the_sampled_ids_is_asked_for_whole_responses():
    reward = TokenIds()
    reward.score = lambda prompts, responses, **c: [3.0] * len(responses)
    scores = WeightedRewards([(reward, 1.0)]).score([], RESPONSES)
    assert scores.sequence.tolist() == [3.0] * 3 and scores.per_token is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.zeros(3), r"'ids' gave shape \[3\] for 3 responses.*a token of input_ids, \[3, 4\]"),
        (torch.zeros(3, 3), r"'ids' gave shape \[3, 3\]"),
        ("no numbers", "'ids' gave no numbers"),
        (torch.where(MASK, torch.inf, 0.0), "'ids' gave inf for the response 'good'"),
    ],
)
def test_wrong_rewards_of_tokens_are_named(given, says):
    reward = TokenIds()
    reward.score_tokens = lambda *texts, **columns: given
    with pytest.raises(UserError, match=says):
        WeightedRewards([(reward, 1.0)]).score([], RESPONSES, **COLUMNS)


def test_rewards_of_a_run():
    model = FunctionReward(lambda prompts, responses, **c: [1.0] * len(responses), "model")
    rewards = load_rewards(ScoringConfig(reward_model_weight=3.0), model, given=[model])
    assert rewards.score([], RESPONSES).total.tolist() == [4.0] * 3
    with pytest.raises(UserError, match=r"no reward.*--reward_model"):
        load_rewards(ScoringConfig())
    for kind, source in (("function", "math:sqrt"), ("classifier", "nowhere"), ("url", "http://localhost")):
        settings = {f"reward_{kind}s": [source], f"reward_{kind}_weights": [1.0, 2.0]}
        with pytest.raises(UserError, match=f"reward_{kind}_weights has 2 entries for 1 reward {kind}s"):
            load_rewards(ScoringConfig(**settings))
    with pytest.raises(UserError, match="reward_batch_size"):
        load_rewards(ScoringConfig(reward_batch_size=0), model)


def test_a_file_may_hold_a_whole_reward(write_module):
    path = write_module(
        "class Tokens:\n    name = 'first'\n    def score(self, prompts, responses, **columns):\n"
        "        return [7.0] * len(responses)\nreward = Tokens()\n"
    )
    assert load_function(f"{path}:reward").name == "first"
    rewards = load_rewards(ScoringConfig(reward_functions=[f"{path}:reward"]))
    assert rewards.score([], RESPONSES).parts["first"].tolist() == [7.0] * 3


@pytest.mark.parametrize("trailing", [(), (1,)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_adapter_is_read_at_the_last_sampled_token(side, trailing):
    class Adapted(torch.nn.Linear):
        def compute_reward_score(self, input_ids, attention_mask=None, **kwargs):
            assert len(input_ids) <= 2
            return (input_ids * 10 + attention_mask.cumsum(1)).reshape(*input_ids.shape, *trailing).bfloat16()

    tokens = rows()
    ids, mask = padded(tokens, side, extra=1)
    scores = AdapterReward(Adapted(1, 1), micro_batch_size=2).score([], RESPONSES, input_ids=ids, attention_mask=mask)
    expected = torch.stack([(x[-1] * 10 + len(x)).bfloat16().float() for x in tokens])
    assert scores.dtype == torch.float32 and scores.equal(expected)


def test_a_reward_model_reads_the_sampled_ids_in_micro_batches():
    """PITFALL 19: scores are of the ids, whatever the texts say. PITFALL 5: at the last real token."""
    from coati.models import RewardModel

    torch.manual_seed(0)
    model = RewardModel(config=tiny_config("llama")).eval()
    ids, mask = padded(rows(), "right")
    split = lambda mask: [[2, 0], [1]]  # noqa: E731
    reward = ModelReward(lambda inputs: [model(**one) for one in inputs], torch.device("cpu"), split)
    scores = reward.score(["?"] * 3, ["other text"] * 3, input_ids=ids, attention_mask=mask, answer=[1, 2, 3])
    assert not scores.requires_grad
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
