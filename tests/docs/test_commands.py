"""Every command in the documentation runs, on tiny data, or is read by its own parser up to where it would begin."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

import pytest
from click import UsageError

from coati.cli import TOOLS
from coati.cli import main as coati
from coati.commands import COMMANDS
from coati.config import as_flags, configure
from coati.errors import UserError
from coati.trainers.algorithms import ALGORITHMS
from tests.conftest import ROOT, reward_model, settings_for, trainer_classes, write_rows
from tests.docs.pages import PAGES, Piece, blocks, command_lines, explained_errors, spans, words_of
from tests.docs.programs import check_target, job, launched, read_program
from tests.test_plan_generators import write_run

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
# Files of the reader's own in commands, and the method whose first configuration (`coati init`) stands in for them.
OWN_FILES = {"sft.yaml": "sft", "rm.yaml": "reward", "dpo.yaml": "dpo", "ppo.yaml": "ppo", "grpo.yaml": "grpo"}
# What makes a documented run a small one. Plugin, precision, LoRA and all else stay as documented.
SMALL = "--steps 2 --batch_size 4 --micro_batch_size 2 --max_length 96 --max_prompt_length 64 --warmup 0"
SMALL += " --tensor_parallel 1 --pipeline_parallel 1 --sequence_parallel 1"  # tests/distributed has more processes
SMALL += " --eval_every 0 --save_every 0 --samples 2 --progress off --eos_token <eos>"
SMALL_OF = {
    "sft": "--max_new_tokens 4",
    "reward": "",
    "prm": "",
    "preference": "",
    "ppo": "--max_new_tokens 4 --ppo_epochs 1 --critic_warmup 1 --max_rollout_kl 9",  # untrained weights round coarsely
    "grpo": "--max_new_tokens 4 --group_size 2 --max_rollout_kl 9",
    "distill": "--max_new_tokens 4 --max_rollout_kl 9",
}

# --- commands that can't run in a test: why, and what is checked instead


def is_installed_or_optional(words):
    """The program is there, or it comes with one of coati's optional packages."""
    assert words[0] in entry_points(group="console_scripts").names or f'"{words[0]}' in SETUP


def names_what_is_there(words):
    """Requirement files and extras of `pip install`."""
    files = [name for flag, name in pairwise(words) if flag == "-r"]
    extras = [extra for word in words for extra in re.findall(r"\[(\w+)\]", word)]
    assert all((ROOT / name).is_file() for name in files)
    assert all(f'"{extra}": [' in SETUP for extra in extras)
    named = [word for word in words[2:] if not word.startswith("-")]
    if named and not files and not extras:
        pinned = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py"))
        if not all(f'"{name}"' in pinned for name in named):
            is_installed_or_optional(named)


def has_its_hooks(words):
    assert words == ["pre-commit", "install"] and (ROOT / ".pre-commit-config.yaml").is_file()


def sets_up_the_shell(words):
    assert words in (["source", ".venv/bin/activate"], ["unset", "RANK"])
    assert "VENV := .venv\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def is_used_by_the_jobs(words):
    """The options that the pages tell about are those that the jobs and their tests use."""
    places = [*(ROOT / "examples" / "slurm").glob("*.sbatch"), *(ROOT / "tests" / "slurm").rglob("*.py")]
    texts = "".join(path.read_text(encoding="utf-8") for path in places)
    assert all(word in texts for word in words if word != "JOB" and word != "python")


def names_a_test(words):
    files = [word.partition("::")[0] for word in words if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)
    marks = [mark for flag, mark in pairwise(words) if flag == "-m" and mark != "pytest"]
    assert all(f'"{mark}:' in (ROOT / "pyproject.toml").read_text(encoding="utf-8") for mark in marks)


def converts_its_input(words):
    done = subprocess.run(words[:-1], input="你好".encode("gbk"), capture_output=True, check=True)
    assert done.stdout.decode() == "你好"


def is_a_request_that_is_read(words):
    """Its path is one of the server's, and its JSON is taken."""
    from coati.serve.protocol import read_chat, read_completion

    path = re.fullmatch(r"http://127\.0\.0\.1:8000/v1/(.+)", words[1])[1]
    read = {"chat/completions": read_chat, "completions": read_completion}[path]
    assert words[2] == "-d" and read(json.loads(words[3])).wanted.model


