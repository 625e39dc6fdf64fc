"""Write the arithmetic task's data and tokenizer: chain sums, worked out one number at a time.

    python examples/arithmetic/sums.py --out runs/arithmetic/data --seed 0

A prompt is `7+5-9=` and its answer `+5=12-9=3`: each number in turn with the sum so far, and the last sum is what
counts. Tokens are single characters. No prompt stands in two files. The same seed gives the same bytes.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.tokenizer import character_tokenizer

SIZES = {"sft": 12000, "sft_eval": 400, "prompts_train": 8000, "prompts_eval": 500}
TERMS, LARGEST = (3, 4, 5), 9  # numbers of a sum, and the largest of them
CHARACTERS = "0123456789+-="


def expression(numbers: list[int]) -> str:
    return f"{numbers[0]}" + "".join(f"{number:+d}" for number in numbers[1:])


def worked_out(numbers: list[int]) -> str:
    """Each number after the first, and the sum up to it.

    >>> worked_out([7, 5, -9])
    '+5=12-9=3'
    """
    return "".join(f"{numbers[i]:+d}={sum(numbers[: i + 1])}" for i in range(1, len(numbers)))


def make_data(folder: Path, seed: int) -> dict[str, Path]:
    """Files by name, and the tokenizer's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows, files = random.Random(seed), {}, {"tokenizer": folder / "tokenizer"}
    while len(rows) < sum(SIZES.values()):
        signs = [1] + [rng.choice((1, -1)) for _ in range(rng.choice(TERMS) - 1)]
        numbers = [sign * rng.randint(1, LARGEST) for sign in signs]
        prompt = expression(numbers) + "="
        rows[prompt] = {"prompt": prompt, "completion": worked_out(numbers), "answer": str(sum(numbers))}
    left = rng.sample(list(rows.values()), len(rows))  # short sums run out: the last ones drawn are the longest
    for name, count in SIZES.items():
        some, left = left[:count], left[count:]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in some))
    tokenizer().save_pretrained(files["tokenizer"])
    return files


def tokenizer():
    """A token a character."""
    return character_tokenizer(CHARACTERS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_data(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
