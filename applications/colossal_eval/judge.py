"""Judge responses by any OpenAI-compatible endpoint: `judge.py --questions DATA/mt_bench --answers A.jsonl B.jsonl
--judge MODEL --output OUT`.

One file of responses: ratings of 1 to 10 for every turn. Several: every pair is compared too, in both orders. Judgments
are kept as they come; a run that was killed continues, and what failed is asked again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import as_completed
from contextlib import closing
from functools import partial
from pathlib import Path

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from coati.files import replace_file
from coati.judges import Judge, Question
from coati.tracking.config import TrackingConfig
from coati.tracking.progress import progress_bar
from colossal_eval.benchmarks.prepared_folder import read_dialogues
from colossal_eval.llm_judge.cases import Case, make_cases, read_responses
from colossal_eval.llm_judge.judge_prompts import OURS, read_prompts
from colossal_eval.llm_judge.verdicts import read_verdict, report_text, summarize
from colossal_eval.run.response_store import ResponseStore, digest


@settings
class JudgeConfig(Settings):
    """Settings of judge.py."""

    questions: str = option(
        "runs/eval/data/mt_bench", "what prepare.py made of MT-Bench, or a folder in its form", path="file"
    )
    answers: ListOf[str] = option((), "files of responses, one per model; the file's name is the model's", path="file")
    references: str | None = option(None, "file of right answers, for questions that have them", path="file")
    prompts: str | None = option(None, "prompts for the judge in FastChat's form; ours if not given", path="file")
    output: str = option("runs/eval/judge", "folder of judgments and report; continued if it is there", path="output")
    judge: str = option("", "the judge's name at the endpoint")
    endpoint: str | None = option(None, "URL of the API, such as http://localhost:8000/v1; else OPENAI_BASE_URL")
    api_key_variable: str = option("OPENAI_API_KEY", "the environment variable that holds the key")
    temperature: float = option(0.0, "of the judge", ge=0)
    max_tokens: int = option(2048, "longest judgment", gt=0)
    workers: int = option(8, "judgments asked for at the same time", gt=0)
    attempts: int = option(4, "how often a judgment is asked for before it counts as failed", gt=0)
    timeout: float = option(120.0, "seconds that one response of the endpoint may take", gt=0)
    progress: str = option("auto", "auto, bar, plain or off")

    def check(self):
        """Raises a UserError for settings that can't be."""
        if not self.answers or not self.judge:
            raise UserError("name at least one file with --answers, and the judge with --judge")
        names = [Path(path).stem for path in self.answers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two files of responses are called {twice[0]}: their names are the models'")


def load_cases(config: JudgeConfig) -> list[Case]:
    """Everything to judge.

    Raises:
        UserError: a file is wrong, or a model has no response to a question; it names both.
    """
    prompts = read_prompts(Path(config.prompts) if config.prompts else OURS)
    responses = {Path(path).stem: read_responses(Path(path)) for path in config.answers}
    references = read_responses(Path(config.references)) if config.references else {}
    return make_cases(read_dialogues(Path(config.questions)), responses, references, prompts)


def question_of(case: Case) -> Question:
    """A case as the judge's client takes it."""
    return Question(case.messages, case.kind, partial(read_verdict, case.kind))


def judge_all(config: JudgeConfig, cases: list[Case]) -> Iterator[dict]:
    """A record per case."""
    store = ResponseStore(Path(config.output))
    keys = [digest(config.judge, config.temperature, case.kind, case.messages) for case in cases]
    waiting = [(key, case) for key, case in zip(keys, cases, strict=True) if key not in store]
    print(f"{len(cases)} judgments by {config.judge}: {len(cases) - len(waiting)} reused, {len(waiting)} to ask for")
    failures: dict[str, list[str]] = {}
    endpoint = Judge(
        config.judge,
        endpoint=config.endpoint,
        api_key_variable=config.api_key_variable,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        concurrency=config.workers,
        attempts=config.attempts,
        timeout=config.timeout,
    )
    tracking = TrackingConfig(progress=config.progress)
    with closing(endpoint), progress_bar(len(waiting), "judging", tracking) as bar:
        tasks = {endpoint.submit(question_of(case)): key for key, case in waiting}
        for task in as_completed(tasks):
            verdict, key = task.result(), tasks[task]
            errors = list(verdict.errors)
            if verdict.value is None:
                failures[key] = errors
            else:
                judgment = {"text": verdict.text, "verdict": verdict.value, "errors": errors}
                store.append([{"key": key, "answer": judgment}])
            bar.advance()
    for key, case in zip(keys, cases, strict=True):
        record = {"id": case.question.id, "category": case.question.category, "turn": case.turn, "kind": case.kind}
        record |= {"models": list(case.models), "messages": case.messages}
        if key in store:
            record |= store[key]
        else:
            record |= {"verdict": None, "errors": failures[key]}
        yield record


def judge(config: JudgeConfig) -> dict:
    """Judges, writes judgments.jsonl, report.json and report.md, and returns the report.

    Raises:
        UserError: a wrong setting or file, or an endpoint that refuses.
    """
    config.check()
    cases = load_cases(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    records = list(judge_all(config, cases))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(output / "judgments.jsonl", lines)
    report = {"judge": config.judge} | summarize(records)
    replace_file(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    replace_file(output / "report.md", report_text(report))
    print(report_text(report))
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""
    return run_command(lambda: int(judge(parse_config(JudgeConfig, argv, description=__doc__))["failed"] > 0))


if __name__ == "__main__":
    sys.exit(main())