NOT_RUN = {
    "make": ("installs, trains, tests or builds for minutes", check_target),
    "pip": ("needs the network", names_what_is_there),
    "source": ("changes the shell", sets_up_the_shell),
    "unset": ("changes the shell", sets_up_the_shell),
    "mlflow": ("serves until it is stopped", is_installed_or_optional),
    "trackio": ("serves until it is stopped", is_installed_or_optional),
    "wandb": ("needs an account", is_installed_or_optional),
    "swanlab": ("needs an account", is_installed_or_optional),
    "hf": ("needs an account", is_installed_or_optional),
    "pre-commit": ("needs the network", has_its_hooks),
    "scancel": ("needs SLURM: tests/slurm runs it", is_used_by_the_jobs),
    "scontrol": ("needs SLURM: tests/slurm runs it", is_used_by_the_jobs),
    "srun": ("needs SLURM: tests/slurm runs it", is_used_by_the_jobs),
    "curl": ("needs a server: tests/serve sends such requests", is_a_request_that_is_read),
    "lm_eval": ("needs a server and the network: tests/serve/test_server.py drives it", is_installed_or_optional),
    "iconv": ("converts a file of the reader's", converts_its_input),
}
READ = ("coati", "python", ".venv/bin/python", "colossalai", "torchrun", "sbatch")
PROGRAMS = (*READ, *NOT_RUN)


def program_of(text: str) -> str:
    """What a text would start if it is a command, else nothing."""
    try:
        words = words_of(text)[1]
    except ValueError:  # quotes without their other end
        return ""
    return words[0] if len(words) > 1 and (words[0] in PROGRAMS or words[0].endswith(".py")) else ""


LINES = command_lines()
IN_SENTENCES = {
    piece.text: piece
    for page in PAGES
    for piece in spans(page)
    if program_of(piece.text) and piece.text not in explained_errors()
}


def is_training(command: str) -> bool:
    words = words_of(command)[1]
    is_method = words[0] == "coati" and any(word in COMMANDS for word in words) and words[1] not in ("init", "plan")
    return (is_method or "examples/train_" in command) and "--help" not in command


def short(piece: Piece) -> str:
    """A test's name for a command."""
    command = piece.text
    config = re.search(r"(\w+)\.yaml", command)
    if not config or not is_training(command):
        return command[:60]
    return f"{words_of(command)[1][0]} {config.group(1)}" + (" resumed" if "--resume" in command else "")


@pytest.fixture(scope="module")
def own_files(tmp_path_factory) -> dict[str, str]:
    """What stands in for the reader's own files, by name."""
    from coati.initial import initial_settings

    folder = tmp_path_factory.mktemp("own")
    for name, method in OWN_FILES.items():
        (folder / name).write_text(initial_settings(method), encoding="utf-8")
    return {name: str(folder / name) for name in OWN_FILES}


def program(command: str, own_files: dict[str, str]) -> tuple[int, list[str]]:
    """How many processes a command starts, and the words of what they run, with files that are there."""
    variables, words = words_of(command)
    variables = {name: own_files.get(value, value) for name, value in variables.items()}
    words = [own_files.get(word, word) for word in words]
    return launched(job(variables, words) if words[0] == "sbatch" else words)


def algorithm_of(config) -> str:
    return next(name for name, algorithm in ALGORITHMS.items() if algorithm.config is type(config))


def small_arguments(config, place: dict[str, str]) -> list[str]:
    """After a command's own arguments (the last one wins): what makes the run small and its paths exist."""
    algorithm = algorithm_of(config)
    objectives = getattr(getattr(config, "algorithm", None), "objectives", [])
    tiny = settings_for(algorithm, place, **({"objectives": objectives} if objectives else {}))
    paths = ["--output_dir", f"{place['root']}/{config.output_dir}", "--cache_dir", place["cache"]]
    paths += ["--train_data", *tiny["train_data"], "--eval_data", *tiny["eval_data"], "--tokenizer", place["tokenizer"]]
    from_scratch = config.model.model_config is not None
    paths += ["--model_config", place["model_config"]] if from_scratch else ["--model", place["policy"]]
    if any(reward.type == "model" for reward in getattr(config, "rewards", [])):
        paths += as_flags({"rewards": [reward_model(place["reward"])]})
    if algorithm == "distill":
        paths += ["--teacher", place["teacher"]]
    if hasattr(config, "generators"):  # this process has none
        paths += ["--max_staleness", "0", "--partial_rollouts", "false"]
    return [*SMALL.split(), *SMALL_OF[algorithm].split(), *paths]


