"""What a documented command would do: its words are read by the program's own parser, and nothing is run after that."""

import argparse
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import coati.config.parse
from coati.commands import COMMANDS
from coati.config import parse_config
from tests.conftest import ROOT


class Parsed(BaseException):
    """A program has read its command line; the first argument is what it read."""


def read(program: Callable, *arguments, is_whole: bool = True) -> Any:
    """What a program reads from its command line, by argparse or as settings of coati. Paths need not exist.

    Args:
        is_whole: whether the arguments that the program requires must be there.

    Raises:
        UserError, SystemExit: it doesn't take these words.
    """
    parse_args, parse_settings = argparse.ArgumentParser.parse_args, coati.config.parse.parse_settings

    def read_arguments(parser, *args):
        for action in parser._actions:
            action.required = action.required and is_whole
        raise Parsed(parse_args(parser, *args))

    def read_settings(*args, **how):
        raise Parsed(parse_settings(*args, **how))

    def start(config_class, load_trainer, description, parse=parse_config, **how):
        raise Parsed(parse(config_class, description=description, **how))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("argparse.ArgumentParser.parse_args", read_arguments)
        patch.setattr("coati.config.parse.parse_settings", read_settings)
        for module in ("coati.trainers.main", "coati.commands"):
            patch.setattr(f"{module}.main", start)
        patch.setattr("coati.trainers.paths.named_paths", lambda config: [])
        try:
            program(*arguments)
        except Parsed as parsed:
            return parsed.args[0]
    pytest.fail("the program reads nothing from its command line")


def read_program(words: Sequence[str], is_whole: bool = True) -> Any:
    """What `coati ...` or `python SCRIPT ...` reads, as `read`; of a script without a parser, its arguments."""
    from coati.cli import main

    program, *rest = words
    if program == "coati":
        return read(main, rest, is_whole=is_whole)
    script, *arguments = rest
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    text = path.read_text(encoding="utf-8")
    if not re.search(r"ArgumentParser|parse_config|import (main|train)\b", text):
        taken = max([0, *map(int, re.findall(r"sys\.argv\[(\d+)\]", text))])
        assert len(arguments) <= taken, f"{script} takes {taken} arguments"
        return arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        return read(lambda: runpy.run_path(str(path), run_name="__main__"), is_whole=is_whole)


def launched(words: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes a launcher starts, by its own parser, and the words of the program that they run."""
    match words:
        case ["coati", "run", *_]:
            options = read_program(words)
            processes, program = options.nproc_per_node, options.command
        case ["colossalai", "run", *rest]:
            from colossalai.cli.launcher import run

            found = run.make_context("colossalai run", list(rest)).params
            processes, program = found["nproc_per_node"], [found["user_script"], *found["user_args"]]
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(rest)
            processes = int(options.nnodes.partition(":")[0]) * int(options.nproc_per_node)
            program = [options.training_script, *options.training_script_args]
        case _:
            return 1, list(words)
    return processes, ["coati" if program[0] in COMMANDS else "python", *program]


def job(variables: dict[str, str], words: Sequence[str]) -> list[str]:
    """The words of the training script that a job of examples/slurm runs."""
    at = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    text = (ROOT / words[at]).read_text(encoding="utf-8")
    every = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "slurm").glob("*.sbatch"))
    used = set(re.findall(r"^#+SBATCH (--[\w-]+)", every, re.MULTILINE))
    assert {word.partition("=")[0] for word in words[1:at]} <= used, "no job sets this option"
    assert all("${" + name in text for name in variables), "the job reads no such variable"
    [script] = re.findall(r"examples/train_\w+\.py", text)
    [config] = [variables["CONFIG"]] if "CONFIG" in variables else re.findall(r"\$\{CONFIG:-(.+?)\}", text)
    return ["python", script, "--config", config, *words[at + 1 :]]


def check_target(words: Sequence[str]):
    """make's targets exist, and what they need can be made."""
    done = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
