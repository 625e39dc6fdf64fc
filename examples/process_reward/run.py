"""Sums worked out step by step: a small policy, from random weights, learns for so short that it makes mistakes; a
process and an outcome reward model, which start from one that has learned for longer, learn from the same solutions and
choose the best of eight responses of the policy; PPO trains it on the rewards of its steps.

python examples/process_reward/run.py                  # on one CPU process, half an hour
python examples/process_reward/run.py --seed 1 --output runs/process_reward_1
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from coati.config.generation import GenerationConfig  # noqa: E402
from coati.intervals import wilson_interval  # noqa: E402
from coati.rewards.config import (  # noqa: E402
    FunctionRewardSettings,
    ModelRewardSettings,
    ProcessRewardSettings,
    RewardSettings,
    ScoringConfig,
    load_rewards,
)
from coati.samples import Sample  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from examples.process_reward.data import correct, flawless, make_data  # noqa: E402
from examples.stages import table_of, train  # noqa: E402

REDUCTIONS = ("min", "product", "last")  # of the steps' probabilities
BY_STEPS, BY_OUTCOME = "min", "outcome"  # whose choices are compared prompt by prompt
MEASURES = {"right answer": correct, "every step right": flawless}
SAMPLING = GenerationConfig(max_new_tokens=40)
N = 8
LONGER = 1000  # steps of SFT of what the reward models start from
BEAMS, EXPANSIONS = 4, 2  # as many first steps as responses of best-of-n

Share = tuple[float, float, float]  # with its interval


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "process_reward", help="where everything goes")
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    data = make_data(output / "data", arguments.seed)
    common = {"seed": arguments.seed, "cache_dir": output / "cache"}
    own = {"train_data": data["sft"], "tokenizer": data["tokenizer"]}
    train("sft", HERE / "sft.yaml", output / "sft", common | own, arguments.processes)
    train("sft", HERE / "sft.yaml", output / "start", common | own | {"steps": LONGER}, arguments.processes)
    for stage, rows in (("prm", "steps"), ("reward", "pairs")):
        own = {"train_data": data[rows], "eval_data": data[f"{rows}_eval"], "model": output / "start" / "model"}
        train(stage, HERE / f"{stage}.yaml", output / stage, common | own, arguments.processes)
    models = trained_figures(output)
    print(table_of(["", "share (95 % interval)"], [(name, cell(share)) for name, share in models.items()]), flush=True)
    groups = scored_samples(output / "sft", data["prompts"], N, arguments.seed, choosers(output))
    figures = best_of(groups)
    compared = [comparison(groups, measure) for measure in MEASURES]
    print("\n".join([responses_table(figures), *compared]), flush=True)
    figures[f"search of {BEAMS} x {EXPANSIONS} by steps, min"] = searched(output, data["prompts"], arguments.seed)
    policy = output / "sft" / "model"
    own = {"train_data": data["prompts_train"], "model": policy, "critic_model": policy}
    own["rewards"] = [
        {"type": "process", "path": str(output / "prm" / "model"), "reduce": "min"},
        {"type": "function", "path": f"{HERE}/data.py:complete"},
    ]
    train("ppo", HERE / "ppo.yaml", output / "ppo", common | own, arguments.processes)
    learned = scored_samples(output / "ppo", data["prompts"], 1, arguments.seed, checks())
    figures["one response, after PPO by steps"] = shares_of([response for [response] in learned])
    summary = {"models": models, "responses": figures, "compared": compared}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(responses_table(figures))


def trained_figures(output: Path) -> dict[str, Share]:
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


def policy_of(run: Path) -> tuple[Any, Any]:
    """A run's policy and its tokenizer."""
    from transformers import AutoTokenizer

    from coati.models import Actor

    return Actor(str(run / "model")).eval(), AutoTokenizer.from_pretrained(run / "model")


def choosers(output: Path) -> list[RewardSettings]:
    """What chooses the best of several responses, and tells whether it is right."""
    prm, outcome = str(output / "prm" / "model"), str(output / "reward" / "model")
    by_steps = [ProcessRewardSettings(path=prm, reduce=reduce, name=reduce) for reduce in REDUCTIONS]
    return [*by_steps, ModelRewardSettings(path=outcome, name=BY_OUTCOME), *checks()]


def checks() -> list[RewardSettings]:
    """What tells whether a response is right, as `MEASURES` names it."""
    return [FunctionRewardSettings(path=f"{HERE}/data.py:{one.__name__}", name=name) for name, one in MEASURES.items()]


