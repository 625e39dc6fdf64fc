"""One definition of what lies where in a run's folder."""

import ast
import json
from pathlib import Path

import pytest

from coati import run_layout
from coati.config import configure
from coati.run_layout import checkpoint_of_step, find_model, newest_checkpoint, step_of, write_manifest
from tests.conftest import ROOT, settings_for, trainer_classes

OWNERS = [ROOT / "coati" / "files.py", ROOT / "coati" / "run_layout.py"]
NAMES = {"checkpoints", "manifest.json", "trainer.json", "optimizer", ".partial", ".previous"}
STARTS = ("step-", "master-", "random-")
MODELS = {"actor", "critic", "reference"}


def strings_of(path: Path) -> list[str]:
    """Those that are values: docstrings are not."""
    tree = ast.parse(path.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in told]
    return [node.value for node in constants if isinstance(node.value, str)]


def joined_to_a_path(path: Path) -> set[str]:
    """Strings on the right of a slash."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]
    return {n.right.value for n in nodes if isinstance(n.right, ast.Constant) and isinstance(n.right.value, str)}


def test_no_other_module_spells_a_name():
    files = [path for path in sorted((ROOT / "coati").rglob("*.py")) if path not in OWNERS]
    assert len(files) > 100 and not NAMES.isdisjoint(strings_of(OWNERS[1]))
    for path in files:
        strings = strings_of(path)
        assert NAMES.isdisjoint(strings), path
        assert not [text for text in strings if text.startswith(STARTS)], path
        if path.parent.name in ("trainers", "parallel"):  # elsewhere they are other things' names too
            assert MODELS.isdisjoint(strings), path
            assert "model" not in joined_to_a_path(path), path


def test_importing_it_costs_nothing():
    """Tools that only look into a run's folder need no torch."""
    ours = {node.module for node in ast.walk(ast.parse(OWNERS[1].read_text())) if isinstance(node, ast.ImportFrom)}
    assert ours == {"pathlib", "typing", "coati.errors", "coati.files"}


def test_steps_are_sorted_and_found_by_number(tmp_path):
    for step in (100, 9, 10):
        checkpoint_of_step(tmp_path, step).mkdir()
    found = run_layout.list_checkpoints(tmp_path)
    assert [step_of(folder) for folder in found] == [9, 10, 100]
    assert newest_checkpoint(tmp_path) is None  # none is complete
    write_manifest(found[1], 10, None)
    assert newest_checkpoint(tmp_path) == found[1]


# --- what a run leaves


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(("algorithm", "models"), [("sft", ["model"]), ("ppo", ["actor", "critic"])])
def test_a_run_leaves_what_is_written_here(algorithm, models, tiny_world, runtime, tmp_path):
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, tiny_world, output_dir=str(tmp_path), steps=1)
    trainer_class(configure(config_class, **settings), runtime).train()
    logs = {"metrics.jsonl", "samples.jsonl", "run.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "checkpoints", *models[1:], *logs}
    [checkpoint] = (tmp_path / "checkpoints").iterdir()
    assert checkpoint == checkpoint_of_step(run_layout.checkpoints_of(tmp_path), 1)
    own = {"manifest.json", "trainer.json", "random-0-of-1.safetensors"}
    assert {path.name for path in checkpoint.iterdir()} == own | set(models)
    for name in models:
        assert {path.name for path in (checkpoint / name).iterdir()} == {"model", "optimizer"}
        for folder in (run_layout.model_in(checkpoint, name), tmp_path / ("model" if name == models[0] else name)):
            assert {"config.json", "tokenizer_config.json", "model.safetensors"} <= tree(folder)
    for place in (checkpoint, checkpoint / models[0], checkpoint / models[0] / "model"):
        assert find_model(place) == checkpoint / models[0] / "model"
    assert find_model(tmp_path) == tmp_path / "model"
    assert json.loads((checkpoint / "trainer.json").read_text())["step"] == 1


# --- the model that a path names


def make_model(folder: Path, file: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / file).touch()
    return folder


@pytest.mark.parametrize("name", ["actor", "model"])
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_of_a_run_that_goes_on_it_is_that_of_the_newest_complete_checkpoint(name, file, tmp_path):
    """PITFALL 26: an interrupted save is passed over."""
    checkpoints = run_layout.checkpoints_of(tmp_path)
    models = {step: make_model(checkpoint_of_step(checkpoints, step) / name / "model", file) for step in (2, 10, 11)}
    for step in (2, 10):
        write_manifest(checkpoint_of_step(checkpoints, step), step, None)
    make_model(checkpoints / "step-00000012.partial" / name / "model", file)
    assert find_model(tmp_path) == models[10]
    (models[10] / file).unlink()
    assert find_model(tmp_path) == models[2]
    product = make_model(tmp_path / "model", file)
    assert find_model(tmp_path) == product


def test_of_a_critic_or_reference_alone_there_is_none(tmp_path):
    for name in ("critic", "reference"):
        make_model(tmp_path / name / "model")
    assert find_model(tmp_path) is None
    assert find_model(tmp_path / "critic") == tmp_path / "critic" / "model"


@pytest.mark.parametrize("there", [True, False])
def test_where_nothing_is_there_is_none(there, tmp_path):
    place = tmp_path if there else tmp_path / "nowhere"
    assert find_model(place) is None