@pytest.mark.parametrize("line", [line for line in LINES if is_training(line.text)], ids=short)
def test_training_command_runs(line, place, own_files, runtime, monkeypatch):
    """Two steps on tiny data in this process, under the documented plugin, to the end: a model is written."""
    monkeypatch.chdir(ROOT)
    processes, words = program(line.text, own_files)
    config = read_program(words)
    config.check(processes)
    config = read_program([*words, *small_arguments(config, place)])
    if "--resume" not in words:
        shutil.rmtree(config.output_dir, ignore_errors=True)  # of another page's command
    ALGORITHMS[algorithm_of(config)].trainer()(config, runtime).train()
    assert (Path(config.output_dir) / "model" / "config.json").is_file()


@pytest.mark.distributed
def test_first_training_script_runs_on_two_processes(place, own_files):
    """As it is typed, through `colossalai run`; the others differ from it in settings only."""
    first = next(line.text for line in LINES if "examples/train_sft.py" in line.text)
    processes, words = program(first, own_files)
    config = read_program(words)
    small = small_arguments(config, place | {"root": place["root"] + "/two"})
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
        [*launcher, *map(shlex.quote, [*words[1:], *small])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{processes} x" in done.stdout
    output = Path(read_program([*words, *small]).output_dir)
    assert (output / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("line", [line for line in LINES if not is_training(line.text)], ids=short)
def test_other_command_works(line, place, own_files, runtime, tmp_path, monkeypatch, capsys):
    """Cheap commands run; the others are read by their parsers, or checked as `NOT_RUN` says."""
    monkeypatch.chdir(ROOT)
    words = words_of(line.text)[1]
    match words:
        case ["coati", "--help"]:
            assert coati(words[1:]) == 0 and "train from preferences" in capsys.readouterr().out
        case ["coati", "init", method]:
            assert coati(words[1:]) == 0 and f"coati {method} --config" in capsys.readouterr().out
        case ["coati", method, "--help-all"]:
            with pytest.raises(SystemExit, match="0"):
                read_program(words)
            assert "--kl_coefficient" in capsys.readouterr().out
        case ["coati", "doctor"]:
            assert coati(words[1:]) == 0 and "zero2-offload" in capsys.readouterr().out
        case ["coati", "plan", "generators", _, *flags]:
            assert coati(["plan", "generators", str(write_run(tmp_path / "run")), *flags]) == 0
        case ["coati", "plan", *_] if not any(word in OWN_FILES for word in words):  # one: it takes seconds
            arguments = program(line.text, own_files)[1][1:]
            small = ["--model_config", place["model_config"], "--max_prompt_length", "8", "--max_new_tokens", "4"]
            assert coati([*arguments, *small]) == 0
            assert "fits" in capsys.readouterr().out
        case ["coati", "report", *flags, folder]:
            check_report(flags, folder, place, runtime)
        case ["coati", "label", *_]:
            check_label(words, tmp_path, place, monkeypatch)
        case _:
            check(line.text, own_files)


def check_label(words: list[str], folder: Path, place, monkeypatch):
    """The command runs beside the page's own row and small models, up to where it would serve."""
    [item] = [json.loads(block.text) for block in blocks(ROOT / "docs" / "labeling.md", "json")]
    write_rows(folder / "items.jsonl", [item])
    write_rows(folder / "prompts.jsonl", [{"prompt": item["prompt"]}])
    (folder / "runs").mkdir()
    for name, model in (("sft", "policy"), ("dpo", "teacher"), ("reward", "reward")):
        (folder / "runs" / name).symlink_to(place[model])
    write_rows(folder / "scores.jsonl", [{"prompt": item["prompt"], "scores": [0.5, 0.25]}])
    for name, response in zip(("sft", "dpo"), item["responses"], strict=True):
        write_rows(folder / f"responses_{name}.jsonl", [{"prompt": item["prompt"], "response": response["text"]}])
    fields = {"prompt": item["prompt"], "response_1": "Yes.", "response_2": "No."}
    record = {"fields": fields, "responses": {"best": [{"value": ["response_2", "response_1"], "user_id": "u"}]}}
    (folder / "export.json").write_text(json.dumps([record]), encoding="utf-8")
    monkeypatch.chdir(folder)
    served = []
    monkeypatch.setattr("coati.label.command.serve", lambda *arguments: served.append(arguments))
    if not {"items.jsonl", "prompts.jsonl", "--from"} & set(words) or "import" in words:  # it continues
        assert coati(["label", "items.jsonl", "--labels", "labels.sqlite", "--people", "ana"]) == 0
    assert coati([*words[1:], *(["--max_new_tokens", "8"] if "--model" in words else [])]) == 0
    assert served and ("--output" not in words or Path(words[words.index("--output") + 1]).is_file())


def check_report(flags: list[str], folder: str, place, runtime):
    target = Path(place["root"]) / folder
    config_class, trainer_class = trainer_classes("sft")
    name = "".join(["for-the-report", *flags])
    settings = settings_for("sft", place, steps=1, output_dir=str(target / name))
    trainer_class(configure(config_class, **settings), runtime).train()
    assert coati(["report", *flags, str(target)]) == 0
    assert name in (target / "report.html").read_text(encoding="utf-8")


def check(command: str, own_files: dict[str, str]):
    """Reads a command with its own parser, or checks what `NOT_RUN` says of it."""
    _, words = words_of(command)
    if words[0] in NOT_RUN:
        NOT_RUN[words[0]][1](words)
    elif words[1:3] == ["-m", "pytest"]:
        names_a_test(words)
    elif words[0] in READ:
        processes, words = program(command, own_files)
        config = read_program(words)
        if is_training(command):
            config.check(processes)
    else:
        pytest.fail(f"no test knows {words[0]}: let it run, or say in NOT_RUN why it can't and what is checked instead")


@pytest.mark.parametrize("piece", IN_SENTENCES.values(), ids=str)
def test_a_command_in_a_sentence_is_one(piece, own_files, monkeypatch):
    """As in a block; a command without its arguments (`coati run`) exists, and so do a launcher's flags."""
    monkeypatch.chdir(ROOT)
    words = words_of(piece.text)[1]
    match words:
        case ["coati", name]:
            assert name in {**COMMANDS, **TOOLS, "--help": "", "doctor": ""}
        case ["colossalai", "run", *flags] if not any(word.endswith(".py") for word in flags):
            from colossalai.cli.launcher import run

            known = {name for parameter in run.params for name in parameter.opts}
            assert {word for word in flags if word.startswith("-")} <= known
        case [script, *arguments] if script.endswith(".py"):
            [path] = [path for path in (ROOT / piece.page).parent.rglob(script)]
            read_program(["python", str(path.relative_to(ROOT)), *arguments], is_whole=False)
        case _:
            check(piece.text, own_files)


@pytest.mark.parametrize(
    "command",
    [
        "make everything",
        "coati dpo --bta 0.1",
        "coati dpo --beta much",
        "coati dqo --beta 0.1",
        "coati init dqo",
        "coati run --processes 2 dpo --config dpo.yaml",
        "coati run --nproc_per_node 2 dpo --config missing.yaml",
        "coati plan ppo --gpu 8",
        "colossalai run --nproc_per_node two examples/train_rm.py --config rm.yaml",
        "colossalai run --nproc_per_node 7 examples/train_rm.py --config rm.yaml",  # batches don't divide among 7
        "torchrun --processes 8 examples/train_rm.py --config rm.yaml",
        "CONFIG=rm.yaml sbatch --node=4 examples/slurm/train_rm.sbatch",
        "SETTINGS=rm.yaml sbatch examples/slurm/train_rm.sbatch",
        "sbatch examples/slurm/train_rm.sbatch --bath_size 8",
        "sbatch examples/slurm/train_ppo.sbatch",
        "python examples/quickstart/run.py --spead 2",
        "python examples/train_dpo.py --config dpo.yaml",
        "python applications/colossal_eval/prepare.py --benchmarks mmlu --data FOLDER",
        "python tools/write_configuration.py docs/configuration.md",
        "python -m pytest tests/losses/test_nothing.py",
        "pip install 'coati[everything]'",
        "pip install -r requirements-gpu.txt",
        "source venv/bin/activate",
        "git push",
    ],
)
def test_a_wrong_command_is_found(command, own_files, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = (AssertionError, UserError, SystemExit, FileNotFoundError, UsageError, pytest.fail.Exception)
    with pytest.raises(wrong):
        check(command, own_files)


def test_no_command_stands_in_a_block_of_text():
    """Where it would not be tested."""
    lines = [Piece(b.page, line) for page in PAGES for b in blocks(page, "text") for line in b.text.splitlines()]
    assert lines and [str(line) for line in lines if program_of(line.text)] == []


def test_every_exception_is_used():
    commands = [piece.text for piece in (*LINES, *IN_SENTENCES.values())]
    first = {words_of(command)[1][0] for command in commands}
    assert sorted(set(NOT_RUN) - first) == []
    assert sorted(name for name in OWN_FILES if not any(name in command for command in commands)) == []
