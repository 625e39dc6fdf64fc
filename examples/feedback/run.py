"""The whole loop with a real model of 135 M parameters: 60 labels of its responses, a reward model that learns from
them, DPO on responses that the reward model ranks, and a blind comparison of the trained model with the first.

    python examples/feedback/run.py                        # a simulated labeler, on the page that people use
    python examples/feedback/run.py --by_hand              # you label: it prints links, and waits
    python examples/feedback/run.py --seed 1

What is finished isn't done again, so the same command continues after a stop.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from coati.config.generation import GenerationConfig  # noqa: E402
from coati.errors import UserError  # noqa: E402
from coati.files import write_json  # noqa: E402
from coati.label.store import Store  # noqa: E402
from coati.tracking import read_metrics  # noqa: E402
from examples.feedback.labeler import faults  # noqa: E402
from examples.feedback.page import compare, export  # noqa: E402
from examples.feedback.prompts import SIZES, make_prompts  # noqa: E402
from examples.smollm2.check import Share, load, masked_log_prob, render  # noqa: E402
from examples.smollm2.model import make_model  # noqa: E402
from examples.smollm2.tasks import write_rows  # noqa: E402
from examples.stages import table_of, train  # noqa: E402

N = 4  # responses to a prompt that the reward model ranks
FLUENCY = 60  # responses of the blind comparison whose log-probs are measured
SAMPLING = {"max_new_tokens": 80, "temperature": 0.7}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by_hand", action="store_true", help="you label: open the links that are printed")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "feedback", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="that train, and threads that sample")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    folder = output / (f"seed{arguments.seed}" + "-by-hand" * arguments.by_hand)
    try:
        walk(make_model(output / "model"), folder, arguments.seed, arguments.by_hand, arguments.processes)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(figures(json.loads((folder / "summary.json").read_text())))


def walk(model: Path, folder: Path, seed: int, by_hand: bool, processes: int, sizes: Mapping[str, int] = SIZES):
    """Labels, reward model, policy, blind comparison; writes summary.json.

    Args:
        sizes: how many prompts each part has, see `examples.feedback.prompts.SIZES`.
    """
    if (folder / "summary.json").exists():
        print(f"{folder} is finished already", flush=True)
        return
    began, cpu_began = time.time(), cpu_seconds()
    prompts = make_prompts(folder / "data", seed, sizes)
    how = {"flags": {"seed": seed, **SAMPLING}, "by_hand": by_hand, "threads": processes}
    pairs = {}
    for name in ("labels", "held_out"):
        compare(prompts[name], folder / f"{name}.sqlite", {"first": model}, **how)
        pairs[name] = folder / f"{name}.jsonl"
        export(folder / f"{name}.sqlite", pairs[name])
    common = {"seed": seed, "cache_dir": folder / "cache", "model": model}
    data = {"train_data": pairs["labels"], "eval_data": pairs["held_out"]}
    train("reward", HERE / "reward.yaml", folder / "reward", common | data, processes)
    ranked = folder / "ranked.jsonl"
    if not ranked.exists():
        write_rows(ranked, best_and_worst(model, folder / "reward", prompts["responses"], seed, processes))
    train("preference", HERE / "dpo.yaml", folder / "dpo", common | {"train_data": ranked}, processes)
    models = {"first": model, "trained": folder / "dpo" / "model"}
    overview = compare(prompts["blind"], folder / "blind.sqlite", models, **how)
    found = {"minutes": (time.time() - began) / 60, "CPU minutes": (cpu_seconds() - cpu_began) / 60}
    found |= {"labeled pairs": len(pairs["labels"].read_text().splitlines())}
    found |= reward_model_accuracy(folder / "reward") | {"blind": overview} | measure(folder / "blind.sqlite", model)
    write_json(folder / "summary.json", found)


def cpu_seconds() -> float:
    """Of this process and those that it has started, which doesn't grow where others use the cores."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def best_and_worst(model: Path, reward: Path, prompts: Path, seed: int, threads: int) -> list[dict[str, str]]:
    """A preference row for each prompt: of `N` responses of the model, that with the highest and with the lowest score
    of the reward model. Prompts with equal or empty responses at the ends are left out."""
    import torch

    from coati.responses import draw, open_policy, open_scorer

    print(f"the model responds {N} times to each prompt of {prompts.name}, and the reward model scores ...", flush=True)
    torch.set_num_threads(threads)
    asked = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    dialogues = [[{"role": "user", "content": prompt}] for prompt in asked]
    seeds = [[seed, i, k] for i in range(len(asked)) for k in range(N)]
    repeated = [dialogue for dialogue in dialogues for _ in range(N)]
    texts = draw(open_policy(str(model)), repeated, seeds, GenerationConfig(**SAMPLING))
    score = open_scorer(str(reward))
    rows = []
    for i, prompt in enumerate(asked):
        responses = texts[i * N : (i + 1) * N]
        scores = score(dialogues[i], responses)
        best, worst = (responses[scores.index(end(scores))] for end in (max, min))
        if best and worst and best != worst:
            rows.append({"prompt": prompt, "chosen": best, "rejected": worst})
    return rows


