"""The prompts of a judge, ours or a file in FastChat's form (Zheng et al., 2306.05685: MT-Bench and LLM-as-a-judge)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coati.errors import UserError
from colossal_eval.benchmarks.published_rows import jsonl_rows

OURS = Path(__file__).with_name("judge_prompts.jsonl")
KINDS = ("single", "pairwise")


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt in FastChat's form; its placeholders say what it is for."""

    name: str
    kind: str
    system: str
    text: str

    @property
    def with_reference(self) -> bool:
        return "{ref_answer_" in self.text

    @property
    def turn(self) -> int:
        """1, or 2 for what is judged after the second turn."""
        return 2 if "{question_2}" in self.text else 1

    def messages(self, **values: str) -> list[dict[str, str]]:
        """The conversation that the judge is sent."""
        prompt_text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.text)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": prompt_text}]


def read_prompts(path: Path = OURS) -> list[JudgePrompt]:
    """The prompts of a file: rows `{"name", "type", "system_prompt", "prompt_template"}`.

    Raises:
        UserError: the file can't be read, or a row isn't such a one; it names the line.
    """
    prompts = []
    for number, row in read_objects(path):
        try:
            prompt = JudgePrompt(row["name"], row["type"], row["system_prompt"], row["prompt_template"])
        except KeyError as error:
            message = f"{path}:{number} lacks {error}: a prompt has name, type, system_prompt and prompt_template"
            raise UserError(message) from error
        if prompt.kind not in KINDS:
            raise UserError(f"{path}:{number}: the type {prompt.kind!r} is none of {', '.join(KINDS)}")
        prompts.append(prompt)
    return prompts


def read_objects(path: Path) -> Iterator[tuple[int, dict]]:
    """The lines of a .jsonl file with their numbers.

    Raises:
        UserError: the file can't be read, or a line is no JSON object.
    """
    for number, row in jsonl_rows(path):
        if isinstance(row, ValueError):
            raise UserError(f"{path}:{number} is not JSON: write one JSON object per line")
        yield number, row


def choose_prompt(prompts: Sequence[JudgePrompt], kind: str, turn: int, with_reference: bool) -> JudgePrompt:
    """The prompt for a kind and turn, with a reference if there is one and a prompt for it.

    Raises:
        UserError: there is none for this kind and turn.
    """
    fits = [p for p in prompts if (p.kind, p.turn) == (kind, turn) and (with_reference or not p.with_reference)]
    if not fits:
        raise UserError(f"no prompt of type {kind} for turn {turn}: --prompts must have one without a reference")
    return max(fits, key=lambda prompt: prompt.with_reference)
