"""Benchmarks by their names for `datasets`: cais/mmlu, haonan-li/cmmlu, ceval/ceval-exam, openai/gsm8k, or copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from coati.errors import UserError
from colossal_eval.benchmarks.converters import SHOTS, lettered, word_problem
from colossal_eval.benchmarks.published_rows import Row, row
from colossal_eval.benchmarks.question import LETTERS, Question
from colossal_eval.benchmarks.subjects import SUBJECTS

# of each benchmark: the splits that hold the few-shot examples and the scored questions
SPLITS = {
    "mmlu": {"dev": "dev", "test": "test"},
    "cmmlu": {"dev": "dev", "test": "test"},
    "ceval": {"dev": "dev", "test": "val"},
    "gsm8k": {"dev": "train", "test": "test"},
}


def hub_rows(benchmark: str, name: str) -> Iterator[Row]:
    """The rows of the set `name`: one configuration a subject (GSM8K: `main`).

    Raises:
        UserError: a benchmark that is known as files only, or a set that `datasets` can't load.
    """
    if benchmark not in SPLITS:
        raise UserError(f"{benchmark} is read from its published files only: give --data FOLDER")
    there = _tried(name, lambda datasets: datasets.get_dataset_config_names(name))
    wanted = ["main"] if benchmark == "gsm8k" else [subject for subject in SUBJECTS[benchmark] if subject in there]
    if not wanted:
        raise UserError(f"datasets:{name} has the parts {', '.join(there)}; expected subjects of {benchmark}")
    make = word_problem if benchmark == "gsm8k" else _lettered
    for subject in wanted:
        for split, part in SPLITS[benchmark].items():
            rows = _tried(name, lambda datasets: datasets.load_dataset(name, subject, split=part))  # noqa: B023
            title = "gsm8k" if benchmark == "gsm8k" else subject
            few = SHOTS if (benchmark, split) == ("gsm8k", "dev") else None
            for number, value in enumerate(islice(rows, few)):
                place, id = f"datasets:{name} {subject} {part}: row {number + 1}", f"{title}/{split}/{number}"
                yield row(split, title, place, make, value, id, *([] if benchmark == "gsm8k" else [benchmark]))


def _tried(name: str, load: Callable):
    import datasets

    try:
        return load(datasets)
    # what `datasets` raises for a wrong name, or without a network, is documented nowhere
    except Exception as error:
        told = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"datasets:{name} can't be loaded ({type(error).__name__}: {told}); correct the name"
        ) from error


def _lettered(value: dict, id: str, benchmark: str) -> Question:
    """Columns `question`, `choices`, `answer` (an index), or `Question`, `A` to `D`, `Answer` (a letter)."""
    value = {key.lower(): text for key, text in value.items()}
    answer = value["answer"]
    choices = value["choices"] if "choices" in value else [value[letter] for letter in "abcd"]
    return lettered(
        benchmark, id, [value["question"], *choices, LETTERS[answer] if isinstance(answer, int) else answer]
    )
