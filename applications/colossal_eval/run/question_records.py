"""One record per question: how a benchmark is run, what is kept of each question, and the files that hold it.

`OUTPUT/records/MODEL/BENCHMARK.jsonl` has the records, `BENCHMARK.lm_eval.json` lm-eval's own results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from coati.errors import UserError
from coati.files import replace_file
from coati.tracking.files import read_lines
from colossal_eval.benchmarks.question import Question
from colossal_eval.run.task_yaml import load_tasks
from colossal_eval.scores.metrics import random_guess, utf8_bytes

RESULTS = ("results", "groups", "n-samples", "n-shot", "versions")  # of lm-eval's results, what is kept


def run_benchmark(
    lm, tasks: Path, benchmark: str, limit: int | None = None, chat_template: bool = False
) -> tuple[list[dict], dict]:
    """Asks a `CoatiLM` all questions, or the first `limit` of each subject.

    Returns:
        One record per question, and lm-eval's own results.
    """
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(tasks, benchmark)
    for task in loaded["tasks"].values():
        task.prompt_tokenizer = lm.prompt_tokenizer
    try:
        results = evaluate(lm, loaded, limit=limit, apply_chat_template=chat_template, bootstrap_iters=1)
    finally:
        lm.prompt_tokenizer.forget()
    samples = results.pop("samples")
    records = [
        record_of(benchmark, loaded["tasks"][name], sample) for name, found in samples.items() for sample in found
    ]
    return records, results


def record_of(benchmark: str, task, sample: dict) -> dict:
    """What is kept of a question: its scores, the model's output, and the score of a blind guess."""
    question, context = Question(**sample["doc"]), task.contexts[sample["doc"]["id"]]
    record = {
        "id": question.id,
        "benchmark": benchmark,
        "subject": question.subject,
        "category": question.category,
        "kind": question.kind,
        "labels": question.labels,
        "answers": question.answers,
        "random": random_guess(question.kind, question.labels, question.answers),
        "scores": {name: sample[name] for name in sample["metrics"]},
        "dropped_shots": context.dropped,
        "fits": context.fits,
    }
    results = sample["filtered_resps"]
    if question.kind == "text":
        record |= {"log_prob": results[0], "bytes": utf8_bytes(question.question)}
    elif context.fits:
        model_output = task.model_output(question, results)
        if "first_token" in task.methods:
            record["log_probs"] = model_output.letters
        if "generate" in task.methods:
            record["text"] = model_output.text
    return record


def notes(records: list[dict]) -> list[str]:
    """What a reader must know of the prompts: examples skipped, questions not asked."""
    lines = []
    dropped = [record["dropped_shots"] for record in records if record["dropped_shots"] and record["fits"]]
    if dropped:
        lines.append(f"{sum(dropped)} examples of {len(dropped)} prompts skipped, which did not fit")
    unasked = sum(not record["fits"] for record in records)
    if unasked:
        lines.append(f"{unasked} questions do not fit even without examples: not asked, scored 0")
    return lines


def records_folder(output: Path, model: str) -> Path:
    """Where the records of a model are, by its column's name."""
    return output / "records" / (re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("_") or "model")


def write_records(folder: Path, benchmark: str, records: list[dict], results: dict) -> None:
    """Writes what `run_benchmark` gives."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(folder / f"{benchmark}.jsonl", lines)
    kept = {name: results[name] for name in RESULTS if name in results}
    replace_file(folder / f"{benchmark}.lm_eval.json", json.dumps(kept, indent=1, default=str) + "\n")


def read_records(output: Path, model: str, benchmark: str) -> dict[str, dict]:
    """The records of one model and benchmark by question id.

    Raises:
        UserError: they were not written.
    """
    path = records_folder(output, model) / f"{benchmark}.jsonl"
    records = {record["id"]: record for record in read_lines(path)}
    if not records:
        raise UserError(f"{path} holds no records: run evaluate.py with this model and benchmark")
    return records
