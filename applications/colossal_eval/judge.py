"""Judge answers by any OpenAI-compatible endpoint: `judge.py --questions DATA/mt_bench --answers A.jsonl B.jsonl
--judge MODEL --output OUT`.

One file of answers: ratings of 1 to 10 for every turn. Several: every pair is compared too, in both orders. Judgements
are kept as they come; a run that was killed goes on, and what failed is asked again.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from coati.config import Settings, option, parse_config
from coati.errors import UserError, run_command
from coati.tracking.config import TrackingConfig
from coati.tracking.files import replace_file
from coati.tracking.progress import progress_bar
from colossal_eval.benchmarks.question import Question, read_questions
from colossal_eval.llm_judge.judge_prompts import OURS, Case, make_case, read_answers, read_templates, read_verdict
from colossal_eval.llm_judge.verdicts import summarise, table
from colossal_eval.run.response_store import AnswerStore, digest

PAUSE = 1.0  # seconds, doubled with every attempt


@dataclass
class JudgeConfig(Settings):
    """Settings of judge.py."""

    questions: str = option(
        "runs/eval/data/mt_bench", "what prepare.py made of MT-Bench, or a folder in its form", path="file"
    )
    answers: list[str] = option((), "files of answers, one a model; the file's name is the model's", path="file")
    references: str | None = option(None, "file of right answers, for questions that have them", path="file")
    prompts: str | None = option(None, "prompts for the judge in FastChat's form; ours if not given", path="file")
    output: str = option(
        "runs/eval/judge", "folder of judgements and report; gone on with if it is there", path="output"
    )
    judge: str = option("", "the judge's name at the endpoint")
    endpoint: str | None = option(None, "URL of the API, such as http://localhost:8000/v1; else OPENAI_BASE_URL")
    api_key_variable: str = option("OPENAI_API_KEY", "the environment variable that holds the key")
    temperature: float = option(0.0, "of the judge", ge=0)
    max_tokens: int = option(2048, "longest judgement")
    workers: int = option(8, "judgements asked for at the same time")
    attempts: int = option(4, "how often a judgement is asked for before it counts as failed")
    timeout: float = option(120.0, "seconds that one answer of the endpoint may take")
    progress: str = option("auto", "auto, bar, plain or off")

    def check(self):
        """Raises a UserError for settings that can't be."""
        if not self.answers or not self.judge:
            raise UserError("name at least one file with --answers, and the judge with --judge")
        for name in ("workers", "attempts", "timeout", "max_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} is {getattr(self, name)}: give a number above 0")
        names = [Path(path).stem for path in self.answers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two files of answers are called {twice[0]}: their names are the models'")


def load_cases(config: JudgeConfig) -> list[Case]:
    """Everything to judge.

    Raises:
        UserError: a file is wrong, or a model has no answer to a question; it names both.
    """
    templates = read_templates(Path(config.prompts) if config.prompts else OURS)
    answers = {Path(path).stem: read_answers(Path(path)) for path in config.answers}
    references = read_answers(Path(config.references)) if config.references else {}
    folder = Path(config.questions)
    files = sorted((folder / "test").glob("*.jsonl"))
    if not files:
        raise UserError(f"{folder} has no test/*.jsonl: make it with prepare.py --benchmark mt_bench")
    cases = []
    for question in itertools.chain.from_iterable(map(read_questions, files)):
        turns = {model: _turns(question, model, given) for model, given in answers.items()}
        groups = [(model,) for model in turns]
        for one, other in itertools.combinations(turns, 2):
            groups += [(one, other), (other, one)]
        for group, turn in itertools.product(groups, range(1, len(question.turns) + 2)):
            chosen = {model: turns[model] for model in group}
            cases.append(make_case(question, turn, chosen, references.get(question.id), templates))
    return cases


def _turns(question: Question, model: str, given: dict[str, list[str]]) -> list[str]:
    found, needed = given.get(question.id, []), len(question.turns) + 1
    if len(found) < needed:
        raise UserError(f"{model} answers {len(found)} of the {needed} turns of question {question.id}")
    return found


class Judge:
    """Asks the endpoint. Errors that pass (too many requests, a timeout, an answer that is no JSON or has no verdict)
    are asked again, `attempts` times in all."""

    def __init__(self, config: JudgeConfig):
        from openai import OpenAI

        self.config = config
        key = os.environ.get(config.api_key_variable, "none")  # local servers ask for none, but the client does
        self.client = OpenAI(base_url=config.endpoint, api_key=key, timeout=config.timeout, max_retries=0)
        self.stopped = threading.Event()

    def __call__(self, case: Case) -> tuple[dict | None, list[str]]:
        """The judgement `{"text", "verdict"}`, None if there is none, and what went wrong on the way.

        Raises:
            UserError: the endpoint refuses the key or doesn't know the judge.
        """
        import openai

        errors: list[str] = []
        for attempt in range(self.config.attempts):
            if attempt and self.stopped.wait(min(2.0**attempt, 30.0) * PAUSE):
                break
            try:
                text = self._ask(case)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise UserError(f"the endpoint refuses --judge {self.config.judge}: {error}") from error
            except (openai.OpenAIError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:300])
                continue
            verdict = read_verdict(case.kind, text)
            if verdict is not None:
                return {"text": text, "verdict": verdict}, errors
            errors.append(f"no verdict in {text[-200:]!r}")
        return None, errors

    def _ask(self, case: Case) -> str:
        c = self.config
        found = self.client.chat.completions.create(
            model=c.judge, messages=case.messages, temperature=c.temperature, max_tokens=c.max_tokens
        )
        choices = getattr(found, "choices", None)
        if not choices or not choices[0].message.content:
            raise ValueError(f"the endpoint gave no text: {found!r}"[:300])
        return choices[0].message.content


