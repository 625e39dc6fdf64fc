"""Records, and the formats they are read from.

One row (a dict from a JSON line or a table) becomes one or more records; what each format looks like is in
`parse_record`. A message is `{"role": "system" | "user" | "assistant", "content": text}`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["sft", "preference", "unpaired", "prompt"]
Messages = list[dict[str, str]]

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# The fields a prompt is made from; every other field of a prompt row is handed to the reward functions.
PROMPT_FIELDS = {"prompt", "messages", "conversations", "context", "question", "instruction", "input", "instances"}
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class SFTRecord:
    """A dialogue whose last message is the assistant's."""

    messages: Messages


@dataclass(frozen=True)
class PreferenceRecord:
    """A dialogue up to a user message, and two ways in which it goes on (from an assistant message)."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None


@dataclass(frozen=True)
class UnpairedRecord:
    """A dialogue up to a user message, and one way in which it goes on, which is good or bad."""

    prompt: Messages
    answer: Messages
    desirable: bool


@dataclass(frozen=True)
class PromptRecord:
    """A dialogue up to a user message, and the row's other fields (for reward functions)."""

    prompt: Messages
    columns: dict[str, Any] = field(default_factory=dict)


Record = SFTRecord | PreferenceRecord | UnpairedRecord | PromptRecord


def parse_record(row: Any, kind: Kind) -> list[Record]:
    """Read one row; a self-instruct row gives one record an instance, a pair read as `unpaired` gives two, every other
    row gives one.

    Dialogues (`sft`, `prompt`):
      - `messages`: list of role/content (OpenAI) or from/content (ColossalChat)
      - `conversations`: list of from/value (ShareGPT: human, gpt, system)
      - `prompt` + `completion` or `response`: text or messages
      - `instruction`, `input`, `output` (alpaca); `instruction` + `instances` of input/output (self-instruct)
      - `question` + `answer` (GSM8K)
    Preferences:
      - `prompt`, `chosen`, `rejected`: text or messages; `context`, `chosen`, `rejected` (ColossalChat)
      - `chosen`, `rejected` alone: whole message lists or HH-RLHF texts; the prompt is what they share
      - optional `margin`, or `score_chosen` and `score_rejected` (their difference is the margin)
    Unpaired preferences (`unpaired`):
      - any dialogue above with a `label`: true for a good last answer, false for a bad one (TRL)
      - any preference above: the chosen answer is a good one, the rejected answer a bad one
    Prompts come from any of these, without the last assistant answer.

    An HH-RLHF text starts with a blank line and `Human:`. `Human:` and `Assistant:` after a blank line begin
    a turn; elsewhere these words are plain text. The format is ambiguous: a message that itself has a
    paragraph which starts so reads as two turns. Neighbouring turns of one role are joined into one.

    Raises `ValueError` with a short reason, equal for equal faults so that reasons can be counted.
    """
    if not isinstance(row, dict):
        raise ValueError("the row is not an object with named fields")
    row = {key: value for key, value in row.items() if value is not None}
    if kind == "preference":
        return [_preference(row)]
    if kind == "unpaired":
        return _unpaired(row)
    if kind == "prompt":
        return [
            PromptRecord(_check(_without_answer(dialogue), last="user"), columns)
            for dialogue, columns in _dialogues(row, kind)
        ]
    return [SFTRecord(_check(dialogue, last="assistant")) for dialogue, _ in _dialogues(row, kind)]


def _dialogues(row: dict, kind: Kind) -> list[tuple[Messages, dict[str, Any]]]:
    """The row's dialogues, not checked yet, each with the columns that belong to it."""
    columns = {key: value for key, value in row.items() if key not in PROMPT_FIELDS}
    if "messages" in row:
        return [(_messages(row["messages"], "messages"), columns)]
    if "conversations" in row:
        return [(_messages(row["conversations"], "conversations"), columns)]
    if "instruction" in row and "instances" in row:
        instances = row["instances"]
        if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
            raise ValueError("`instances` is not a list of objects")
        return [(_alpaca({**i, "instruction": row["instruction"]}), {**columns, **_output(i)}) for i in instances]
    if "instruction" in row:
        return [(_alpaca(row), columns)]
    if kind == "prompt" and "chosen" in row and "rejected" in row:
        return [(_sides(row)[0], columns)]
    for prompt, answers in (("prompt", ("completion", "response")), ("question", ("answer",))):
        answer = next((name for name in answers if name in row), None)
        if prompt in row and (answer or kind == "prompt"):
            answer_turns = _turns(row[answer], "assistant", answer) if answer else []
            return [(_turns(row[prompt], "user", prompt) + answer_turns, columns)]
    raise ValueError(f"no known fields for {kind} data")


