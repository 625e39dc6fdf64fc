"""A reward model of several objectives as a reward: their weighted sum, wherever such a model is scored with."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import coati.responses
from coati.check_reward import text_model_reward
from coati.config import configure
from coati.errors import UserError
from coati.models import Actor, ObjectiveRewardModel, RewardModel
from coati.rewards import ModelReward, ObjectivesReward, Scorer
from coati.rewards.config import ModelRewardSettings
from coati.rewards.process import load_here
from coati.rollout import GenerationConfig, best_of_n
from coati.samples import Sample
from coati.serve.rewards import load_model_reward
from coati.tracking import read_metrics
from tests.conftest import reward_model, settings_for, trainer_classes
from tests.rewards.samples import samples

WEIGHTS = {"verbosity": -0.2, "helpfulness": 0.7}


@pytest.fixture(scope="module")
def folder(tiny_world, tmp_path_factory):
    """An untrained model whose outputs differ."""
    path = tmp_path_factory.mktemp("objectives")
    torch.manual_seed(2)
    names = ["helpfulness", "coherence", "verbosity"]
    model = ObjectiveRewardModel(config=AutoConfig.from_pretrained(tiny_world["policy"]), objectives=names)
    torch.nn.init.normal_(model.value_head.weight, std=0.5)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(path)
    return str(path)


def run_of(algorithm, world, runtime, output, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), **changes)
    return trainer_class(configure(config_class, **settings), runtime)


def gives(rows: list[list[float]]) -> ModelReward:
    """Gives these scores, the last samples first."""
    places = list(range(len(rows)))[::-1]
    forward_all = lambda batches: [torch.tensor([rows[i]]) for i in places]  # noqa: E731
    return ModelReward(forward_all, 0, torch.device("cpu"), lambda lengths: [[i] for i in places])


def test_the_score_is_the_weighted_sum_and_the_objectives_are_told():
    reward = ObjectivesReward(gives([[1.0, 4.0, 0.5], [2.0, -1.0, 3.0]]), {"a": 0.5, "b": -2.0, "c": 0.0})
    made = samples(["", ""], ["x", "y"])
    Scorer([(reward, 3.0)]).score(made)
    assert [sample.score for sample in made] == [3 * (0.5 - 8.0), 3 * (1.0 + 2.0)]
    assert made[1].details == {
        f"reward_model/{name}": score for name, score in zip("abc", (2.0, -1.0, 3.0), strict=True)
    }


def test_a_score_that_is_not_finite_names_its_objective_and_the_response():
    reward = ObjectivesReward(gives([[1.0, math.nan]]), {"a": 1.0, "b": 0.0})
    with pytest.raises(UserError, match=r"the objective b, of the reward reward_model, is nan for 'so it is'"):
        Scorer([(reward, 1.0)]).score(samples([""], ["so it is"]))


def test_a_run_learns_from_the_weighted_sum_and_logs_each_objective(tiny_world, folder, runtime, tmp_path):
    """PPO, whose critic starts from the weighted sum too; in training and evaluation."""
    entry = reward_model(folder, objectives=WEIGHTS, weight=2.0)
    trainer = run_of("ppo", tiny_world, runtime, tmp_path / "run", rewards=[entry], steps=1)
    scorer, model = RewardModel(folder, weights=WEIGHTS).eval(), ObjectiveRewardModel(folder).eval()
    critic = trainer.engines["critic"].module
    assert critic.value_head.weight.equal(scorer.value_head.weight) and not hasattr(critic.config, "objectives")
    batch, _ = trainer.rollouts.next(0)
    mask = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
    with torch.no_grad():
        scores, by_objective = scorer(batch.input_ids, mask), model(batch.input_ids, mask)
    torch.testing.assert_close(batch.scores, 2 * scores, rtol=1e-4, atol=1e-5)
    for sample, row in zip(batch.samples, by_objective.tolist(), strict=True):
        expected = 0.7 * row[0] - 0.2 * row[2]
        assert sample.rewards["reward_model"] == pytest.approx(expected, abs=1e-5)
    trainer.train()
    rows = read_metrics(tmp_path / "run")
    for row, prefix in ((rows[1], ""), (rows[0], "eval/")):
        told = {name: row[f"{prefix}reward/reward_model/{name}"] for name in model.objectives}
        expected = 0.7 * told["helpfulness"] - 0.2 * told["verbosity"]
        assert row[f"{prefix}reward/reward_model"] == pytest.approx(expected, abs=1e-5)
        assert row[f"{prefix}reward"] == pytest.approx(2 * expected, abs=1e-5)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (dict(), "has the objectives helpfulness, coherence, verbosity, and one score is wanted: say how they count"),
        (dict(objectives={"honesty": 1.0}), "no objective 'honesty', but helpfulness, coherence, verbosity"),
    ],
)
def test_what_is_wrong_about_weights_is_said_at_the_start(entry, says, tiny_world, folder, runtime, tmp_path):
    with pytest.raises(UserError, match=says):
        run_of("grpo", tiny_world, runtime, tmp_path / "run", rewards=[reward_model(folder, **entry)])


def test_other_models_and_ensembles_are_refused(tiny_world, folder, runtime, tmp_path):
    for name in ("a", "b"):
        RewardModel(config=AutoConfig.from_pretrained(tiny_world["policy"])).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(tmp_path / name)
    entry = reward_model(tmp_path / "a", objectives=WEIGHTS)
    with pytest.raises(UserError, match="is a model of one score: leave out objectives"):
        run_of("grpo", tiny_world, runtime, tmp_path / "run", rewards=[entry])
    ensemble = dict(type="ensemble", paths=[str(tmp_path / "a"), folder])
    with pytest.raises(UserError, match=r"one score is wanted.*or give a model of one score"):
        run_of("grpo", tiny_world, runtime, tmp_path / "run", rewards=[ensemble])
    with pytest.raises(UserError, match="objectives names none"):
        ModelRewardSettings(path=folder, objectives={})
    with pytest.raises(UserError, match="one score is wanted"):
        coati.responses.open_scorer(folder)


def test_best_of_n_a_served_and_a_checked_reward_are_the_runs(tiny_world, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    here = (tokenizer, torch.device("cpu"), lambda lengths: [[*range(len(lengths))]])
    settings, response = ModelRewardSettings(path=folder, objectives=WEIGHTS), "red lamp sorry"
    whole = load_here(folder, settings, *here)
    text = "<bos>User: red\nAssistant: " + response + "<eos>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    [expected] = whole.score([Sample(0, {}, "red", response, ids, [True] * len(ids), None, "eos")])
    checked = text_model_reward(folder, settings)
    assert checked.score([Sample.of_texts("red", response)]) == pytest.approx([expected])
    start = text.index(" " + response)
    served = load_model_reward(folder, settings)
    assert served.score([Sample.of_texts(text[:start], " " + response)]) == pytest.approx([expected])
    actor, config = Actor(tiny_world["policy"]).eval(), GenerationConfig(max_new_tokens=6)
    [best] = best_of_n(actor, whole, ["User: red\nAssistant:"], 4, tokenizer=tokenizer, config=config)
    assert best.scores[best.best] == max(best.scores) > min(best.scores)