def judge_all(config: JudgeConfig, cases: list[Case]) -> Iterator[dict]:
    """A record a case; those that are on disk first."""
    store = AnswerStore(Path(config.output))
    keys = [digest(config.judge, config.temperature, case.kind, case.messages) for case in cases]
    waiting = [(key, case) for key, case in zip(keys, cases, strict=True) if key not in store]
    print(f"{len(cases)} judgements by {config.judge}: {len(cases) - len(waiting)} reused, {len(waiting)} to ask for")
    failures: dict[str, list[str]] = {}
    ask = Judge(config)
    with ThreadPoolExecutor(config.workers) as pool, _bar(config, len(waiting)) as bar:
        tasks = {pool.submit(ask, case): key for key, case in waiting}
        try:
            for task in as_completed(tasks):
                judgement, errors = task.result()
                key = tasks[task]
                if judgement is None:
                    failures[key] = errors
                else:
                    store.append([{"key": key, "answer": judgement | {"errors": errors}}])
                bar.advance()
        except BaseException:
            ask.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    for key, case in zip(keys, cases, strict=True):
        record = {"id": case.question.id, "category": case.question.category, "turn": case.turn, "kind": case.kind}
        record |= {"models": list(case.models), "messages": case.messages}
        yield record | (store[key] if key in store else {"verdict": None, "errors": failures[key]})


def _bar(config: JudgeConfig, total: int):
    return progress_bar(total, "judging", TrackingConfig(progress=config.progress))


def judge(config: JudgeConfig) -> dict:
    """Judges, writes judgements.jsonl, report.json and report.md, and returns the report.

    Raises:
        UserError: a wrong setting or file, or an endpoint that refuses.
    """
    config.check()
    cases = load_cases(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    records = list(judge_all(config, cases))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    replace_file(output / "judgements.jsonl", lines)
    report = {"judge": config.judge} | summarise(records)
    replace_file(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    replace_file(output / "report.md", table(report))
    print(table(report))
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""
    return run_command(lambda: int(judge(parse_config(JudgeConfig, argv, description=__doc__))["failed"] > 0))


if __name__ == "__main__":
    sys.exit(main())