def scored_samples(run: Path, prompts: Path, n: int, seed: int, rewards: list[RewardSettings]) -> list[list[Sample]]:
    """n responses of a run's policy to each prompt, with their rewards."""
    from coati.rollout import PolicyGenerator, ResponseSampler, ScoredGeneration, prompts_of_texts
    from coati.rollout.prompts import eos_ids

    actor, tokenizer = policy_of(run)
    scorer = load_rewards(rewards, ScoringConfig(reward_workers=0), partial(load_model, tokenizer))
    generator = PolicyGenerator.of_actor(actor, tokenizer, 256)
    generation = ScoredGeneration(ResponseSampler(generator, tokenizer, eos_ids(tokenizer, actor)), scorer)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    columns = [{"answer": row["answer"]} for row in rows]
    asked = prompts_of_texts([row["prompt"] for row in rows], tokenizer, columns, seed)
    requests = [replace(prompt, seed=[*prompt.seed, k]) for prompt in asked for k in range(n)]
    samples = generation.sample(requests, SAMPLING).samples
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def load_model(tokenizer, path: str, settings: RewardSettings | None = None):
    """A reward of a model, see `load_here`."""
    import torch

    from coati.rewards.process import load_here

    return load_here(path, settings, tokenizer, torch.device("cpu"), lambda lengths: [[*range(len(lengths))]])


def searched(output: Path, prompts: Path, seed: int) -> dict[str, Share]:
    """The shares of prompts for which the search over steps ends right."""
    from coati.rollout import step_beam_search

    actor, tokenizer = policy_of(output / "sft")
    prm = str(output / "prm" / "model")
    reward = load_model(tokenizer, prm, ProcessRewardSettings(path=prm))
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    texts, answers = ([row[name] for row in rows] for name in ("prompt", "answer"))
    how = dict(beams=BEAMS, expansions=EXPANSIONS, seed=seed, batch_size=256)
    found = step_beam_search(actor, reward, texts, tokenizer=tokenizer, config=SAMPLING, **how)
    responses = [one.response for one in found]
    return {name: share_of(is_right(texts, responses, answer=answers)) for name, is_right in MEASURES.items()}


def best_of(groups: list[list[Sample]]) -> dict[str, dict[str, Share]]:
    """The shares of prompts whose response is right: drawn at random, chosen by each model, and of any of them."""
    figures = {"one response": shares_of([group[0] for group in groups])}
    for name in (*REDUCTIONS, BY_OUTCOME):
        what = "the outcome reward model" if name == BY_OUTCOME else f"steps, {name}"
        figures[f"best of {N} by {what}"] = shares_of(best_by(name, groups))
    any_right = f"any of {N} is right"
    figures[any_right] = {name: share_of(rewards_of(best_by(name, groups), name)) for name in MEASURES}
    return figures


def best_by(reward: str, groups: list[list[Sample]]) -> list[Sample]:
    """Of each group the sample with the highest reward of that name."""
    return [max(group, key=lambda sample: sample.rewards[reward]) for group in groups]


def comparison(groups: list[list[Sample]], measure: str) -> str:
    """For how many prompts only one of the two choices is right, and how probable it is that these fall so unevenly
    between two choosers that are equally good (McNemar's exact test)."""
    from scipy.stats import binomtest

    by_steps, by_outcome = (rewards_of(best_by(name, groups), measure) for name in (BY_STEPS, BY_OUTCOME))
    only_steps = sum(a > b for a, b in zip(by_steps, by_outcome, strict=True))
    only_outcome = sum(b > a for a, b in zip(by_steps, by_outcome, strict=True))
    p = binomtest(only_steps, only_steps + only_outcome).pvalue if only_steps + only_outcome else 1.0
    return (
        f"{measure}, of {len(groups)} prompts: only the choice by steps ({BY_STEPS}) in {only_steps}, only the choice "
        f"by outcome in {only_outcome}; p = {p:.2g} (exact McNemar)"
    )


def shares_of(samples: list[Sample]) -> dict[str, Share]:
    """How many of some responses are right, by each measure."""
    return {name: share_of(rewards_of(samples, name)) for name in MEASURES}


def rewards_of(samples: list[Sample], name: str) -> list[float]:
    """Their rewards of that name."""
    return [sample.rewards[name] for sample in samples]


def share_of(right: list[float]) -> Share:
    """Of numbers that are 1 for what is right, else 0: their mean, with its interval."""
    share = sum(right) / len(right)
    return share, *wilson_interval(share, len(right))


def responses_table(figures: dict[str, dict[str, Share]]) -> str:
    """How many responses are right, a row for each way of getting them."""
    return table_of(["", *MEASURES], [(name, *map(cell, shares.values())) for name, shares in figures.items()])


def cell(share: Share) -> str:
    """A share and its interval, as tables show them."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*share)


if __name__ == "__main__":
    main()
