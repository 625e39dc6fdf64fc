"""What staleness costs: GRPO on chain sums, sampled by a generator with the weights of some iterations ago.

python examples/arithmetic/staleness.py                                    # an hour on two CPU cores
python examples/arithmetic/staleness.py --staleness 0 2 8 --seeds 3 --write_docs     # and docs/asynchronous.md's table
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from results import interval, mean_curve  # noqa: E402
from run import TRIES, accuracy, supervise  # noqa: E402
from sums import make_data  # noqa: E402

from coati.config import as_flags  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from coati.tracking.charts import Line  # noqa: E402
from examples.drawing import figure  # noqa: E402
from examples.stages import fill_figures, table_of  # noqa: E402
from examples.stages import run as run_command  # noqa: E402

CORRECTIONS = {"token weights up to 2": "auto", "none": "none"}  # as --weights has them


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1, 2, 4, 8], help="iterations ahead")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, each with another seed")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "arithmetic", help="where everything goes")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/asynchronous.md")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        folder = output / f"seed{seed}"
        data = make_data(folder / "data", seed)
        start = supervise(folder, data, seed, processes=2)
        before = accuracy(start, data["prompts_eval"], seed, TRIES)
        for ahead in arguments.staleness:
            for correction in CORRECTIONS if ahead else ["none"]:
                learn(ahead, correction, start, before, folder, data, seed)
    table = summarize(output, arguments.staleness)
    drawn = curves(output, arguments.staleness)
    (output / "staleness.md").write_text(table + "\n")
    (output / "staleness.svg").write_text(drawn)
    print(table)
    if arguments.write_docs:
        fill_figures(ROOT / "docs" / "asynchronous.md", table, "staleness")
        (ROOT / "docs" / "staleness.svg").write_text(drawn)


def place(folder: Path, ahead: int, correction: str) -> Path:
    """The folder of one of a seed's runs."""
    return folder / f"ahead {ahead}, {correction}"


def learn(ahead: int, correction: str, start: Path, before: float, folder: Path, data: dict[str, Path], seed: int):
    """GRPO with one generator; accuracy before and after go to summary.json."""
    output = place(folder, ahead, correction)
    if (output / "summary.json").exists():
        return
    flags = {"seed": seed, "cache_dir": folder / "cache", "model": start, "output_dir": output, "resume": "auto"}
    flags |= {"train_data": data["prompts_train"], "eval_data": data["prompts_eval"]}
    flags |= {"max_staleness": ahead, "weights": CORRECTIONS[correction]}
    script = [ROOT / "examples" / "train_grpo.py", "--config", HERE / "configs" / "grpo.yaml"]
    launcher = [sys.executable, "-m", "coati.cli", "run", "--nproc_per_node", "1", "--generators", "1"]
    run_command([*launcher, *map(str, script), *as_flags(flags)])
    after = accuracy(output / "model", data["prompts_eval"], seed, TRIES)
    (output / "summary.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")


def summarize(output: Path, staleness: list[int]) -> str:
    """A row for each number of iterations ahead and each correction, over the seeds that are there."""
    columns = ["iterations ahead", "correction", "right before", "right after", "gained, 95 % interval"]
    columns += ["KL to the sampler, nats per token", "seconds per iteration, first seed", "of which waiting"]
    runs = (
        (ahead, correction, seeds_of(output, ahead, correction)) for ahead in staleness for correction in CORRECTIONS
    )
    return table_of(columns, [row(ahead, correction, folders) for ahead, correction, folders in runs if folders])


def seeds_of(output: Path, ahead: int, correction: str) -> list[Path]:
    """The folders of its finished runs."""
    return [path.parent for path in sorted(output.glob(f"seed*/{place(Path(), ahead, correction)}/summary.json"))]


def row(ahead: int, correction: str, folders: list[Path]) -> list[str]:
    found = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    cells = [str(ahead), correction]
    cells += [", ".join(f"{one[when]:.1%}" for one in found) for when in ("before", "after")]
    cells += [interval([one["after"] - one["before"] for one in found])]
    drift = [step["rollout_kl"] for folder in folders for step in iterations(folder)]
    waited = [step["seconds/wait"] / spent_on(step) for step in iterations(folders[0])]
    cells += [f"{statistics.mean(drift):.1e}", f"{seconds_per_iteration(folders):.2f}"]
    return [*cells, f"{statistics.median(waited):.0%}"]


def iterations(folder: Path) -> list[dict[str, float]]:
    return [record for record in read_metrics(folder) if "seconds/wait" in record]


def seconds_per_iteration(folders: list[Path]) -> float:
    """The median of the first seed's: others may have been run beside something."""
    return statistics.median(spent_on(step) for step in iterations(folders[0]))


def spent_on(record: dict[str, float]) -> float:
    """Seconds of the trainer's iteration: waiting for samples, log-probs, learning."""
    return record["seconds/wait"] + record["seconds/learn"] + record["seconds/evaluate"]


def curves(output: Path, staleness: list[int]) -> str:
    """Means over seeds of right answers to held-out sums, over iterations and over the time that they take."""
    by_iteration = {correction: f"right answers, correction: {correction}" for correction in CORRECTIONS}
    first, by_seconds = next(iter(CORRECTIONS)), "right answers over time, corrected"
    charts: dict[str, list[Line]] = {title: [] for title in (*by_iteration.values(), by_seconds)}
    for color, ahead in enumerate(staleness):
        for correction, title in by_iteration.items():
            folders = seeds_of(output, ahead, correction if ahead else "none")  # at 0 there is nothing to correct
            if folders:
                points = mean_curve(folders, "eval/reward")
                charts[title].append(Line(f"S = {ahead}", color, points))
                if correction == first:
                    seconds = seconds_per_iteration(folders)
                    points = [(step * seconds, right) for step, right in points]
                    charts[by_seconds].append(Line(f"S = {ahead}", color, points))
    legend = [f"S = {ahead}" for ahead in staleness]
    return figure(charts, legend, "means over the seeds", axes={by_seconds: "seconds"})


if __name__ == "__main__":
    main()
