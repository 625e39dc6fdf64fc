"""From the published layout of each benchmark to questions. A converter yields a `Row` for every published row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.agieval import agieval
from colossal_eval.benchmarks.gaokao_bench import gaokao_bench
from colossal_eval.benchmarks.published_rows import (
    Row,
    check_object,
    check_pairs,
    csv_rows,
    find_root,
    jsonl_rows,
    make_row,
    subject_files,
)
from colossal_eval.benchmarks.question import Question, letters
from colossal_eval.benchmarks.subjects import CEVAL, CMMLU, MMLU, SUBJECTS

SHOTS = 8  # GSM8K's few-shot examples are the first rows of its training file


def lettered(benchmark: str, id: str, cells: list[str]) -> Question:
    """A question with choices A to D from `[question, A, B, C, D, answer]`; its id begins with the subject.

    Raises:
        ValueError: another number of cells.
    """
    if len(cells) != 6:
        raise ValueError(f"it has {len(cells)} cells, not 6 (question, A, B, C, D, answer)")
    question, *choices, answer = (cell.strip() for cell in cells)
    subject = id.split("/")[0]
    return Question(
        id=id,
        subject=subject,
        category=SUBJECTS[benchmark][subject].category,
        language="en" if benchmark == "mmlu" else "zh",
        kind="single_choice",
        question=question,
        choices=choices,
        labels=letters(4),
        answers=[answer],
    )


def mmlu(folder: Path) -> Iterator[Row]:
    """`dev/SUBJECT_dev.csv` and `test/SUBJECT_test.csv` without header: question, A, B, C, D, answer."""
    root = find_root(folder, ["dev", "test"], ("data",), "dev/SUBJECT_dev.csv and test/SUBJECT_test.csv")
    yield from _tables("mmlu", root, MMLU, {"dev": "dev", "test": "test"}, "_{}.csv", None)


def cmmlu(folder: Path) -> Iterator[Row]:
    """`dev/SUBJECT.csv` and `test/SUBJECT.csv` with the header `,Question,A,B,C,D,Answer`."""
    root = find_root(folder, ["dev", "test"], ("data",), "dev/SUBJECT.csv and test/SUBJECT.csv")
    header = ["", "Question", "A", "B", "C", "D", "Answer"]
    yield from _tables("cmmlu", root, CMMLU, {"dev": "dev", "test": "test"}, ".csv", header)


def ceval(folder: Path) -> Iterator[Row]:
    """`dev/SUBJECT_dev.csv` and `val/SUBJECT_val.csv`, header `id,question,A,B,C,D,answer`. The test part has no
    published answers: the validation part is what is scored."""
    root = find_root(folder, ["dev", "val"], ("data", "ceval-exam"), "dev/SUBJECT_dev.csv and val/SUBJECT_val.csv")
    header = ["id", "question", "A", "B", "C", "D", "answer"]
    yield from _tables("ceval", root, CEVAL, {"dev": "dev", "test": "val"}, "_{}.csv", header)


def _tables(benchmark: str, root: Path, table: dict, folders: dict, suffix: str, header) -> Iterator[Row]:
    """`folders`: of each split. `suffix`: of the files, `{}` for the folder's name."""

    def path_of(split: str, subject: str) -> Path:
        return root / folders[split] / (subject + suffix.format(folders[split]))

    files_of = {split: subject_files(root / name, suffix.format(name), table) for split, name in folders.items()}
    check_pairs(files_of["dev"], files_of["test"], path_of)
    for split, paths in files_of.items():
        for subject, path in paths.items():
            for number, (line, cells) in enumerate(csv_rows(path, header)):
                if header is not None:
                    cells = cells[1:7]
                id, location = f"{subject}/{split}/{number}", f"{path}:{line}"
                yield make_row(split, subject, location, lettered, benchmark, id, cells)


def gsm8k(folder: Path) -> Iterator[Row]:
    """`test.jsonl`, and `train.jsonl` for few-shot examples: question, answer (reasoning, then `#### N`)."""
    expected = "train.jsonl and test.jsonl"
    root = find_root(folder, ["train.jsonl", "test.jsonl"], ("data", "grade_school_math/data"), expected)
    for split, name in (("dev", "train.jsonl"), ("test", "test.jsonl")):
        path = root / name
        for number, (line, value) in enumerate(jsonl_rows(path)):
            if split == "dev" and number == SHOTS:
                break
            yield make_row(split, "gsm8k", f"{path}:{line}", word_problem, value, f"gsm8k/{split}/{number}")


def word_problem(value: dict | ValueError, id: str) -> Question:
    """A GSM8K question from `question` and `answer`. Raises ValueError: the answer doesn't end in a number."""
    value = check_object(value)
    solution, mark, answer = value["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("the answer doesn't end in a line '#### N'")
    return Question(
        id=id,
        subject="gsm8k",
        category="mathematics",
        language="en",
        kind="math",
        question=value["question"].strip(),
        answers=[answer.strip().replace(",", "")],
        solution=solution.strip(),
    )


def mt_bench(folder: Path) -> Iterator[Row]:
    """`question.jsonl` (question_id, category, turns), and `reference_answer/gpt-4.jsonl` if it is there."""
    root = find_root(folder, ["question.jsonl"], ("data", "data/mt_bench", "mt_bench"), "question.jsonl")
    references = {}
    if (path := root / "reference_answer" / "gpt-4.jsonl").is_file():
        for line, value in jsonl_rows(path):
            try:
                references[check_object(value)["question_id"]] = check_object(value)["choices"][0]["turns"]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise UserError(f"{path}:{line} is no reference answer ({error}): get the file again") from None
    for line, value in jsonl_rows(root / "question.jsonl"):
        location = f"{root / 'question.jsonl'}:{line}"
        yield make_row("test", "mt_bench", location, _dialogue, value, references)


def _dialogue(value: dict | ValueError, references: dict) -> Question:
    value = check_object(value)
    question, *turns = value["turns"]
    return Question(
        id=f"mt_bench/{value['question_id']}",
        subject="mt_bench",
        category=value["category"],
        language="en",
        kind="dialogue",
        question=question,
        turns=turns,
        answers=references.get(value["question_id"], []),
    )


def texts(folder: Path) -> Iterator[Row]:
    """Texts of the user's: `*.txt`, a document each, and `*.jsonl` with `text` (or `target`), one per line. A file is a
    subject."""
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".txt", ".jsonl"))
    if not paths:
        raise UserError(f"{folder} holds no *.txt and no *.jsonl")
    for path in paths:
        if path.suffix == ".txt":
            yield make_row("test", path.stem, f"{path}:1", _text_file, path)
            continue
        for line, value in jsonl_rows(path):
            yield make_row("test", path.stem, f"{path}:{line}", _text_row, path, line, value)


def _text_file(path: Path) -> Question:
    return _document(path, 1, path.read_text(encoding="utf-8"))


def _text_row(path: Path, line: int, value: dict | ValueError) -> Question:
    value = check_object(value)
    text = value.get("text", value.get("target"))
    if not isinstance(text, str):
        raise ValueError("it has no text in `text` or `target`")
    return _document(path, line, text)


def _document(path: Path, line: int, text: str) -> Question:
    id = f"{path.stem}/{line}"
    return Question(id=id, subject=path.stem, category="texts", language="", kind="text", question=text)


CONVERTERS = {
    "mmlu": mmlu,
    "cmmlu": cmmlu,
    "ceval": ceval,
    "agieval": agieval,
    "gaokao_bench": gaokao_bench,
    "gsm8k": gsm8k,
    "mt_bench": mt_bench,
    "texts": texts,
}