def reward_model_accuracy(run: Path) -> dict[str, list[float]]:
    """Of held-out labeled pairs, the share whose chosen response has the higher score, with its interval."""
    names = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high")
    [*_, last] = [row for row in read_metrics(run) if names[0] in row]
    return {"reward model's accuracy": [last[name] for name in names]}


def measure(labels: Path, model: Path) -> dict[str, Any]:
    """What the responses of the blind comparison are like, by model; and two prompts with both responses.

    The log-prob per token is by the first model: text that makes no sense is improbable, whatever the labeler likes.
    """
    pairs = list(Store.open(labels).pairs().values())
    by_model: dict[str, list[tuple[str, str]]] = {"first": [], "trained": []}
    for pair in pairs:
        for name, text in zip(pair.models, pair.texts, strict=True):
            by_model[name].append((pair.prompt, text))
    found = {}
    for name, responses in by_model.items():
        of_each = [faults(prompt, text) for prompt, text in responses]
        sums = [log_prob(model, prompt, text) for prompt, text in responses[:FLUENCY]]
        found[name] = {
            "words": sum(len(text.split()) for _, text in responses) / len(responses),
            "finished": sum("cut off" not in of_one for of_one in of_each),
            "on topic": sum("off topic" not in of_one for of_one in of_each),
            "without repetition": sum("repeats itself" not in of_one for of_one in of_each),
            "different texts": len({text for _, text in responses}),
            "log-prob per token": sum(total for total, _ in sums) / sum(tokens for _, tokens in sums),
            "n": len(responses),
        }
    samples = [{"prompt": pair.prompt, **dict(zip(pair.models, pair.texts, strict=True))} for pair in pairs[:2]]
    return {"responses": found, "samples": samples}


def log_prob(model: Path, prompt: str, response: str) -> tuple[float, int]:
    """The sum of the log-probs of a response's tokens, in nats, and their number. Its end doesn't count: some are cut
    off."""
    tokenizer = load(model)[1]
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (render(tokenizer, [{"prompt": prompt}])[0], response)
    )
    mask = [False] * len(before) + [True] * len(after)
    return masked_log_prob(model, before + after, mask), len(after)


def figures(found: dict[str, Any]) -> str:
    """The tables of a run's summary."""
    accuracy, low, high = found["reward model's accuracy"]
    [trained] = [row for row in found["blind"]["models"] if row["model"] == "trained"]
    outcomes = found["blind"]["outcomes"]
    first = [
        ("pairs with a winner, of the labels", str(found["labeled pairs"])),
        ("reward model's accuracy on held-out pairs", f"{accuracy:.1%} ({low:.1%} to {high:.1%})"),
        ("the trained model wins", f"{trained['share']:.1%} ({trained['low']:.1%} to {trained['high']:.1%})"),
        ("its wins, losses", f"{trained['wins']}, {trained['losses']}"),
        ("ties, both bad", f"{outcomes['tie']}, {outcomes['both_bad']}"),
        ("minutes, CPU minutes", f"{found['minutes']:.1f}, {found['CPU minutes']:.1f}"),
    ]
    rows = []
    for name in ("words", "log-prob per token"):
        rows.append([name, *(f"{row[name]:.2f}" for row in found["responses"].values())])
    for name in ("finished", "on topic", "without repetition", "different texts"):
        rows.append([name, *(str(Share(row[name], row["n"])) for row in found["responses"].values())])
    return table_of(["", ""], first) + "\n\n" + table_of(["responses", *found["responses"]], rows)


if __name__ == "__main__":
    main()
