"""A real instruction-tuned model of 135 M parameters through the pipeline, on two CPU processes.

    python examples/smollm2/run.py                                   # model, SFT, GRPO on sums
    python examples/smollm2/run.py --stages dpo kto --data ../shared/data           # on HH-RLHF
    python examples/smollm2/run.py --stages reward ppo_hh --data ../shared/data     # and PPO on the reward model
    python examples/smollm2/run.py --stages grpo_reversals                          # a task of reasoning-gym
    python examples/smollm2/run.py --stages sft_full grpo_full                      # all weights, no adapters
    python examples/smollm2/run.py --stages grpo rloo ppo --seed 1 --write_docs     # and docs/results.md

A stage that is finished is not run again. Each has its settings beside this file and writes summary.json with what was
measured before and after.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from coati.config import read_yaml  # noqa: E402
from coati.errors import UserError  # noqa: E402
from coati.files import write_json  # noqa: E402
from coati.tracking import write_report  # noqa: E402
from examples.smollm2.check import (  # noqa: E402
    Share,
    bag_of_words_accuracy,
    check_constraints,
    check_reversals,
    check_sums,
    likelihood_accuracy,
)
from examples.smollm2.model import make_model  # noqa: E402
from examples.smollm2.results import summarize  # noqa: E402
from examples.smollm2.tasks import make_constraints, make_reversals, make_sums  # noqa: E402
from examples.stages import train  # noqa: E402

SFTS = ("sft", "sft_full")  # the others on sums start from "sft"
ON_SUMS = {"grpo": "grpo", "grpo_full": "grpo", "rloo": "grpo", "ppo": "ppo"}  # and the script of examples/stages.py
ON_REVERSALS = ("reversal_sft", "grpo_reversals")
ON_PAIRS = {"reward": "reward"} | dict.fromkeys(("dpo", "kto", "orpo", "simpo"), "preference")
ON_SCORES = "ppo_hh"  # of the reward stage
STAGES = (*SFTS, *ON_SUMS, "distill", "grpo_constraints", *ON_REVERSALS, *ON_PAIRS, ON_SCORES)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["sft", "grpo"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds hh_rlhf/*.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/results.md too")
    arguments = parser.parse_args()
    output, pairs = arguments.output.resolve(), arguments.data.resolve() / "hh_rlhf"
    if {*arguments.stages} & {*ON_PAIRS, ON_SCORES} and not pairs.is_dir():
        sys.exit(f"error: {arguments.data} has no folder hh_rlhf: name the folder that has it with --data")
    if {*arguments.stages} & {*ON_PAIRS} and not find_spec("sklearn"):
        sys.exit("error: the bag of words that stands beside the pairs needs scikit-learn: pip install scikit-learn")
    if {*arguments.stages} & {*ON_REVERSALS} and not find_spec("reasoning_gym"):
        sys.exit("error: lists to reverse are a task of reasoning-gym: pip install 'coati[verify]'")
    try:
        model = make_model(output / "model")
    except UserError as error:
        sys.exit(f"error: {error}")
    run_stages(arguments.stages, model, output / f"seed{arguments.seed}", pairs, arguments.seed, arguments.processes)
    summarize(output, write_docs=arguments.write_docs)
    print(f"open {write_report([output], output / 'report.html')}")


def run_stages(stages: list[str], model: Path, folder: Path, pairs: Path, seed: int, processes: int):
    """Trains each stage that is not finished, and measures what it changed."""
    common = {"seed": seed, "cache_dir": folder / "cache"}
    sums, constraints = make_sums(folder / "data", seed), make_constraints(folder / "data", seed)

    def stage(name: str, script: str, start: Path | None, train_data: Path, eval_data: Path, **flags):
        """Trains, and writes what was measured before and after to summary.json.

        Args:
            start: None for random weights; flags: further settings.
        """
        summary = folder / name / "summary.json"
        if summary.exists():
            print(f"{folder / name} is finished already", flush=True)
            return
        data = {"train_data": train_data, "eval_data": eval_data} | flags
        if start is not None:
            data["model"] = start
        train(script, HERE / f"{name}.yaml", folder / name, common | data, processes)
        checked = {"before": start, "after": folder / name / "model"}
        write_json(
            summary, {when: measure(name, path, model, folder / "data", pairs) for when, path in checked.items()}
        )

    if {"sft", "distill", *ON_SUMS} & set(stages):
        stage("sft", "sft", model, sums["sft"], sums["sft_eval"])
    if {*ON_REVERSALS} & set(stages):
        lists = make_reversals(folder / "data", seed)
        stage("reversal_sft", "sft", model, lists["reversal_sft"], lists["reversal_sft"])
    for name in stages:
        if name == "grpo_reversals":
            stage(name, "grpo", folder / "reversal_sft" / "model", lists["reversals"], lists["reversals_eval"])
        if name == "sft_full":
            stage(name, "sft", model, sums["sft"], sums["sft_eval"])
        if name in ON_SUMS:
            stage(name, ON_SUMS[name], folder / "sft" / "model", sums["prompts"], sums["prompts_eval"])
        if name == "distill":
            models = dict(teacher=folder / "sft" / "model", tokenizer=model)
            stage(name, "distill", None, sums["sft"], sums["sft_eval"], **models)
        if name == "grpo_constraints":
            stage(name, "grpo", model, constraints["constraints"], constraints["constraints_eval"])
        if name in ON_PAIRS:
            stage(name, ON_PAIRS[name], model, pairs / "train.jsonl", pairs / "test.jsonl")
        if name == ON_SCORES:
            rewards = read_yaml(HERE / f"{name}.yaml")["rewards"]
            rewards[0]["path"] = str(folder / "reward" / "model")
            stage(name, "ppo", model, pairs / "train.jsonl", pairs / "test.jsonl", rewards=rewards)


def measure(name: str, checked: Path | None, model: Path, data: Path, pairs: Path) -> dict[str, list]:
    """What a stage's own metrics don't tell, of a model before or after it: shares as [count, n]."""
    if checked is None:  # a student begins with random weights
        return {}
    if name in (*SFTS, *ON_SUMS, "distill", *ON_REVERSALS):
        found, told = (check_reversals if name in ON_REVERSALS else check_sums)(checked, data)
        return counts_of(found) | {"samples": told}
    if name == "grpo_constraints":
        found, fluency, responses = check_constraints(checked, model, data / "constraints_eval.jsonl")
        return counts_of(found) | {"log-prob per token": [fluency], "samples": responses[:6]}
    if checked != model or name == ON_SCORES:  # what the run itself has logged tells more
        return {}
    longest = read_yaml(HERE / f"{name}.yaml")["data"]["max_length"]
    likely = likelihood_accuracy(model, pairs / "test.jsonl", longest)
    words = bag_of_words_accuracy(pairs / "train.jsonl", pairs / "test.jsonl", model, longest)
    return counts_of(
        {"chosen response more probable under the model itself": likely, "told apart by a bag of words": words}
    )


def counts_of(shares: dict[str, Share]) -> dict[str, list[float]]:
    """Shares as summary.json has them."""
    return {what: [share.count, share.n] for what, share in shares.items()}


if __name__ == "__main__":
    main()
