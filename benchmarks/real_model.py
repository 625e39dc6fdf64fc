"""A real model's speed beside its peers: SmolLM2-135M-Instruct, all weights, generation and training.

    python examples/smollm2/run.py --stages sft      # fetches the model
    python benchmarks/real_model.py --save           # and writes benchmarks/results/real_model.json, two hours
    python benchmarks/real_model.py --cases dpo-log-normal --rounds 1

The contenders are those of benchmarks/generation.py and benchmarks/training.py, which work in turns; so are the cases,
with fewer rows. Weights and sizes are the model's (30 layers, 9 heads of which 3 for keys, a tied vocabulary of
49,152), in fp32. Rows are words of one token each, which gives them the lengths that a case wants.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import generation, training  # noqa: E402
from benchmarks.contest import machine, store  # noqa: E402
from benchmarks.training import Case  # noqa: E402
from benchmarks.world import PLAIN, write_real_models  # noqa: E402

GENERATION = ("fixed-32-64", "fixed-128-64", "log-normal")
ROWS = 128


def training_cases() -> dict[str, Case]:
    """As those of benchmarks/training.py, with micro-batches of about 1,024 tokens for everyone, so that all contenders
    fit into 24 GB side by side."""
    even = [256] * 32
    uneven = np.clip(generation.log_normal(ROWS, 130, 0.8), 32, 512).tolist()
    responses = np.clip(generation.log_normal(32, 58, 0.8), 1, 256).tolist()
    trl, budget, cached = {"TRL": {}}, {"max_tokens_per_batch": 1024}, {"cache_reference": True}
    pairs = trl | {"TRL, grouped": training.GROUPED_PAIRS}
    # two rows of 512 tokens at a time, and as many tokens a step as everyone
    packed = {"packing": True, "packing_strategy": "bfd"}
    packed |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    of_sft = {"TRL, padded": {}, "TRL, packed": packed}
    of_sft["TRL, grouped"] = {"train_sampling_strategy": "group_by_length"}
    return {
        "sft-fixed": Case("sft", 8, 4, 1, even, {}, {"TRL, padded": {}}, loop=True),
        "sft-log-normal": Case("sft", 16, 4, 2, uneven, budget, of_sft),
        "reward-fixed": Case("reward", 8, 2, 1, even, {}, trl, loop=True),
        "reward-log-normal": Case("reward", 8, 2, 2, uneven, budget, pairs),
        "reward-prompts": Case("reward", 8, 2, 1, even, {"share_prompts": True}, trl, prompt=180),
        "dpo-fixed": Case("preference", 8, 2, 1, even, cached, trl),
        "dpo-prompts": Case("preference", 8, 2, 1, even, cached | {"share_prompts": True}, trl, prompt=180),
        "dpo-log-normal": Case("preference", 8, 2, 2, uneven, budget | cached, pairs),
        "ppo-fixed": Case("ppo", 16, 8, 1, [64] * 16, {}, trl),
        "ppo-log-normal": Case("ppo", 32, 8, 1, responses, budget, trl),
        "grpo-fixed": Case("grpo", 16, 8, 1, [64] * 16, {}, trl),
        "grpo-log-normal": Case("grpo", 32, 8, 1, responses, budget, trl),
    }


def run_case(name: str, model: Path, rounds: int, threads: int) -> dict:
    if name in GENERATION:
        # of transformers' batch sizes the one that is its best with the random model: each takes minutes a turn
        return generation.run_case(name, rounds, threads, {}, base=model, batch_sizes=(32,))
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        write_real_models(world, model, PLAIN)
        return training.compare(training_cases()[name], world, rounds, threads)


def main():
    names = [*GENERATION, *training_cases()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs" / "smollm2" / "model", help="a Llama's folder")
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/real_model.json")
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"error: {options.model} is no folder: run python examples/smollm2/run.py --stages sft first")
    result = {"machine": machine(options.threads), "rounds": options.rounds, "cases": {}}
    for name in options.cases:
        found = result["cases"][name] = run_case(name, options.model.resolve(), options.rounds, options.threads)
        print(name, {k: round(v, 2) for k, v in found["ratios"].items()}, file=sys.stderr, flush=True)
        if options.save:
            store(result, "real_model", "cases")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
