"""The methods as commands, where nothing but the installed package is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from coati.cli import main
from coati.commands import COMMANDS
from coati.config import merge, parse_config
from coati.config.parse import nested
from coati.errors import UserError
from coati.trainers.algorithms import ALGORITHMS
from tests.conftest import ROOT, settings_for


def start(arguments: list[str], folder: Path, **environment) -> subprocess.CompletedProcess:
    """`coati ...` as a process in a folder without a checkout."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "coati.cli", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def filled_in(method: str, world: dict[str, str]) -> dict:
    """What `coati init` writes, with the words in capitals replaced and sizes that are tiny."""
    from coati.initial import initial_settings

    config_class = ALGORITHMS[COMMANDS[method].algorithm].config
    algorithm = "sdpo" if method == "sdpo" else COMMANDS[method].algorithm
    tiny = settings_for(algorithm, world, model=world["policy"], steps=1, output_dir="run")
    return merge(config_class, yaml.safe_load(initial_settings(method)), nested(config_class, tiny))


@pytest.mark.parametrize("method", COMMANDS)
def test_a_first_configuration_is_that_of_its_method(method, tiny_world, tmp_path):
    """It parses, its words fit together, and it says nothing but the method's own settings."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(filled_in(method, tiny_world)))
    command = COMMANDS[method]
    config = parse_config(ALGORITHMS[command.algorithm].config, ["--config", str(tmp_path / "run.yaml")])
    config.check(1)
    assert method == "sft" or config.algorithm.type == method


def test_settings_win_over_a_methods_defaults():
    config_class = ALGORITHMS["grpo"].config
    defaults = COMMANDS["dapo"].defaults
    assert parse_config(config_class, [], defaults=defaults).algorithm.clip_high == 0.28
    assert parse_config(config_class, ["--clip_high", "0.3"], defaults=defaults).algorithm.clip_high == 0.3


@pytest.mark.parametrize(
    "method", ["sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "dr-grpo"))]
)
def test_a_method_trains_in_an_empty_folder(method, tiny_world, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(filled_in(method, tiny_world)))
    ended = start([method, "--config", "run.yaml"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.distributed
def test_a_method_starts_on_several_processes(tiny_world, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(filled_in("ppo", tiny_world)))
    ended = start(["run", "--nproc_per_node", "2", "ppo", "--config", "run.yaml"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "2 x cpu" in ended.stdout


def test_mistakes_are_found_before_anything_large_is_imported(tmp_path):
    """A wrong key, and a file that isn't there: neither torch nor transformers is loaded for them."""
    refuse = "import sys\nsys.modules.update(torch=None, transformers=None, colossalai=None)\n"
    (tmp_path / "sitecustomize.py").write_text(refuse)
    (tmp_path / "wrong.yaml").write_text("learning_rat: 1")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for arguments, words in (
        (["ppo", "--config", "wrong.yaml"], "did you mean 'optimizer.learning_rate'?"),
        (["sft", "--train_data", "none.jsonl"], "none.jsonl"),
        (["ppp"], "there is no command 'ppp'"),
    ):
        ended = start(arguments, tmp_path, PYTHONPATH=path)
        assert ended.returncode == 2 and words in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert start(["ppo", "--help"], tmp_path, PYTHONPATH=path).returncode == 0


def test_help_shows_the_common_settings_and_help_all_the_others(capsys):
    shown = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse_config(ALGORITHMS["ppo"].config, [flag])
        shown.append(capsys.readouterr().out)
    common, everything = shown
    assert "--learning_rate X" in common and "--gae_lambda" not in common and "--gae_lambda X" in everything
    assert len(common.splitlines()) < 110


def test_flags_may_have_dashes_and_values_keep_theirs():
    config_class = ALGORITHMS["sft"].config
    config = parse_config(config_class, ["--max-length=64", "--run-name", "a-b", "--no-merge-lora"])
    assert (config.data.max_length, config.tracking.run_name, config.export.merge_lora) == (64, "a-b", False)
    with pytest.raises(UserError, match="'--learning-rat' is no flag"):
        parse_config(config_class, ["--learning-rat", "1"])


@pytest.mark.parametrize("arguments", [["init", "nothing"], ["run", "--nproc_per_node", "0", "ppo"]])
def test_tools_refuse_what_they_do_not_know(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2 and capsys.readouterr().err
