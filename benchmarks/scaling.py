"""How cost grows: tokens a second and peak memory over length, batch and vocabulary.

python benchmarks/scaling.py                # half an hour on two idle cores; one JSON line
python benchmarks/scaling.py --save         # and writes benchmarks/results/scaling.json
python benchmarks/scaling.py --axes length

length       SFT steps of 4,096 tokens in rows of 64 to 2,048, beside a plain PyTorch loop
vocabulary   SFT steps of 8 rows of 256 tokens, vocabularies of 2,048 to 131,072, beside the loop
batch        generation of 64 tokens for 1 to 256 prompts at once, beside `transformers.generate`
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import generation, training
from benchmarks.contest import machine, store

AXES = {
    "length": (64, 128, 256, 512, 1024, 2048),
    "vocabulary": (2048, 8192, 32768, 131072),
    "batch": (1, 4, 16, 64, 256),
}


def measure(axis: str, value: int, rounds: int, threads: int) -> dict:
    if axis == "batch":
        return generation.run_case(f"fixed-{value}-64", rounds, threads, {})
    rows, seq, model = (4096 // value, value, {}) if axis == "length" else (8, 256, {"vocab_size": value})
    case = training.Case("sft", rows, rows, 1, [seq] * max(rows, 8), loop=True)
    return training.run_case(case, rounds, threads, model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scaling.json")
    options = parser.parse_args()
    result = {"machine": machine(options.threads), "rounds": options.rounds, "model": generation.MODEL, "axes": {}}
    for axis in options.axes:
        points = result["axes"][axis] = {}
        for value in AXES[axis]:
            points[str(value)] = measure(axis, value, options.rounds, options.threads)
            print(axis, value, "done", file=sys.stderr, flush=True)
        if options.save:
            store(result, "scaling", "axes")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
