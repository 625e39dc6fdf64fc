"""How the multi-stage examples start their stages: each is one of the example scripts under `colossalai run`."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from coati.config import as_flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"sft": "train_sft.py", "reward": "train_rm.py", "preference": "train_preference.py"}
SCRIPTS |= {"prm": "train_prm.py", "ppo": "train_ppo.py", "grpo": "train_grpo.py", "distill": "train_distill.py"}


def train(algorithm: str, config: Path, output: Path, flags: dict[str, object], processes: int):
    """Runs one stage to its end (going on from its newest checkpoint, if there is one) or exits with a message."""
    if (output / "model").is_dir():
        print(f"{output} is finished already", flush=True)
        return
    words = as_flags({"output_dir": output, "resume": "auto", **flags})
    train_script(ROOT / "examples" / SCRIPTS[algorithm], ["--config", str(config), *words], processes)
    if not (output / "model").is_dir():
        sys.exit(f"error: the stage in {output} did not finish; its output is above")


def train_script(script: Path, words: list[str], processes: int):
    """Starts a training script on processes of this machine."""
    launcher = [str(Path(sys.executable).parent / "colossalai"), "run", "--nproc_per_node", str(processes)]
    launcher += ["--master_port", str(free_port())]
    # colossalai run hands its arguments to a shell once more
    run([*launcher, str(script), *map(shlex.quote, words)])


def table_of(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([header, "|---" * len(columns) + "|", *lines])


def fill_figures(page: Path, table: str, mark: str = "figures"):
    """Puts a table in place of what stands between a page's marks."""
    marked = f"<!-- {mark} -->\n\n{table}\n\n<!-- end of {mark} -->"
    pattern = rf"<!-- {mark} -->(.*?<!-- end of {mark} -->)?"
    page.write_text(re.sub(pattern, lambda _: marked, page.read_text(), count=1, flags=re.S))


def free_port() -> int:
    """A port that nobody listens on, so that several runs fit on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    """What a stage's processes find: this interpreter's commands, this repository, and one thread each."""
    found = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    found["PYTHONPATH"] = f"{ROOT}{os.pathsep}{found.get('PYTHONPATH', '')}"
    return found


def run(command: list[str]):
    """Runs a command in the repository's root and exits with its status if it fails. A SIGTERM is for the command,
    which may save what it has; Ctrl-C reaches it by itself."""
    print("$", " ".join([Path(command[0]).name, *command[1:]]), flush=True)
    process, has_come = None, False

    def hand_on(*_):
        nonlocal has_come
        has_come = True
        if process is not None:
            process.terminate()

    before = [
        (signal.SIGTERM, signal.signal(signal.SIGTERM, hand_on)),
        (signal.SIGINT, signal.signal(signal.SIGINT, lambda *_: None)),
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=environment())
    if has_come:  # while the process was being made
        process.terminate()
    status = process.wait()
    for number, handler in before:
        signal.signal(number, handler)
    if status:
        sys.exit(status)
