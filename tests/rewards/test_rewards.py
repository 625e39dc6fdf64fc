"""Rewards: functions are found, wrong scores are named, weights are applied, models are asked with the sampled ids."""

import pytest
import torch

from coati.errors import UserError
from coati.rewards import FunctionReward, ModelReward, RunningMoments, WeightedRewards, load_function, load_rewards
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
    total, parts = WeightedRewards([(short, 0.5), (polite, 2.0)]).score([], RESPONSES)
    assert total.dtype == torch.float32
    assert total.tolist() == [0.0, -7.5, 4.0]
    assert {name: x.tolist() for name, x in parts.items()} == {"short": [-4, -15, 0], "polite": [1, 0, 2]}


def test_two_functions_of_one_name_keep_their_parts_apart(tmp_path):
    """Each in its own file, each called `reward`, as users call them."""
    places = []
    for i in (1, 2):
        (tmp_path / f"r{i}.py").write_text(
            f"def reward(prompts, responses, **c):\n    return [{i}.0] * len(responses)\n"
        )
        places.append(f"{tmp_path}/r{i}.py:reward")
    total, parts = load_rewards(places, [1.0, 10.0], None, 1.0).score([], RESPONSES)
    assert total.tolist() == [21.0] * 3
    assert sorted(x[0].item() for x in parts.values()) == [1.0, 2.0]


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


def test_rewards_of_a_run():
    model = FunctionReward(lambda prompts, responses, **c: [1.0] * len(responses), "model")
    rewards = load_rewards([], None, model, 3.0)
    assert rewards.score([], RESPONSES)[0].tolist() == [3.0] * 3
    with pytest.raises(UserError, match=r"no reward.*--reward_model"):
        load_rewards([], None, None, 1.0)
    with pytest.raises(UserError, match="2 entries for 1 reward functions"):
        load_rewards(["math:sqrt"], [1.0, 2.0], None, 1.0)


def test_a_reward_model_reads_the_sampled_ids_in_micro_batches():
    """PITFALL 19: scores are of the ids, whatever the texts say. PITFALL 5: at the last real token."""
    from coati.models import RewardModel

    torch.manual_seed(0)
    model = RewardModel(config=tiny_config("llama")).eval()
    ids, mask = padded(rows(), "right")
    reward = ModelReward(lambda inputs: [model(**one) for one in inputs], torch.device("cpu"), micro_batch_size=2)
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
