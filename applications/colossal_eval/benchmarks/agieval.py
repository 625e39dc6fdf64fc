"""AGIEval (Zhong et al., 2304.06364): `TASK.jsonl` files, and few-shot examples in `few_shot_prompts.csv`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.published_rows import Row, check_object, csv_rows, jsonl_rows, make_row, strip_letter
from colossal_eval.benchmarks.question import Question, letters
from colossal_eval.benchmarks.subjects import AGIEVAL

SHOTS = "few_shot_prompts.csv"
CHINESE = {"jec-qa-ca", "jec-qa-kd", "logiqa-zh"}
ENGLISH = {"gaokao-english"}


def agieval(folder: Path) -> Iterator[Row]:
    """Tasks and examples are looked for anywhere below `folder`: upstream keeps them in different folders."""
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder; expected TASK.jsonl files and {SHOTS}")
    tasks = {name: _only(folder, f"{name}.jsonl") for name in AGIEVAL}
    tasks = {name: path for name, path in tasks.items() if path is not None}
    if not tasks:
        raise UserError(f"{folder} has no {next(iter(AGIEVAL))}.jsonl or the like below it; expected AGIEval's data/v1")
    shots = _only(folder, SHOTS)
    if shots is None:
        raise UserError(f"{folder} has no {SHOTS} below it: it holds the few-shot examples of every task")
    yield from _examples(shots, list(tasks))
    for name, path in tasks.items():
        for number, (line, value) in enumerate(jsonl_rows(path)):
            yield make_row("test", name, f"{path}:{line}", _question, value, f"{name}/test/{number}")


def _only(folder: Path, name: str) -> Path | None:
    files = sorted(path for path in folder.rglob(name) if path.is_file())
    if len(files) > 1:
        raise UserError(f"{files[0]} and {files[1]} are both there: name the folder of one version")
    return files[0] if files else None


def _examples(path: Path, tasks: list[str]) -> Iterator[Row]:
    """Odd rows hold one example per task as Python literals, even ones their explanations."""
    rows = csv_rows(path)
    _, header = next(rows)
    samples = [(line, cells) for line, cells in rows if cells[0].startswith("sample")]
    if not samples:
        raise UserError(f"{path} has no rows 'sample 1', 'sample 2', ...; expected AGIEval's {SHOTS}")
    for number, (line, cells) in enumerate(samples):
        for name in tasks:
            column = "sat-en" if name == "sat-en-without-passage" else name
            cell = cells[header.index(column)] if column in header[: len(cells)] else ""
            if cell:
                location = f"{path}:{line} ({name})"
                yield make_row("dev", name, location, _example, cell, f"{name}/dev/{number}")


def _example(cell: str, id: str) -> Question:
    """From the dict of a Python literal; `literal_eval` builds values only and runs nothing."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("the example is no Python literal of a dict")
    return _question(value, id)


def _question(value: dict | ValueError, id: str) -> Question:
    """`id` begins with the task's name. Options of one string list all choices in it: they stay in the question's text,
    and there are four."""
    name, value = id.split("/")[0], check_object(value)
    options = value.get("options") or []
    question = value["question"].strip()
    in_text = len(options) == 1
    if in_text:
        question = f"{question}\n{options[0].strip()}"
    if options:
        answers = _right_letters(value.get("label"))
        kind = "single_choice" if len(answers) == 1 else "multi_choice"
    else:
        answers = [str(value["answer"]).strip()] if value.get("answer") else []
        kind = "cloze"
    chinese = (name.startswith("gaokao") or name in CHINESE) and name not in ENGLISH
    return Question(
        id=id,
        subject=name,
        category=AGIEVAL[name].category,
        language="zh" if chinese else "en",
        kind=kind,
        question=question,
        choices=[] if in_text else [strip_letter(option) for option in options],
        labels=letters(4 if in_text else len(options)),
        answers=answers,
        passage="" if name == "sat-en-without-passage" else (value.get("passage") or "").strip(),
    )


def _right_letters(label) -> list[str]:
    """From "B", "A B D", "ABD" or a list."""
    text = "".join(label) if isinstance(label, list) else str(label or "")
    return sorted({letter for letter in text if not letter.isspace()})
