"""Ours and a peer on the same work in turns: A B A B.

Each contender is a process of its own, which waits while the others work, so that peak memory is its own and no one
warms another's caches. A contender's script calls `serve`; the benchmark calls `contest`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Contender:
    """A process that does the work.

    Attributes:
        command: starts it; it gets the settings as JSON in its last argument.
        settings: what `serve` hands on.
        threads: of each of its processes, if not those of the contest.
    """

    name: str
    command: list[str]
    settings: dict = field(default_factory=dict)
    threads: int | None = None


def serve(prepare: Callable[[dict], Callable[[], int]]):
    """In a contender's process: does the work whenever a line comes, and says how long it took.

    Args:
        prepare: from the settings to a function that does the work once and returns how much it was (tokens, samples),
            or a dictionary with `amount`, and `seconds` and `cpu` where not all of its time counts, and `parts`, the
            seconds of each.
    """
    work = prepare(json.loads(sys.argv[-1]))
    baseline = peak_memory()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        cpu, started = time.process_time(), time.perf_counter()
        done = work()
        turn = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
        turn |= done if isinstance(done, dict) else {"amount": done}
        print(json.dumps(turn | {"peak_mib": peak_memory() - baseline}), flush=True)


def peak_memory() -> float:
    """MiB that this process has had at most: of the GPU where there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    # not getrusage: its ru_maxrss begins with what the parent had at the fork
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def contest(contenders: list[Contender], *, rounds: int, threads: int) -> dict[str, dict]:
    """By contender: the rates (amount a second) of `rounds` turns after one to warm up, median and spread, CPU seconds
    of a turn, peak memory in MiB beyond what its model took before the first turn, and the seconds of its parts."""
    workers = {}
    for c in contenders:
        environment = dict(os.environ, OMP_NUM_THREADS=str(c.threads or threads), TOKENIZERS_PARALLELISM="false")
        command = [*c.command, json.dumps(c.settings)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        workers[c.name] = subprocess.Popen(command, env=environment, **pipes)
    try:
        for worker in workers.values():
            _answer(worker)
        turns: dict[str, list[dict]] = {name: [] for name in workers}
        for _ in range(rounds + 1):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                turns[name].append(_answer(worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return {name: _summary(found[1:]) for name, found in turns.items()}


def _answer(worker: subprocess.Popen) -> dict:
    for line in worker.stdout:
        if line.startswith('{"'):  # libraries print what they like
            return json.loads(line)
    raise RuntimeError(f"{' '.join(worker.args[:-1])} ended: run it by hand to see why, with {worker.args[-1]!r}")


def _summary(turns: list[dict]) -> dict:
    rates = [turn["amount"] / turn["seconds"] for turn in turns]
    return {
        "rate": statistics.median(rates),
        "rates": rates,
        "lowest": min(rates),
        "highest": max(rates),
        "cpu_seconds": statistics.median(turn["cpu"] for turn in turns),
        "peak_mib": max(turn["peak_mib"] for turn in turns),
        "parts": {name: statistics.median(turn["parts"][name] for turn in turns) for name in turns[0].get("parts", {})},
    }


def ratio(ours: dict, other: dict) -> float:
    """Median of what ours was quicker by in each turn: a machine that is slow for a while is slow for both."""
    return statistics.median(a / b for a, b in zip(ours["rates"], other["rates"], strict=True))


def machine(threads: int) -> dict[str, str | int]:
    """Where and with what a result was measured."""
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "?: ?")
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {
        "cpu": model.split(": ")[1],
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
    } | packages


def store(result: dict, name: str, part: str):
    """Writes a result to benchmarks/results under a name, as far as it has come: called after every case, so that
    nothing measured is lost. What the file has beside it in `part` and was measured in the same way stays."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if {k: v for k, v in before.items() if k != part} == {k: v for k, v in result.items() if k != part}:
        result = result | {part: before[part] | result[part]}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