def _output(instance: dict) -> dict[str, Any]:
    return {"output": instance["output"]} if "output" in instance else {}


def _alpaca(row: dict) -> Messages:
    user = _text(row["instruction"], "instruction")
    if row.get("input") not in (None, ""):
        user += "\n\n" + _text(row["input"], "input")
    answer = [] if row.get("output") is None else [_message("assistant", row["output"], "output")]
    return [_message("user", user, "instruction"), *answer]


def _preference(row: dict) -> PreferenceRecord:
    prompt, chosen, rejected = _sides(row)
    for side in (chosen, rejected):
        _check(prompt + side, last="assistant")
    _check(prompt, last="user")
    if chosen == rejected:
        raise ValueError("`chosen` equals `rejected`")
    return PreferenceRecord(prompt, chosen, rejected, _margin(row))


def _unpaired(row: dict) -> list[Record]:
    if "label" not in row and "chosen" in row and "rejected" in row:
        pair = _preference(row)
        return [UnpairedRecord(pair.prompt, pair.chosen, True), UnpairedRecord(pair.prompt, pair.rejected, False)]
    if row.get("label") not in (True, False):
        raise ValueError("no `label` field that is true or false")
    dialogues = [_check(dialogue, last="assistant") for dialogue, _ in _dialogues(row, "unpaired")]
    return [UnpairedRecord(dialogue[:-1], dialogue[-1:], bool(row["label"])) for dialogue in dialogues]


def _sides(row: dict) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected, not checked yet."""
    if "chosen" not in row or "rejected" not in row:
        raise ValueError("no `chosen` and `rejected` fields")
    chosen, rejected = (_turns(row[name], "assistant", name) for name in ("chosen", "rejected"))
    given = "prompt" if "prompt" in row else "context" if "context" in row else None
    if given:
        prompt = _turns(row[given], "user", given)
        shared = len(prompt)
        # Some sets give the prompt and repeat it in front of both answers.
        if chosen[:shared] == prompt == rejected[:shared]:
            return prompt, chosen[shared:], rejected[shared:]
        return prompt, chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if shared == 0:
        raise ValueError("`chosen` and `rejected` do not share a prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _margin(row: dict) -> float | None:
    if "margin" in row:
        margin = row["margin"]
    elif "score_chosen" in row and "score_rejected" in row:
        chosen, rejected = row["score_chosen"], row["score_rejected"]
        margin = chosen - rejected if _is_number(chosen) and _is_number(rejected) else None
    else:
        return None
    if not _is_number(margin):
        raise ValueError("the margin is not a finite number")
    return float(margin)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _turns(value: Any, role: str, name: str) -> Messages:
    """Messages from a message list, an HH-RLHF text, or a plain text (which is one message of `role`)."""
    if isinstance(value, list):
        return _messages(value, name)
    text = _text(value, name)
    if not text.startswith("\n\nHuman:"):
        return [{"role": role, "content": text}]
    turns = _hh_turns(text)
    # An HH-RLHF prompt ends in "Assistant:", the start of a turn that the answers fill.
    open_turn = role == "user" and turns[-1] == {"role": "assistant", "content": ""}
    return turns[:-1] if open_turn else turns


def _hh_turns(text: str) -> Messages:
    parts = HH_TURN.split(text)
    messages: Messages = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = ROLES[speaker.lower()], content.strip()
        if messages and messages[-1]["role"] == role:
            content = messages.pop()["content"] + "\n\n" + content
        messages.append({"role": role, "content": content})
    return messages


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"`{name}` is not a list of messages")
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"`{name}` has a role that is not system, user or assistant")
        messages.append(_message(ROLES[role], message.get("content", message.get("value")), name))
    return messages


def _message(role: str, content: Any, name: str) -> dict[str, str]:
    return {"role": role, "content": _text(content, name)}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` has content that is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` has text that is not valid Unicode") from None
    return value


def _without_answer(messages: Messages) -> Messages:
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _check(messages: Messages, last: str) -> Messages:
    """Roles are [system] user assistant user ... `last`, and every content but the system's has text."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("there are no messages")
    for i, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[i % 2]:
            raise ValueError("the roles do not alternate user, assistant (after an optional system message)")
        if not message["content"].strip():
            raise ValueError("an answer is empty" if message["role"] == "assistant" else "a prompt is empty")
    if turns[-1]["role"] != last:
        raise ValueError(f"the last message is not from the {last}")
    return messages
