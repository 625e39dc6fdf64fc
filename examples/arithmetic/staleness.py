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

from results import interval  # noqa: E402
from run import TRIES, accuracy, supervise  # noqa: E402
from sums import make_data  # noqa: E402

from coati.config import as_flags  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
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
    (output / "staleness.md").write_text(table + "\n")
    print(table)
    if arguments.write_docs:
        fill_figures(ROOT / "docs" / "asynchronous.md", table, "staleness")


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
    columns += ["KL to the sampler, nats per token", "seconds per iteration", "of which waiting"]
    rows = []
    for ahead in staleness:
        for correction in CORRECTIONS:
            found = sorted(output.glob(f"seed*/{place(Path(), ahead, correction)}/summary.json"))
            if found:
                rows.append(row(ahead, correction, [path.parent for path in found]))
    return table_of(columns, rows)


def row(ahead: int, correction: str, folders: list[Path]) -> list[str]:
    found = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    cells = [str(ahead), correction]
    cells += [", ".join(f"{one[when]:.1%}" for one in found) for when in ("before", "after")]
    steps = [record for folder in folders for record in read_metrics(folder) if "seconds/wait" in record]
    spent = [record["seconds/wait"] + record["seconds/learn"] + record["seconds/evaluate"] for record in steps]
    waited = statistics.mean(record["seconds/wait"] for record in steps) / statistics.mean(spent)
    cells += [interval([one["after"] - one["before"] for one in found])]
    cells += [f"{statistics.mean(record['rollout_kl'] for record in steps):.1e}"]
    return [*cells, f"{statistics.median(spent):.2f}", f"{waited:.0%}"]


if __name__ == "__main__":
    main()
