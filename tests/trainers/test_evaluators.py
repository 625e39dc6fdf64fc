"""Metrics of the user's own at every evaluation."""

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import settings_for, trainer_classes

SOURCE = """
def steps(trainer):
    return {"steps_twice": 2.0 * trainer.steps_done}
"""


def make(world, runtime, output, /, **changes):
    config_class, trainer_class = trainer_classes("sft")
    settings = settings_for("sft", world, output_dir=str(output), steps=2, **changes)
    return trainer_class(configure(config_class, **settings), runtime)


@pytest.mark.parametrize("with_data", [True, False])
def test_they_are_asked_at_every_evaluation_with_or_without_data(with_data, tiny_world, runtime, tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    changes = dict(evaluators=[f"{tmp_path}/mine.py:steps"], save_every=1)
    make(tiny_world, runtime, tmp_path / "run", **changes | ({} if with_data else dict(eval_data=[]))).train()
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/steps_twice" in row]
    assert [row["eval/steps_twice"] for row in rows] == [0.0, 4.0]
    assert all(("eval/loss" in row) == with_data for row in rows)


def test_one_that_is_not_there_is_named_before_anything_is_loaded(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match=r"evaluator '.*none.py:f': importing .*none.py failed"):
        make(tiny_world, runtime, tmp_path / "run", evaluators=[f"{tmp_path}/none.py:f"])
    assert not (tmp_path / "run").exists()
