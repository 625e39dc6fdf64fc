"""Benchmarks by their names for `datasets`: cais/mmlu, haonan-li/cmmlu, ceval/ceval-exam, openai/gsm8k, or copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from coati.errors import UserError
from colossal_eval.benchmarks.converters import SHOTS, lettered, word_problem
from colossal_eval.benchmarks.published_rows import Row, make_row
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
    """The rows of the set `name`: one configuration per subject (GSM8K: `main`).

    Raises:
        UserError: a benchmark that is known as files only, or a set that `datasets` can't load.
    """
    import datasets

    if benchmark not in SPLITS:
        raise UserError(f"{benchmark} is read from its published files only: give --data FOLDER")
    if benchmark == "gsm8k":
        subjects, make = {"gsm8k": "main"}, word_problem
    else:
        subjects, make = {subject: subject for subject in SUBJECTS[benchmark]}, partial(_lettered, benchmark)
    there = _tried(name, datasets.get_dataset_config_names, name)
    subjects = {subject: part for subject, part in subjects.items() if part in there}
    if not subjects:
        raise UserError(f"datasets:{name} has the parts {', '.join(there)}; expected subjects of {benchmark}")
    for subject, part in subjects.items():
        for split, published in SPLITS[benchmark].items():
            rows = _tried(name, datasets.load_dataset, name, part, split=published)
            if benchmark == "gsm8k" and split == "dev":
                rows = islice(rows, SHOTS)
            for number, value in enumerate(rows):
                location = f"datasets:{name} {part} {published}: row {number + 1}"
                yield make_row(split, subject, location, make, value, f"{subject}/{split}/{number}")


def _tried(name: str, load: Callable, *arguments, **options):
    try:
        return load(*arguments, **options)
    # what `datasets` raises for a wrong name, or without a network, is documented nowhere
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"datasets:{name} can't be loaded ({type(error).__name__}: {reason}); correct the name"
        ) from error


def _lettered(benchmark: str, value: dict, id: str) -> Question:
    """Columns `question`, `choices`, `answer` (an index), or `Question`, `A` to `D`, `Answer` (a letter)."""
    value = {key.lower(): text for key, text in value.items()}
    answer = value["answer"]
    if isinstance(answer, int):
        answer = LETTERS[answer]
    choices = value["choices"] if "choices" in value else [value[letter] for letter in "abcd"]
    return lettered(benchmark, id, [value["question"], *choices, answer])
