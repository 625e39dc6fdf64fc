"""A model that learns to judge: from random weights it learns sums, then from judged ones how judging is written, for
shorter and for longer, then by GRPO from verdicts alone; a discriminative model learns from the same verdicts.

python examples/judge/run.py                  # on one CPU process, about half an hour
python examples/judge/run.py --seed 1 --output runs/judge_1
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from coati.intervals import wilson_interval  # noqa: E402
from coati.rewards.config import RegexRewardSettings  # noqa: E402
from coati.samples import Sample  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from examples.judge.data import KINDS, SIZES, VERDICT, make_data  # noqa: E402
from examples.process_reward.run import Share, cell, scored_samples, share_of  # noqa: E402
from examples.stages import table_of, train  # noqa: E402

N = 3  # verdicts on each response
LONGER = 600  # steps of SFT of a second judge, on the same judged sums
SHORTER = {"steps": 60, "warmup": 0.1}  # its GRPO, which has less to learn; as many steps of warmup
JUDGES = {"SFT": "sft", "SFT, then GRPO": "grpo"}
JUDGES |= {f"SFT for {LONGER} steps": "sft_longer", f"SFT for {LONGER} steps, then GRPO": "grpo_longer"}
# what is told of a judge
ONE, MAJORITY, JUDGMENT = "one verdict", f"majority of {N} verdicts", "all marks right too"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "judge", help="where everything goes")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine")
    arguments = parser.parse_args()
    walk(arguments.output.resolve(), arguments.seed, arguments.processes)


def walk(output: Path, seed: int, processes: int, sizes: dict[str, int] = SIZES, **flags: object):
    """All stages, and their figures on held-out responses, in summary.json too.

    Args:
        sizes: how many sums each file of data has.
        flags: of every stage, instead of what its config has.
    """
    data = make_data(output / "data", seed, sizes)
    common = {"seed": seed, "cache_dir": output / "cache"} | flags
    own = {"train_data": data["solved"], "tokenizer": data["tokenizer"]}
    train("sft", HERE / "sft_start.yaml", output / "start", own | common, processes)
    own = {"train_data": data["marked"], "model": output / "start" / "model"}
    train("sft", HERE / "sft.yaml", output / "sft", own | common, processes)
    train("sft", HERE / "sft.yaml", output / "sft_longer", own | {"steps": LONGER} | common, processes)
    own = {"train_data": data["verdicts"], "eval_data": data["validation"]}
    train("grpo", HERE / "grpo.yaml", output / "grpo", own | {"model": output / "sft" / "model"} | common, processes)
    own |= {"model": output / "sft_longer" / "model"} | SHORTER
    train("grpo", HERE / "grpo.yaml", output / "grpo_longer", own | common, processes)
    own = {"train_data": data["verdicts_outcome"], "eval_data": data["held_out_outcome"]}
    own["model"] = output / "sft" / "model"
    train("prm", HERE / "prm.yaml", output / "prm", own | common, processes)
    rows = [json.loads(line) for line in data["held_out"].read_text().splitlines()]
    groups = {name: judgments(output / run, data["held_out"], seed) for name, run in JUDGES.items()}
    figures = {name: figures_of(some, rows) for name, some in groups.items()}
    figures["the discriminative model"] = {ONE: discriminative_accuracy(output / "prm")}
    kinds = {name: accuracy_by_kind(some, rows) for name, some in groups.items()}
    (output / "summary.json").write_text(json.dumps({"figures": figures, "kinds": kinds}, indent=2) + "\n")
    print(report(figures, kinds))


def judgments(run: Path, prompts: Path, seed: int) -> list[list[Sample]]:
    """N judgments of each prompt, with the reward `verdict`: 1 for the right one."""
    return scored_samples(run, prompts, N, seed, [RegexRewardSettings(pattern=VERDICT, name="verdict")])


def figures_of(groups: list[list[Sample]], rows: list[dict[str, str]]) -> dict[str, Share]:
    """How often the first verdict is right, how often more than half of all are, and how often the first judgment is
    right in every mark.

    Args:
        rows: of the prompts, with the right judgment as `completion`.
    """
    firsts = [group[0] for group in groups]
    voted = [float(sum(verdicts(group)) > len(group) / 2) for group in groups]
    exact = [float(first.response == row["completion"]) for first, row in zip(firsts, rows, strict=True)]
    return {ONE: share_of(verdicts(firsts)), MAJORITY: share_of(voted), JUDGMENT: share_of(exact)}


def verdicts(samples: list[Sample]) -> list[float]:
    """1 for each right verdict, else 0."""
    return [sample.rewards["verdict"] for sample in samples]


def accuracy_by_kind(groups: list[list[Sample]], rows: list[dict[str, str]]) -> dict[str, float]:
    """The share of right verdicts, of all N per prompt, by the kind of mistake in what is judged."""
    found: dict[str, list[float]] = {kind: [] for kind in ("none", *KINDS)}
    for group, row in zip(groups, rows, strict=True):
        found[row["mistake"]] += verdicts(group)
    return {kind: sum(right) / len(right) for kind, right in found.items()}


def discriminative_accuracy(run: Path) -> Share:
    """Of the last evaluation, with its interval."""
    [*_, last] = [row for row in read_metrics(run) if "eval/accuracy" in row]
    return last["eval/accuracy"], *wilson_interval(last["eval/accuracy"], last["eval/steps"])


def report(figures: dict[str, dict[str, Share]], kinds: dict[str, dict[str, float]]) -> str:
    """Both tables."""
    columns = (ONE, MAJORITY, JUDGMENT)
    shares = [
        (name, *(cell(found[column]) if column in found else "" for column in columns))
        for name, found in figures.items()
    ]
    by_kind = [(name, *(f"{share:.2f}" for share in found.values())) for name, found in kinds.items()]
    return "\n\n".join([table_of(["", *columns], shares), table_of(["", "none", *KINDS], by_kind)])


if __name__ == "__main__":
    main()
