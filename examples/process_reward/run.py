"""Sums worked out step by step: a small policy, from random weights, learns until it still makes mistakes; a process
and an outcome reward model, which start from it, learn from the same solutions and choose the best of eight responses.

python examples/process_reward/run.py                  # on one CPU process, in minutes
python examples/process_reward/run.py --seed 1 --output runs/process_reward_1
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from coati.config.generation import GenerationConfig  # noqa: E402
from coati.intervals import wilson_interval  # noqa: E402
from coati.samples import Sample  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from examples.process_reward.data import make_data  # noqa: E402
from examples.stages import table_of, train  # noqa: E402

REDUCTIONS = ("min", "product", "last")  # of the steps' probabilities
BY_OUTCOME = "outcome"
N = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "process_reward", help="where everything goes")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    data = make_data(output / "data", arguments.seed)
    common = {"seed": arguments.seed, "cache_dir": output / "cache"}
    for stage, rows in (("sft", "sft"), ("prm", "steps"), ("reward", "pairs")):
        own = {"train_data": data[rows]}
        if stage == "sft":
            own |= {"tokenizer": data["tokenizer"]}
        else:
            own |= {"eval_data": data[f"{rows}_eval"], "model": output / "sft" / "model"}
        train(stage, HERE / f"{stage}.yaml", output / stage, common | own, arguments.processes)
    figures = trained_figures(output)
    samples = scored_samples(output, data["prompts"], arguments.seed)
    figures |= best_of(samples)
    (output / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
    rows = [(name, f"{share:.3f}", f"{low:.3f} to {high:.3f}") for name, (share, low, high) in figures.items()]
    print(table_of(["", "share", "95 % interval"], rows))


def trained_figures(output: Path) -> dict[str, tuple[float, float, float]]:
    """Accuracy of both models on held-out solutions, with its interval."""
    names = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
    found = {}
    for stage, what in (("prm", "steps told right from wrong"), ("reward", "pairs told right from wrong")):
        [*_, last] = [row for row in read_metrics(output / stage) if names[0] in row]
        found[what] = tuple(last[name] for name in names)
    share, number = first_errors_found(output)
    return found | {"first wrong step found (of solutions with one)": (share, *wilson_interval(share, number))}


def first_errors_found(output: Path) -> tuple[float, int]:
    """In how many of the solutions with a wrong step the first is found, and how many there are."""
    [*_, last] = [row for row in read_metrics(output / "prm") if "eval/erroneous_accuracy" in row]
    rows = (output / "data" / "steps_eval.jsonl").read_text().splitlines()
    return last["eval/erroneous_accuracy"], sum(0 in json.loads(row)["labels"] for row in rows)


def scored_samples(output: Path, prompts: Path, seed: int) -> list[list[Sample]]:
    """N responses to each prompt, scored by the models and by the right answer."""
    import torch
    from transformers import AutoTokenizer

    from coati.models import Actor
    from coati.rewards.config import (
        FunctionRewardSettings,
        ModelRewardSettings,
        ProcessRewardSettings,
        ScoringConfig,
        load_rewards,
    )
    from coati.rewards.process import load_here
    from coati.rollout import PolicyGenerator, Prompt, ResponseSampler, ScoredGeneration
    from coati.rollout.prompts import eos_ids

    torch.manual_seed(seed)
    actor, tokenizer = (
        Actor(str(output / "sft" / "model")).eval(),
        AutoTokenizer.from_pretrained(output / "sft" / "model"),
    )

    def load_model(path: str, process=None):
        return load_here(path, process, tokenizer, torch.device("cpu"), lambda lengths: [[*range(len(lengths))]])

    prm = str(output / "prm" / "model")
    rewards = [ProcessRewardSettings(path=prm, reduce=reduce, name=reduce) for reduce in REDUCTIONS]
    rewards += [ModelRewardSettings(path=str(output / "reward" / "model"), name=BY_OUTCOME)]
    rewards += [FunctionRewardSettings(path=f"{HERE}/data.py:correct")]
    scorer = load_rewards(rewards, ScoringConfig(reward_workers=0), load_model)
    generator = PolicyGenerator(lambda: nullcontext(actor), tokenizer, tokenizer.pad_token_id, 256)
    generation = ScoredGeneration(ResponseSampler(generator, tokenizer, eos_ids(tokenizer, actor)), scorer)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    ids = tokenizer([row["prompt"] for row in rows], add_special_tokens=False)["input_ids"]
    requests = [
        Prompt(i, [seed, i, k], ids[i], row["prompt"], {"answer": row["answer"]})
        for i, row in enumerate(rows)
        for k in range(N)
    ]
    samples = generation.sample(requests, GenerationConfig(max_new_tokens=40)).samples
    return [samples[i : i + N] for i in range(0, len(samples), N)]


def best_of(groups: list[list[Sample]]) -> dict[str, tuple[float, float, float]]:
    """The share of prompts whose chosen response is right, with its interval: drawn at random, chosen by each model,
    and chosen by the right answer."""
    right = {"one response": [group[0].rewards["correct"] for group in groups]}
    for name in (*REDUCTIONS, BY_OUTCOME, "correct"):
        best = [max(group, key=lambda sample: sample.rewards[name]) for group in groups]
        what = {BY_OUTCOME: "the outcome reward model", "correct": "the right answer"}.get(name, f"steps, {name}")
        right[f"best of {N} by {what}"] = [sample.rewards["correct"] for sample in best]
    shares = {name: sum(values) / len(values) for name, values in right.items()}
    return {name: (share, *wilson_interval(share, len(groups))) for name, share in shares.items()}


if __name__ == "__main__":
    main()
