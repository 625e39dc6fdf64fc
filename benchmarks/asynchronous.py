"""GRPO with generators beside GRPO without, on the same cores: samples a second, and what each side waited for.

    python benchmarks/asynchronous.py            # half an hour on two idle cores; one JSON line
    python benchmarks/asynchronous.py --save     # and writes results/asynchronous.json and docs/asynchronous.md's table

`responses`: a random Llama of 5.8 M parameters writes responses of very different lengths (geometric, 58 tokens in the
mean, 256 at most). `long`: one of 0.4 M parameters writes 170 in the mean and 1,024 at most, so that an iteration waits
for few. `tools`: the same plays episodes of six turns, with an environment that takes 100 ms per turn. The first two
iterations of each run are not counted, nor are the last ones of runs that are ahead, which have nothing left to sample.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine, store  # noqa: E402
from benchmarks.world import PLAIN, REWARD, words, write_models, write_rows  # noqa: E402
from coati.config import as_flags  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from examples.stages import environment, fill_figures, table_of  # noqa: E402

LARGE = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4, vocab_size=2048)
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=1024)
SMALL |= dict(max_position_embeddings=2048)
RESPONSES = 64
WARM_UP = 2  # iterations

# An episode of six turns; the tool takes its time
TOOL = """import asyncio

from coati.rollout import Observation


class Tool:
    def reset(self, row):
        self.turns = 0
        return row["prompt"]

    async def step(self, message):
        self.turns += 1
        await asyncio.sleep(0.1)
        return Observation("w1 w2", reward=float(len(message["content"]) % 7), done=self.turns == 6)
"""


@dataclass(frozen=True)
class Way:
    """How a run is started: processes that train and that generate, threads of each, iterations ahead, and whether
    responses are drawn in parts."""

    processes: int
    generators: int
    threads: int
    ahead: int = 0
    in_parts: bool = False


WAYS = {
    "synchronous, 1 process of 2 threads": Way(1, 0, 2),
    "synchronous, 2 processes": Way(2, 0, 1),
    "1 generator, 1 ahead": Way(1, 1, 1, 1),
}
LONG_WAYS = {
    "1 generator, 4 ahead": Way(1, 1, 1, 4),
    "1 generator, 4 ahead, in parts": Way(1, 1, 1, 4, in_parts=True),
    "2 generators, 4 ahead": Way(1, 2, 1, 4),
}
TOOL_WAYS = {"4 generators, 4 ahead": Way(1, 4, 1, 4)}


@dataclass(frozen=True)
class Task:
    """What is sampled: by a policy of which size, how many words of its vocabulary end a response, its longest one in
    tokens, and the ways to do it."""

    size: dict
    ends: int
    longest: int
    ways: dict[str, Way]


TASKS = {
    "responses": Task(LARGE, ends=35, longest=256, ways=WAYS),
    "long": Task(SMALL, ends=6, longest=1024, ways=WAYS | LONG_WAYS),
    # a response that is cut would end its episode
    "tools": Task(SMALL, ends=400, longest=16, ways=WAYS | TOOL_WAYS),
}


def settings_of(task: str, folder: Path) -> dict:
    common = dict(
        model=folder / "policy",
        train_data=folder / "rows.jsonl",
        batch_size=RESPONSES // 8,
        group_size=8,
        micro_batch_size=16,
        precision="fp32",
        learning_rate=1e-5,
        eval_every=0,
        save_every=0,
        max_new_tokens=TASKS[task].longest,
        progress="off",
    )
    if task == "tools":
        return common | dict(environment=f"{folder}/tool.py:Tool", max_turns=6, max_tokens=256)
    return common | dict(rewards=[dict(type="function", path=f"{folder}/reward.py:reward")])


def write_world(task: str, folder: Path):
    """The policy, its prompts, what rewards it and what it talks to."""
    from transformers import GenerationConfig

    write_models(folder, TASKS[task].size, PLAIN)
    first = 4  # the tokens before it are special
    ends = list(range(first, first + TASKS[task].ends))
    GenerationConfig(eos_token_id=ends).save_pretrained(folder / "policy")
    write_rows(folder / "rows.jsonl", ({"prompt": words(i, 32)} for i in range(2000)))
    (folder / "reward.py").write_text(REWARD)
    (folder / "tool.py").write_text(TOOL)


def measure(task: str, way: Way, folder: Path, output: Path, iterations: int) -> dict:
    """Samples a second, and the median seconds of an iteration's parts."""
    settings = settings_of(task, folder) | dict(output_dir=output, steps=iterations)
    settings |= dict(max_staleness=way.ahead, partial_rollouts=way.in_parts)
    command = [sys.executable, "-m", "coati.cli", "run", "--nproc_per_node", str(way.processes)]
    command += ["--generators", str(way.generators), str(ROOT / "examples/train_grpo.py"), *as_flags(settings)]
    variables = environment() | {"OMP_NUM_THREADS": str(way.threads)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task}: {done.stderr[-3000:]}")
    rows = read_metrics(output)
    counted = rows[WARM_UP : len(rows) - way.ahead]
    seconds = counted[-1]["time"] - rows[WARM_UP - 1]["time"]
    parts = {name for name in counted[0] if name.startswith("seconds/")} | {"response_length"}
    return {"samples_per_second": len(counted) * RESPONSES / seconds} | {
        name: statistics.median(row[name] for row in counted) for name in sorted(parts)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/asynchronous.json")
    options = parser.parse_args()
    result: dict = {"machine": machine(2), "iterations": options.iterations, "rounds": options.rounds}
    for task in options.tasks:
        ways = TASKS[task].ways
        runs: dict[str, list[dict]] = {name: [] for name in ways}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "world"
            write_world(task, folder)
            for i in range(options.rounds):
                for way in ways:
                    runs[way].append(measure(task, ways[way], folder, folder / f"{way} {i}", options.iterations))
        result[task] = {way: of_rounds(found) for way, found in runs.items()}
        best = max(found["samples_per_second"] for way, found in result[task].items() if way.startswith("synchronous"))
        for found in result[task].values():
            found["ratio"] = found["samples_per_second"] / best
    print(json.dumps(result))
    if options.save:
        store(result, "asynchronous", "run")
        fill_figures(ROOT / "docs" / "asynchronous.md", table(result), "asynchronous")


def table(result: dict) -> str:
    """A row for each way of each task."""
    columns = ("task", "way", "samples a second (spread)", "to the best without", "s generating", "waiting", "learning")
    rows = []
    for task in (task for task in TASKS if task in result):
        for way, found in result[task].items():
            low, high = found["spread"]
            seconds = [found.get(f"seconds/{name}") for name in ("generate", "wait", "learn")]
            cells = [task, way, f"{found['samples_per_second']:.1f} ({low:.1f} to {high:.1f})", f"{found['ratio']:.2f}"]
            cells += ["" if value is None else f"{value:.2f}" for value in seconds]
            rows.append(cells)
    return table_of(columns, rows)


def of_rounds(found: list[dict]) -> dict:
    """Medians over rounds, with the least and the greatest rate."""
    rates = [one["samples_per_second"] for one in found]
    return {name: statistics.median(one[name] for one in found) for name in found[0]} | {
        "spread": [min(rates), max(rates)]
    }


if __name__ == "__main__":
    main()
