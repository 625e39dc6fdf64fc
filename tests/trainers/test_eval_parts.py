"""Evaluations by the values of a column, and how sure reward models are of their preferences."""

import json
import math
from pathlib import Path

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics, read_samples
from tests.conftest import functions, settings_for, trainer_classes, write_rows

SUBSETS = ["chat", "code", 3, None]


def run(algorithm: str, world, runtime, folder, **changes) -> dict[str, float]:
    """The first evaluation."""
    config_class, trainer_class = trainer_classes(algorithm)
    changes |= dict(output_dir=str(folder), steps=1, samples=100)
    trainer_class(configure(config_class, **settings_for(algorithm, world, **changes)), runtime).train()
    return next(row for row in read_metrics(folder) if "eval/accuracy" in row or "eval/reward" in row)


def with_subsets(world, name: str, folder: Path) -> list[str]:
    """The evaluation rows, each with a subset in turn; None is no field at all."""
    rows = [json.loads(line) for line in Path(world[name]).read_text().splitlines()]
    rows = [
        row if subset is None else row | {"subset": subset}
        for row, subset in zip(rows, SUBSETS * len(rows), strict=False)
    ]
    return [write_rows(folder / f"{name}.jsonl", rows)]


def test_a_reward_models_accuracy_by_subset_and_its_calibration(tiny_world, runtime, tmp_path):
    changes = dict(eval_data=with_subsets(tiny_world, "pairs_eval", tmp_path), eval_column="subset")
    found = run("reward", tiny_world, runtime, tmp_path / "run", **changes)
    rewards = [row["reward"] for row in read_samples(tmp_path / "run") if row["step"] == 0]
    differences = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    assert len(differences) == found["eval/pairs"] == 11
    for place, name in enumerate(("chat", "code", "3")):
        part = differences[place :: len(SUBSETS)]
        assert found[f"eval/accuracy/{name}"] == pytest.approx(sum(d > 0 for d in part) / len(part))
        assert found[f"eval/pairs/{name}"] == len(part)
        assert found[f"eval/calibration_error/{name}"] == pytest.approx(calibration_error(part), abs=1e-6)
    assert found["eval/accuracy"] == pytest.approx(sum(d > 0 for d in differences) / 11)
    assert found["eval/calibration_error"] == pytest.approx(calibration_error(differences), abs=1e-6)
    parts = {name.rpartition("/")[2] for name in found if name.startswith("eval/accuracy/")}
    assert parts == {"chat", "code", "3"}, "rows without a subset are in the whole alone"


def calibration_error(differences: list[float]) -> float:
    bins = [[] for _ in range(10)]
    for difference in differences:
        confidence = 1 / (1 + math.exp(-abs(difference)))
        bins[min(int((confidence - 0.5) * 20), 9)].append(confidence - (difference > 0))
    return sum(abs(sum(of_bin)) for of_bin in bins) / len(differences)


def test_rewards_of_prompts_by_subset(tiny_world, runtime, tmp_path):
    changes = dict(eval_data=with_subsets(tiny_world, "prompts_eval", tmp_path), eval_column="subset")
    found = run("ppo", tiny_world, runtime, tmp_path / "run", **changes)
    rows = [row for row in read_samples(tmp_path / "run") if row["step"] == 0]
    assert len(rows) == 11
    for place, name in enumerate(("chat", "code", "3")):
        part = [row["reward"] for row in rows[place :: len(SUBSETS)]]
        assert found[f"eval/reward/{name}"] == pytest.approx(sum(part) / len(part))
    assert found["eval/reward"] == pytest.approx(sum(row["reward"] for row in rows) / 11)


@pytest.mark.parametrize("algorithm", ["reward", "ppo"])
def test_a_column_that_no_row_has_is_named(algorithm, tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=r"has the field 'domain': correct --eval_column"):
        run(algorithm, tiny_world, runtime, tmp_path / "run", eval_column="domain")


def test_a_subset_called_like_a_reward_is_refused(tiny_world, runtime, tmp_path):
    changes = dict(eval_data=with_subsets(tiny_world, "prompts_eval", tmp_path), eval_column="subset")
    changes |= dict(rewards=[functions(tiny_world["rewards"] + ":length")[0] | {"name": "chat"}])
    with pytest.raises(
        UserError, match=r"reward/chat would be two metrics: give the reward another `name` than 'chat'"
    ):
        run("ppo", tiny_world, runtime, tmp_path / "run", **changes)
