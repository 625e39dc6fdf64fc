"""Compares the verifier gsm8k with the labels of GSM8K's model solutions, for docs/rewards.md.

    python tools/gsm8k_verdicts.py ../shared/data/gsm8k/model_solutions.jsonl

prints a line for each model, and a table of the solutions where they differ.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.rewards.verifiable import GSM8KVerifier
from coati.samples import Sample


def main(path: str):
    """Each row has a question, its `ground_truth`, and by model a `solution` and whether it `is_correct`."""
    verifier, solutions, differing = GSM8KVerifier(), Counter(), []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        for model, given in row.items():
            if not isinstance(given, dict):
                continue
            [score] = verifier.score([sample_of(row["question"], given["solution"], row["ground_truth"])])
            solutions[model] += 1
            if bool(score) != given["is_correct"]:
                ends = [text.splitlines()[-1] for text in (row["ground_truth"], given["solution"])]
                differing.append((number, model, given["is_correct"], *ends))
    for model, count in solutions.items():
        print(f"{model}: {count - sum(row[1] == model for row in differing)} of {count} alike")
    print("\n| line | model | label | right answer | solution's last line |\n|---|---|---|---|---|")
    for row in differing:
        print("|", " | ".join(map(str, row)), "|")


def sample_of(question: str, solution: str, answer: str) -> Sample:
    """As a policy would have written it."""
    texts = dict(columns={"answer": answer}, prompt=question, response=solution)
    return Sample(row=0, tokens=[], response_mask=[], log_probs=None, finish_reason="eos", **texts)


if __name__ == "__main__":
    main(sys.argv[1])
