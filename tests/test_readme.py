"""What the README and the docs say is executed: their commands, examples, formats, errors, metrics and links."""

import ast
import doctest
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coati.commands import COMMANDS
from coati.config import as_flags, configure, parse_config
from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import ROOT, reward_model, settings_for, trainer_classes, write_rows

# In the order in which their commands run: other pages resume what the first run has made.
FIRST_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "docs/first-run.md")
PAGES = [ROOT / name for name in FIRST_PAGES]
PAGES += sorted(set((ROOT / "docs").glob("*.md")) - set(PAGES))
APPLICATIONS = sorted((ROOT / "applications").glob("*/README.md"))  # their own tests run their commands
ALGORITHM_OF = {"train_sft.py": "sft", "train_rm.py": "reward", "train_ppo.py": "ppo"}
ALGORITHM_OF |= {"train_preference.py": "preference", "train_grpo.py": "grpo"}
# What makes a documented run a small one. Plugin, precision, LoRA and all else stay as documented.
SMALL = "--steps 2 --batch_size 4 --micro_batch_size 2 --max_length 96 --max_prompt_length 64 --warmup 0"
SMALL += " --eval_every 0 --save_every 0 --samples 2 --progress off --eos_token <eos>"
SMALL_OF = {
    "sft": "--max_new_tokens 4",
    "reward": "",
    "preference": "",
    "ppo": "--max_new_tokens 4 --ppo_epochs 1 --critic_warmup 1 --max_rollout_kl 9",  # untrained weights round coarsely
    "grpo": "--max_new_tokens 4 --group_size 2 --max_rollout_kl 9",
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page whose info string is `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command line of the pages, each once."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip() and not line.startswith("#")))


def words_of(command: str) -> list[str]:
    """A command's words without the variables in front of it."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def is_training(command: str) -> bool:
    words = command.split()
    is_command = words[0] == "coati" and any(word in COMMANDS for word in words) and words[1] not in ("init", "plan")
    return (is_command or any(script in command for script in ALGORITHM_OF)) and "--help" not in command


def short(command: str) -> str:
    """A test's name for a command."""
    config = re.search(r"(\w+)\.yaml", command)
    return config.group(1) + (" resumed" if "--resume" in command else "") if config else command[:40]


TRAINING = [command for command in commands() if is_training(command)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_world) -> dict[str, str]:
    """The tiny world, with prompts that carry an answer for rewards by rule, and a root for documented paths."""
    root = tmp_path_factory.mktemp("documented")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    prompts = write_rows(root / "prompts.jsonl", rows)
    return tiny_world | {"prompts": prompts, "prompts_eval": prompts, "root": str(root)}


def parse_training(command: str) -> tuple[str, int, list[str]]:
    """(algorithm, processes, the script's arguments) of a documented training command."""
    words = words_of(command)
    start = next(i for i, word in enumerate(words) if word.startswith("examples/train_") or word in COMMANDS)
    launcher, name = words[:start], Path(words[start]).name
    processes = 1
    if len(launcher) > 1:
        assert launcher[0] in ("coati", "colossalai") and launcher[1:3] == ["run", "--nproc_per_node"]
        processes = int(launcher[3])
    algorithm = COMMANDS[name].algorithm if name in COMMANDS else ALGORITHM_OF[name]
    return algorithm, processes, words[start + 1 :]


def small_arguments(algorithm: str, arguments: list[str], place: dict[str, str]) -> list[str]:
    """The documented arguments, and after them (the last one wins) what makes the run small and its paths exist."""
    config = parse_config(trainer_classes(algorithm)[0], arguments)
    tiny = settings_for(algorithm, place)
    paths = ["--output_dir", f"{place['root']}/{config.output_dir}", "--cache_dir", place["cache"]]
    paths += ["--train_data", *tiny["train_data"], "--eval_data", *tiny["eval_data"], "--tokenizer", place["tokenizer"]]
    from_scratch = config.model.model_config is not None
    paths += ["--model_config", place["model_config"]] if from_scratch else ["--model", place["policy"]]
    if getattr(config, "reward_model", None):
        paths += as_flags({"rewards": [reward_model(place["policy"])]})
    return [*arguments, *SMALL.split(), *SMALL_OF[algorithm].split(), *paths]


@pytest.mark.parametrize("command", TRAINING, ids=short)
def test_training_command_runs(command, place, runtime, monkeypatch):
    """Two steps on tiny data in this process, under the documented plugin, to the end: a model is written."""
    monkeypatch.chdir(ROOT)
    algorithm, processes, arguments = parse_training(command)
    config_class, trainer_class = trainer_classes(algorithm)
    parse_config(config_class, arguments).check(processes)
    config = parse_config(config_class, small_arguments(algorithm, arguments, place))
    trainer_class(config, runtime).train()
    assert (Path(config.output_dir) / "model" / "config.json").is_file()


@pytest.mark.distributed
def test_first_training_script_runs_on_two_processes(place):
    """As it is typed, through `colossalai run`; the others differ from it in settings only."""
    first = next(command for command in TRAINING if "examples/train_sft.py" in command)
    algorithm, processes, arguments = parse_training(first)
    arguments = small_arguments(algorithm, arguments, place | {"root": place["root"] + "/two"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = Path(sys.executable).parent
    launcher = [str(programs / "colossalai"), "run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*launcher, "examples/train_sft.py", *map(shlex.quote, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{processes} x" in done.stdout
    output = parse_config(trainer_classes(algorithm)[0], arguments).output_dir
    assert (Path(output) / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", [c for c in commands() if not is_training(c)], ids=short)
def test_other_command_works(command, place, runtime, monkeypatch, capsys):
    """Cheap commands are run; of those that install or serve, what they name must be there."""
    monkeypatch.chdir(ROOT)
    match words_of(command):
        case ["make", *targets]:
            done = subprocess.run(["make", "-n", *targets], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        case ["coati", "--help"]:
            from coati.cli import main

            assert main(["--help"]) == 0 and "train from preferences" in capsys.readouterr().out
        case ["coati", "init", method]:
            from coati.cli import main

            assert main(["init", method]) == 0 and f"coati {method} --config" in capsys.readouterr().out
        case ["coati", method, "--help-all"]:
            with pytest.raises(SystemExit, match="0"):
                parse_config(trainer_classes(method)[0], ["--help-all"])
            assert "--kl_coefficient" in capsys.readouterr().out
        case ["coati", "doctor"]:
            from coati.cli import main

            assert main(["doctor"]) == 0
            assert "zero2-offload" in capsys.readouterr().out
        case ["coati", "plan", *arguments]:
            from coati.cli import main

            assert main(["plan", *arguments, "--model", place["policy"]]) == 0
            assert "fits" in capsys.readouterr().out
        case ["coati", "report", folder]:
            check_report(folder, place, runtime)
        case ["python", script, "--help"]:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(script, run_name="__main__")
            assert "--kl_coefficient" in capsys.readouterr().out
        case ["source", path]:
            assert path == ".venv/bin/activate" and "VENV := .venv\n" in (ROOT / "Makefile").read_text()
        case ["tensorboard", "--logdir", _]:
            from tensorboard.main import run_main

            assert callable(run_main)
        case ["pip", "install", *rest]:
            files = [ROOT / name for flag, name in pairwise(rest) if flag == "-r"]
            assert all(file.is_file() for file in files)
            assert files or ("-e" in rest and '"dev": [' in (ROOT / "setup.py").read_text())
        case [python, "-m", "pytest", path]:
            assert python == ".venv/bin/python" and (ROOT / path).is_file()
        case _:
            pytest.fail(f"no check for the documented command {command!r}")


def check_report(folder: str, place, runtime):
    from coati.cli import main

    target = Path(place["root"]) / folder
    config_class, trainer_class = trainer_classes("sft")
    settings = settings_for("sft", place, steps=1, output_dir=str(target / "for-the-report"))
    trainer_class(configure(config_class, **settings), runtime).train()
    assert main(["report", str(target)]) == 0
    assert "for-the-report" in (target / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text(encoding="utf-8")], ids=lambda p: p.name)
def test_examples_of_a_page_give_what_they_say(page):
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0


def test_the_worked_algorithm_trains_as_the_real_one(tiny_world, runtime, tmp_path):
    """CONTRIBUTING's DPO, for three steps; the curve is that of `coati/trainers/dpo.py`."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(page))
    worked: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), worked)
    settings = settings_for("preference", tiny_world, steps=3, eval_every=1) | dict(algorithm="dpo")
    config_class, trainer_class = trainer_classes("preference")
    trainer_class(configure(config_class, **settings | dict(output_dir=str(tmp_path / "real"))), runtime).train()
    settings = {name: value for name, value in settings.items() if name != "algorithm"}
    worked_config = configure(worked["PlainDPOConfig"], **settings | dict(output_dir=str(tmp_path / "worked")))
    worked["PlainDPOTrainer"](worked_config, runtime).train()
    real, ours = (read_metrics(tmp_path / name) for name in ("real", "worked"))
    assert len(ours) == 4
    for row, expected in zip(ours, real, strict=True):
        names = [name for name in row if name.removeprefix("eval/") in ("loss", "accuracy", "pairs")]
        assert names and {n: row[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-3)


def test_reward_examples_give_what_they_say():
    namespace = runpy.run_path(str(ROOT / "examples" / "rewards.py"))
    for name in ("brevity", "final_number"):
        [test] = doctest.DocTestFinder().find(namespace[name], name, globs=dict(namespace))
        assert doctest.DocTestRunner().run(test) == (0, 1)


SCRIPTS = {page.name: block for page in PAGES for block in blocks(page, "python") if ">>> " not in block}


@pytest.mark.parametrize("page", SCRIPTS)
def test_python_blocks_run(page, place, runtime, tmp_path, monkeypatch):
    """Blocks without prompts are whole scripts; they run with paths of the tiny world and two steps."""
    import coati.parallel
    from coati.models import RewardModel

    monkeypatch.setattr(coati.parallel, "launch", lambda: runtime)
    RewardModel(place["policy"]).save_pretrained(tmp_path / "scorer")
    real = {
        "runs/quickstart/sft/model": place["policy"],
        "runs/quickstart/reward/model": str(tmp_path / "scorer"),
        "runs/quickstart/data/sft.jsonl": place["sft"],
        "runs/quickstart/data/prompts_train.jsonl": place["prompts"],
        "runs/demo": str(tmp_path),
        "steps=20": f"steps=2, batch_size=4, cache_dir={place['cache']!r}",
        "steps=1,": f"steps=1, cache_dir={place['cache']!r},",
    }
    block = SCRIPTS[page]
    for documented, replacement in real.items():
        block = block.replace(documented, replacement)
    assert "runs/" not in block
    exec(compile(block, page, "exec"), {})
    assert list(tmp_path.glob("*/model/config.json"))


def test_there_are_scripts_for_training_and_for_value_heads():
    assert set(SCRIPTS) == {"first-run.md", "value-heads.md"}


@pytest.mark.parametrize("kind", ["sft", "preference", "unpaired", "prompt", "tools"])
def test_documented_formats_parse(kind):
    import json

    from coati.data import parse_record

    [block] = blocks(ROOT / "docs" / "data.md", f"jsonl {kind}")
    read_as = "sft" if kind == "tools" else kind
    assert all(parse_record(json.loads(line), read_as) for line in block.splitlines())


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("ppo", dict(ptx_coefficient=0.1)),
        ("grpo", dict(dynamic_sampling=True, importance_correction="truncated", kl_coefficient=0.1)),
    ],
    ids=("ppo", "grpo"),
)
def test_every_setting_and_metric_of_rollouts_is_explained(algorithm, changes, place, runtime, tmp_path):
    from coati.config.schema import leaves
    from coati.tracking import read_metrics

    config_class, trainer_class = trainer_classes(algorithm)
    changes |= dict(steps=1, output_dir=str(tmp_path / "run"))
    changes |= dict(ptx_data=[place["sft"]]) if algorithm == "ppo" else {}
    trainer_class(configure(config_class, **settings_for(algorithm, place, **changes)), runtime).train()
    logged = {name for row in read_metrics(tmp_path / "run") for name in row} - {"step", "time"}
    logged = {re.sub("reward/.*", "reward/NAME", name) for name in logged}
    own = {path for path in leaves(config_class) if path.startswith(("algorithm.", "generation.", "scoring."))}
    settings = {path.rpartition(".")[2] for path in own} - {"type"}
    pages = {"ppo.md", "rewards.md", f"{algorithm}.md"}
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in pages)
    assert sorted(name for name in logged | settings if not re.search(f"`(--)?{re.escape(name)}`", text)) == []


def test_settings_page_is_current():
    script = runpy.run_path(str(ROOT / "tools" / "write_configuration.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run tools/write_configuration.py"


@cache
def texts_in_code() -> list[str]:
    """Every text in coati's code; those of an f-string are one, with {} for its values."""
    texts = []
    for path in sorted((ROOT / "coati").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def explained_errors() -> list[str]:
    """The errors that docs/troubleshooting.md begins its paragraphs with."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        error for head in re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) for error in re.findall("`(.+?)`", head)
    ]
    of_others = {"colossalai: command not found", "torchrun", "address already in use", "colossalai run"}
    return [error for error in quoted if error not in of_others]


@pytest.mark.parametrize("error", explained_errors())
def test_an_explained_error_exists(error):
    pieces = [piece.strip() for piece in error.split("…")]
    assert any(all(piece in text for piece in pieces) for text in texts_in_code())


@pytest.mark.parametrize(
    "settings",
    [
        dict(plugin="zero3"),
        dict(plugin="gemini", precision="fp32"),
        dict(precision="fp16"),
        dict(shard_fraction=2.0),
    ],
    ids=str,
)
def test_a_refused_combination_says_what_the_page_says(settings, monkeypatch):
    from coati.parallel import PluginConfig, check_plugin

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as refusal:
        check_plugin(PluginConfig(**settings))
    assert f"`{refusal.value}`" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *APPLICATIONS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
