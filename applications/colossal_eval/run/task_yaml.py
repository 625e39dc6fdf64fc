"""Generates the lm-evaluation-harness configuration of prepared benchmarks: a YAML file per task and group.

A benchmark is a group of categories, a category a group of subjects; both are weighted by size (the report adds the
macro means). `lm_eval --include_path OUTPUT/tasks --tasks mmlu` runs them with any of lm-eval's models too.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.benchmark_settings import METHODS, SETTINGS, TaskOptions
from colossal_eval.benchmarks.prepared_folder import read_questions, read_summary


def subjects_of(benchmark: str, data: Path) -> dict[str, dict]:
    """The subjects of a prepared benchmark, with title, category and counts.

    Raises:
        UserError: a benchmark that is not prepared, or that is for a judge.
    """
    if benchmark not in SETTINGS:
        raise UserError(f"--tasks {benchmark!r} is none of {', '.join(SETTINGS)}")
    return read_summary(data / benchmark)["subjects"]


def write_tasks(benchmark: str, data: Path, folder: Path, options: TaskOptions) -> list[str]:
    """Write the YAML files of one prepared benchmark to `folder`; returns the names of its tasks.

    Raises:
        UserError: see `subjects_of`.
    """
    subjects = subjects_of(benchmark, data)
    main_metric = SETTINGS[benchmark].main_metric
    groups: dict[str, list[str]] = {}
    for subject, about in subjects.items():
        kinds = Counter(q.kind for q in read_questions(data / benchmark / "test" / f"{subject}.jsonl"))
        for kind in sorted(kinds):
            name = _name(benchmark, subject) + ("_multi" if kind == "multi_choice" else "")
            config = task_config(benchmark, data, kind, {"task": name, "subject": subject, **about}, options)
            _write(folder / f"{name}.yaml", config, "TextTask" if kind == "text" else "QuestionTask")
            group = _name(benchmark, about["category"]) + "_group" + ("" if kind == "single_choice" else f"_{kind}")
            groups.setdefault(group, []).append(name)
            metric = main_metric if kind in ("single_choice", "text") else "exact_match"
            _write(folder / f"{group}.yaml", _group(group, groups[group], metric))
    _write(folder / f"{benchmark}.yaml", _group(benchmark, list(groups), main_metric))
    return [name for members in groups.values() for name in members]


def task_config(benchmark: str, data: Path, kind: str, about: dict, options: TaskOptions) -> dict:
    """The configuration of one `QuestionTask` or `TextTask`."""
    setting = SETTINGS[benchmark]
    if kind == "single_choice":
        methods = options.methods or setting.methods
    elif kind == "text":
        methods = []
    else:
        methods = ["generate"]
    return {
        "task": about["task"],
        "task_alias": about["subject"],
        "data": str((data / benchmark).resolve()),
        "subject": about["subject"],
        "title": about["title"],
        "kind": kind,
        "methods": [method for method in METHODS if method in methods],
        "num_fewshot": setting.shots if options.shots is None else options.shots,
        "max_new_tokens": options.max_new_tokens or setting.max_new_tokens,
        "metadata": {"version": 1.0, "category": about["category"], "benchmark": benchmark},
    }


def _name(benchmark: str, text: str) -> str:
    return f"{benchmark}_{re.sub(r'[^A-Za-z0-9]+', '_', text)}"


def _group(name: str, members: list[str], metric: str) -> dict:
    weighted = [{"metric": metric, "weight_by_size": True}]
    return {"group": name, "task": members, "aggregate_metric_list": weighted, "metadata": {"version": 1.0}}


def _write(path: Path, config: dict, task_class: str | None = None) -> None:
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    if task_class is not None:  # a YAML tag, by which lm-eval finds the class
        text = f"class: !function colossal_eval.run.harness_tasks.{task_class}\n{text}"
    path.write_text(text, encoding="utf-8")


def load_tasks(folder: Path, benchmark: str) -> dict:
    """lm-eval's dictionary of the benchmark's tasks and groups, from the YAML files that `write_tasks` wrote."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False).load([benchmark])
