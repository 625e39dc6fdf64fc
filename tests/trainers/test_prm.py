"""Process reward models: runs, what they measure, and that a folder says how its steps are separated."""

import math

import pytest
import torch

from coati.errors import UserError
from coati.models import Critic, ProcessRewardModel, RewardModel
from coati.models.process_reward_model import stored_separator
from coati.tracking import read_metrics, read_samples
from coati.trainers.prm import error_metrics
from tests.conftest import write_rows
from tests.trainers.test_training import losses, make, weights


def test_a_run_learns_which_steps_are_wrong(tiny_world, runtime, tmp_path):
    trainer = make("prm", tiny_world, runtime, tmp_path / "run", steps=12, step_separator=" / ")
    trainer.train()
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    assert rows[-1]["eval/loss"] < 0.7 * rows[0]["eval/loss"] and rows[-1]["eval/accuracy"] > 0.9
    labels = [label for row in trainer.eval_data for label in row.labels if not math.isnan(label)]
    assert rows[0]["eval/steps"] == len(labels)
    assert rows[0]["eval/right"] == pytest.approx(sum(label >= 0.5 for label in labels) / len(labels))
    assert rows[-1]["eval/accuracy_low"] < rows[-1]["eval/accuracy"] <= rows[-1]["eval/accuracy_high"]
    shown = read_samples(tmp_path / "run")[-1]
    probabilities = [float(text) for text in shown["steps"].split()]
    assert len(probabilities) == len(shown["labels"].split())
    assert shown["reward"] == pytest.approx(min(probabilities), abs=0.006)
    assert stored_separator(tmp_path / "run" / "model") == " / "
    assert "process reward model" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_folder_gives_the_trained_models_logits(tiny_world, runtime, tmp_path):
    trainer = make("prm", tiny_world, runtime, tmp_path / "run", steps=2, model=tiny_world["policy"], model_config=None)
    trainer.train()
    batch = trainer.load(trainer.data, [0, 3, 5])
    loaded = ProcessRewardModel(tmp_path / "run" / "model").eval()
    with torch.no_grad():
        expected = trainer.engines["model"].module.eval()(batch.input_ids, batch.attention_mask)
        found = loaded(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(found[batch.step_mask], expected[batch.step_mask])


def test_an_adapter_says_how_steps_are_separated(tiny_world, runtime, tmp_path):
    changes = dict(steps=1, model=tiny_world["policy"], model_config=None, lora_rank=2, merge_lora=False)
    make("prm", tiny_world, runtime, tmp_path / "run", **changes).train()
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    assert stored_separator(tmp_path / "run" / "model") == "\n"


@pytest.mark.parametrize("model_class", [RewardModel, Critic])
def test_other_models_are_no_process_reward_models(model_class, tiny_world, tmp_path):
    from transformers import AutoConfig

    model_class(config=AutoConfig.from_pretrained(tiny_world["policy"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no process reward model"):
        stored_separator(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "own"),
    [("prm", {}), ("reward", dict(objectives=["verbosity", "helpfulness"]))],
    ids=["steps", "objectives"],
)
def test_resuming_is_bitwise_the_same_as_never_stopping(algorithm, own, tiny_world, runtime, tmp_path):
    """PITFALL 25."""
    changes = own | dict(steps=7, save_every=3, keep_checkpoints=9)
    make(algorithm, tiny_world, runtime, tmp_path / "whole", **changes).train()
    stop = str(tmp_path / "whole" / "checkpoints" / "step-00000003")
    make(algorithm, tiny_world, runtime, tmp_path / "resumed", resume=stop, **changes).train()
    expected, found = weights(tmp_path / "whole" / "model"), weights(tmp_path / "resumed" / "model")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "whole")[3:] == losses(tmp_path / "resumed")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"steps": ["a", "b"], "labels": [1]}, "no label for each of `steps`"),
        ({"steps": ["a", " "], "labels": [1, 1]}, "list of texts that say something"),
        ({"steps": ["a", "b"], "labels": [1, 1.5]}, "from 0 to 1"),
        ({"steps": ["a", "b\nc"], "labels": [1, 1]}, "another one: --step_separator"),
        ({"steps": ["a", "b"]}, "no known fields for stepwise data"),
    ],
)
def test_a_row_that_is_no_steps_is_named(row, words, tiny_world, runtime, tmp_path):
    good = {"prompt": "red", "steps": ["a"], "labels": [True]}
    data = write_rows(tmp_path / "mine.jsonl", [good, {"prompt": "red"} | row])
    with pytest.raises(UserError, match=rf"mine\.jsonl.*2.*{words}"):
        make("prm", tiny_world, runtime, tmp_path / "run", train_data=[data])


def test_errors_are_measured_as_process_bench_does():
    sums = {"erroneous": 10, "erroneous_found": 5, "correct": 4, "correct_found": 4}
    assert error_metrics(sums) == {
        "erroneous_accuracy": 0.5,
        "correct_accuracy": 1.0,
        "error_f1": pytest.approx(2 / 3),
    }
    assert error_metrics(sums | {"erroneous": 0, "erroneous_found": 0}) == {"correct_accuracy": 1.0}
    assert error_metrics(dict.fromkeys(sums, 1) | {"erroneous_found": 0, "correct_found": 0})["error_f1"] == 0
