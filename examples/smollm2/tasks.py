"""Data of the verifiable tasks: two-digit sums, requests for a text with a constraint, lists of words to reverse."""

import json
import random
from pathlib import Path

WORDINGS = {
    "seen": "What is {a} + {b}? End your response with one line: Answer: N",
    # only ever evaluated on: a policy that learned sums, and not one prompt, knows what is asked
    "reworded": "Work out {a} + {b}. Your last line should be 'Answer: ' and the result.",
    "in words": "Please add the numbers {a} and {b}. Your last line should be 'Answer: ' and the result.",
}
SIZES = {"sft": 640, "sft_eval": 64, "prompts": 2000, "prompts_eval": 200}
# how many rows, and of how many words; longer lists are only ever evaluated on
REVERSALS = {"reversal_sft": (256, 3, 5), "reversals": (1000, 3, 5), "reversals_eval": (200, 3, 5)}
REVERSALS |= {"reversals_longer": (100, 6, 7)}
SUBJECTS = (
    "the sea",
    "a good breakfast",
    "riding a bicycle",
    "the moon",
    "learning to read",
    "a walk in the rain",
    "old books",
    "cats",
    "the first day of school",
    "trees in autumn",
    "cooking soup",
    "a train journey",
    "music",
    "bees",
    "a city at night",
    "gardens",
    "snow",
    "bread",
    "friendship",
    "a quiet morning",
)
HELD_OUT_SUBJECTS = ("rivers", "a birthday party", "learning to swim", "the desert", "clocks", "tea", "bridges", "dogs")
WORDS = ("light", "small", "water", "time", "home", "green", "warm", "work")
ENDINGS = ("That is all.", "Thank you for reading.", "I hope this helps.")
KEYS = ("text", "summary", "title")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_sums(folder: Path, seed: int) -> dict[str, Path]:
    """Files by name. No two operands stand in two files, in either order; the same seed gives the same bytes."""
    files = {}
    for name, sums in draw_operands(SIZES, seed).items():
        row_of = demonstration if name.startswith("sft") else question
        files[name] = write_rows(folder / f"{name}.jsonl", [row_of(a, b, "seen") for a, b in sums])
        if name == "prompts_eval":
            for wording in ("reworded", "in words"):
                rows = [question(a, b, wording) for a, b in sums]
                files[wording] = write_rows(folder / f"prompts_{wording.replace(' ', '_')}.jsonl", rows)
    return files


def draw_operands(sizes: dict[str, int], seed: int) -> dict[str, list[list[int]]]:
    """So many pairs of two-digit numbers by name; no pair is in two of them, in either order."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    drawn = {}
    for name, size in sizes.items():
        drawn[name] = [rng.sample(pair, 2) for pair in pairs[:size]]  # which of the two comes first
        pairs = pairs[size:]
    return drawn


def question(a: int, b: int, wording: str) -> dict[str, str]:
    return {"prompt": WORDINGS[wording].format(a=a, b=b), "answer": str(a + b)}


def demonstration(a: int, b: int, wording: str) -> dict[str, str]:
    return {"prompt": WORDINGS[wording].format(a=a, b=b), "completion": f"Answer: {a + b}"}


def make_constraints(folder: Path, seed: int) -> dict[str, Path]:
    """Prompts with a constraint; those for evaluation are about other subjects."""
    rng = random.Random(seed)
    files = {}
    for name, subjects, size in (("constraints", SUBJECTS, 1000), ("constraints_eval", HELD_OUT_SUBJECTS, 120)):
        rows = [constraint_row(rng, rng.choice(subjects), i) for i in range(size)]
        files[name] = write_rows(folder / f"{name}.jsonl", rows)
    return files


def constraint_row(rng: random.Random, subject: str, i: int) -> dict:
    """The i-th row; the kinds of constraints take turns."""
    most, word, ending, key = rng.choice((8, 12, 16)), rng.choice(WORDS), rng.choice(ENDINGS), rng.choice(KEYS)
    kinds = [
        (f"Use at most {most} words.", {"name": "at_most_words", "most": most}),
        (f"Include the word '{word}'.", {"name": "includes", "word": word}),
        ("Do not use the word 'the'.", {"name": "avoids", "word": "the"}),
        ("Use lower case letters only.", {"name": "lower_case"}),
        (f"Reply with a JSON object that has one key, '{key}'.", {"name": "json_with_key", "key": key}),
        (f"End with the words: {ending}", {"name": "ends_with", "phrase": ending}),
    ]
    request, constraint = kinds[i % len(kinds)]
    return {"prompt": f"Write one or two sentences about {subject}. {request}", "constraint": constraint}


def make_reversals(folder: Path, seed: int) -> dict[str, Path]:
    """Files of reasoning-gym's `word_sequence_reversal`, as it yields them; for SFT with its answers."""
    from reasoning_gym import create_dataset

    files = {}
    for i, (name, (size, least, most)) in enumerate(REVERSALS.items()):
        task = dict(min_words=least, max_words=most, size=size, seed=len(REVERSALS) * seed + i)
        rows = list(create_dataset("word_sequence_reversal", **task))
        if name == "reversal_sft":
            rows = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
        files[name] = write_rows(folder / f"{name}.jsonl", rows)
    return files
