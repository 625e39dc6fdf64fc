"""Records, and the formats they are read from.

One row (a dict from a JSON line or a table) becomes one or more records; what each format looks like is in
`parse_record`. What a row and its messages may hold besides is in `coati/data/messages.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from coati.data.messages import Messages, check_turns, read_history, read_messages, read_text, read_tools, read_turns

Kind = Literal["sft", "preference", "comparison", "unpaired", "stepwise", "scored", "prompt", "row"]

MESSAGE_LISTS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
RESPONSES = ("completion", "response", "output", "solution", "answer")
# Where a row has more than one prompt or response, these belong together.
PAIRS = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("input", "output"),
]
STEP_TAG = "ки"  # of Math-Shepherd, behind each step
HELPSTEER_TURN = re.compile(r"\n<extra_id_1>(User|Assistant)\n")  # in a prompt of several turns
SYSTEMS = ("system", "system_prompt")
# Of a dialogue whose prompt is all that is read.
LAST_RESPONSE = "the last response (a prompt ends in front of it)"
# What rewards are called with besides the row's fields.
RESERVED = ("self", "prompts", "responses", "input_ids", "attention_mask", "response_mask", "truncated")


@dataclass(frozen=True)
class SFTRecord:
    """A dialogue whose last message is the assistant's.

    `tools` are JSON schemas for the chat template. Messages before `start` belong to earlier records of the same row:
    they are read, not learned. `unused` names what of the row is in no record.
    """

    messages: Messages
    tools: list[dict] | None = None
    start: int = 0
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class PreferenceRecord:
    """A dialogue up to a user's or a tool's message, and two ways in which it goes on (from an assistant message). In a
    `tie` neither is better."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    tools: list[dict] | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)
    tie: bool = False


@dataclass(frozen=True)
class UnpairedRecord:
    """A dialogue up to a user's or a tool's message, and one way in which it goes on, which is good or bad."""

    prompt: Messages
    response: Messages
    desirable: bool
    tools: list[dict] | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class StepwiseRecord:
    """A dialogue up to a user's or a tool's message, and a response in steps. A step's label says how likely it is
    right, from 0 to 1; None if nobody knows."""

    prompt: Messages
    steps: list[str]
    labels: list[float | None]
    tools: list[dict] | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class ScoredRecord:
    """A dialogue up to a user's or a tool's message, and one way in which it goes on. Its scores are by objective, None
    where it has none."""

    prompt: Messages
    response: Messages
    scores: dict[str, float | None]
    tools: list[dict] | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class PromptRecord:
    """A dialogue up to a user's or a tool's message, and the row's other fields (for reward functions).

    `response` is what the row has for one, as it stands there; `teacher_prompt` the dialogue as a teacher reads it,
    where that differs (`Teaching`).
    """

    prompt: Messages
    columns: dict[str, Any] = field(default_factory=dict)
    tools: list[dict] | None = None
    unused: tuple[str, ...] = field(default=(), compare=False)
    response: Any = field(default=None, compare=False)
    teacher_prompt: Messages | None = None


@dataclass(frozen=True)
class RowRecord:
    """A row as it is, for an environment that begins a dialogue from it."""

    columns: dict[str, Any]
    unused: tuple[str, ...] = field(default=(), compare=False)


Record = SFTRecord | PreferenceRecord | UnpairedRecord | StepwiseRecord | ScoredRecord | PromptRecord | RowRecord


class _Row:
    """A row's fields, taken one by one: what nobody took is left. Nulls are no fields.

    Attributes:
        unread: names of what was taken but is in no record.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.taken: set[str] = set()
        self.unread: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.values and name not in self.taken

    def first(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self), None)

    def pop(self, name: str) -> Any:
        self.taken.add(name)
        return self.values[name]

    def turns(self, name: str, role: str) -> Messages:
        messages, unread = read_turns(self.pop(name), role, name)
        self.unread += unread
        return messages

    def messages(self, name: str) -> Messages:
        messages, unread = read_messages(self.pop(name), name)
        self.unread += unread
        return messages

    def left(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name not in self.taken}

    def unused(self) -> tuple[str, ...]:
        """Names of all that is in no record, for rows whose other fields nobody reads."""
        return tuple(f"`{name}`" for name in self.left()) + tuple(dict.fromkeys(self.unread))


def parse_record(row: Any, kind: Kind, objectives: Sequence[str] = ()) -> list[Record]:
    """Read one row; a self-instruct row gives one record an instance, a pair read as `unpaired` gives two, every other
    row gives one.

    Dialogues (`sft`, `prompt`):
      - `messages`, `conversations` or `conversation`: list of role/content (OpenAI), from/content (ColossalChat) or
        from/value (ShareGPT)
      - a prompt (`prompt`, `instruction`, `question`, `query`, `problem`, `input`) and a response (`completion`,
        `response`, `output`, `solution`, `answer`): text or messages. Beside `instruction`, `input` (alpaca) or
        `context` (Dolly) is a part of the prompt
      - `instruction` + `instances` of input/output (self-instruct)
    Preferences:
      - a prompt as above, or a list of messages that ends with the user's, or `context` (ColossalChat); `chosen` and
        `rejected`: text, a message or messages
      - `chosen`, `rejected` alone: whole message lists or HH-RLHF texts; the prompt is what they share
      - optional `margin`, or `score_chosen` and `score_rejected` (their difference is the margin)
      - read as `comparison`, with an optional `preference`, which is "chosen" or "tie"
    Unpaired preferences (`unpaired`):
      - any dialogue above with a `label`: true for a good last response, false for a bad one (TRL)
      - any preference above: the chosen response is a good one, the rejected response a bad one
    Responses in steps (`stepwise`):
      - a prompt as above, `steps` or `completions` (TRL): a list of texts, and `labels`: for each of them true or
        false, a number from 0 to 1, or null where nothing is known
      - PRM800K: `question.problem`, and of `label.steps` the chosen completions up to the first that is rated -1; 0
        and 1 are right. Where none was chosen, the step that a person wrote, or the first completion if it is wrong
      - Math-Shepherd: `input`, whose steps end in the tag `ки`, and `label`, which has + or - there
      - ProcessBench: `problem`, `steps` and `label`, the index of the first wrong step or -1; what follows has no label
    Responses with scores (`scored`), of these `objectives`:
      - any dialogue above with `scores`, an object with a number for each objective; all of them if none is named
      - HelpSteer2: the objectives are fields of the row. In a prompt of several turns the later ones begin with
        `<extra_id_1>User` or `<extra_id_1>Assistant`
      - null, or no field, where a response has no score of an objective
    Prompts come from any of these, without the last assistant response; all fields that made no part of the prompt are
    the record's columns. A `row` is taken as it is.

    In all others `system` or `system_prompt` is a system message in front, `history` (pairs of texts) are earlier
    turns, and `tools` are for the chat template.

    An HH-RLHF text starts with a blank line and `Human:`. `Human:` and `Assistant:` after a blank line begin
    a turn; elsewhere these words are plain text. The format is ambiguous: a message that itself has a
    paragraph which starts so reads as two turns. Neighboring turns of one role are joined into one.

    Raises `ValueError` with a short reason, equal for equal faults so that reasons can be counted.
    """
    if not isinstance(row, dict):
        raise ValueError("the row is not an object with named fields")
    if kind == "row":
        return [RowRecord(row)]
    if kind == "preference":
        return [_preference(_Row(row))]
    if kind == "comparison":
        return [_preference(_Row(row), may_tie=True)]
    if kind == "unpaired":
        return _unpaired(_Row(row))
    if kind == "stepwise":
        return [_stepwise(_Row(row))]
    if kind == "scored":
        return [_scored(_Row(row), objectives)]
    rows = [_Row(instance) for instance in _instances(row)]
    return [_prompt(one) if kind == "prompt" else _demonstration(one) for one in rows]


def one_record_per_response(record: Record) -> list[Record]:
    """For a demonstration, a record for each of the assistant's messages, which ends with it and learns it alone."""
    if not isinstance(record, SFTRecord):
        return [record]
    records: list[Record] = []
    start = 0
    for end, message in enumerate(record.messages, start=1):
        if message["role"] == "assistant":
            records.append(replace(record, messages=record.messages[:end], start=start))
            start = end
    return records


def _instances(row: dict) -> list[dict]:
    """The row, or for self-instruct's each instance as an alpaca row."""
    if row.get("instruction") is None or row.get("instances") is None:
        return [row]
    instances = row["instances"]
    if not isinstance(instances, list) or not instances or not all(isinstance(i, dict) for i in instances):
        raise ValueError("`instances` is not a list of objects")
    shared = {name: value for name, value in row.items() if name != "instances" and value is not None}
    for name in shared:
        if any(name in instance for instance in instances):
            raise ValueError(f"`{name}` is in the row and in its `instances`; leave one of them out")
    return [{**shared, **instance} for instance in instances]


def _demonstration(row: _Row) -> SFTRecord:
    messages, tools = check_turns(_dialogue(row, "sft"), last="assistant"), _tools(row)
    return SFTRecord(messages, tools, unused=row.unused())


def _prompt(row: _Row) -> PromptRecord:
    response = None
    if name := row.first(MESSAGE_LISTS):
        messages = row.messages(name)
    elif "prompt" in row:
        messages, response = _asked(row, "prompt"), _response_to(row, "prompt")
    elif all(isinstance(row.values.get(name), str | list | dict) for name in ("chosen", "rejected")):
        # The pair is looked at for what it shares; both responses stay columns.
        messages, _, _ = _sides(row)
        row.taken -= {"chosen", "rejected"}
    elif name := row.first(PROMPTS):
        messages, response = _asked(row, name), _response_to(row, name)
    else:
        raise _unknown(row, "prompt")
    if messages and messages[-1]["role"] == "assistant":
        response, messages = messages[-1]["content"], messages[:-1]
        row.unread.append(LAST_RESPONSE)
    messages, tools = check_turns(_with_system(row, messages), last="user"), _tools(row)
    columns = row.left()
    for name in columns:
        if name in RESERVED:
            raise ValueError(f"the field `{name}` has a name that reward functions are called with; rename it")
    return PromptRecord(messages, columns, tools, tuple(dict.fromkeys(row.unread)), response)


def _preference(row: _Row, may_tie: bool = False) -> PreferenceRecord:
    tie = _is_tie(row, may_tie)
    prompt, chosen, rejected = _sides(row)
    prompt = _with_system(row, prompt)
    for side in (chosen, rejected):
        check_turns(prompt + side, last="assistant")
    check_turns(prompt, last="user")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1].get("weight") == 0:
            raise ValueError(f"the last response of `{name}` has weight 0")
    if chosen == rejected:
        raise ValueError("`chosen` equals `rejected`")
    margin, tools = _margin(row), _tools(row)
    return PreferenceRecord(prompt, chosen, rejected, margin, tools, row.unused(), tie)


def _is_tie(row: _Row, may_tie: bool) -> bool:
    """What `preference` says. Where there are no ties, other values than "tie" may mean anything."""
    if not may_tie:
        if row.values.get("preference") == "tie":
            raise ValueError("the row is a tie, of which only a reward model with tie_theta above 1 learns")
        return False
    preference = row.pop("preference") if "preference" in row else "chosen"
    if preference not in ("chosen", "tie"):
        raise ValueError('`preference` is neither "chosen" nor "tie"')
    return preference == "tie"


def _unpaired(row: _Row) -> list[Record]:
    if "label" not in row and "chosen" in row and "rejected" in row:
        pair = _preference(row)
        sides = ((pair.chosen, True), (pair.rejected, False))
        return [UnpairedRecord(pair.prompt, side, good, pair.tools, pair.unused) for side, good in sides]
    if row.values.get("label") not in (True, False):
        raise ValueError("no `label` field that is true or false")
    records: list[Record] = []
    for one in map(_Row, _instances(row.values)):
        desirable = bool(one.pop("label"))
        messages, tools = check_turns(_dialogue(one, "unpaired"), last="assistant"), _tools(one)
        if messages[-1].get("weight") == 0:
            raise ValueError("the labeled response has weight 0")
        records.append(UnpairedRecord(messages[:-1], messages[-1:], desirable, tools, one.unused()))
    return records


def _stepwise(row: _Row) -> StepwiseRecord:
    if isinstance(row.values.get("question"), dict) and isinstance(row.values.get("label"), dict):
        return _prm800k(row)
    if STEP_TAG in str(row.values.get("input", "")) and isinstance(row.values.get("label"), str):
        return _math_shepherd(row)
    if "problem" in row and "steps" in row and "label" in row:
        return _process_bench(row)
    steps_name, prompt_name = row.first(("steps", "completions")), row.first(PROMPTS)
    if steps_name is None or prompt_name is None or "labels" not in row:
        raise _unknown(row, "stepwise")
    prompt = check_turns(_with_system(row, _asked(row, prompt_name)), last="user")
    steps, labels = row.pop(steps_name), row.pop("labels")
    if not isinstance(steps, list) or not all(isinstance(step, str) and step.strip() for step in steps):
        raise ValueError(f"`{steps_name}` is not a list of texts that say something")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"`labels` has no label for each of `{steps_name}`")
    tools = _tools(row)
    return StepwiseRecord(prompt, steps, [_step_label(label) for label in labels], tools, row.unused())


def _prm800k(row: _Row) -> StepwiseRecord:
    """As its README describes it, https://github.com/openai/prm800k."""
    question, listed = row.pop("question"), row.pop("label").get("steps")
    problem = question.get("problem")
    if not isinstance(problem, str) or not isinstance(listed, list):
        raise ValueError("no `question.problem` and `label.steps` as PRM800K has them")
    steps: list[str] = []
    labels: list[float | None] = []
    for one in listed:
        text, rating = _rated_step(one)
        if text is None:
            break
        steps.append(_on_one_line(text))
        labels.append(None if rating is None else float(rating >= 0))
        if rating == -1:
            break
    return StepwiseRecord([{"role": "user", "content": problem}], steps, labels, unused=row.unused())


def _rated_step(step: Any) -> tuple[str | None, int | None]:
    """The text and the rating of a step of PRM800K's; no text where the solution doesn't go on."""
    if not isinstance(step, dict) or not isinstance(step.get("completions"), list):
        raise ValueError("a step of `label.steps` has no list of `completions`")
    completions, chosen, written = step["completions"], step.get("chosen_completion"), step.get("human_completion")
    try:
        if chosen is not None:
            return completions[chosen]["text"], completions[chosen].get("rating")
        if written is not None:
            return (written["text"] if isinstance(written, dict) else written), 1
        if completions and completions[0].get("rating") == -1:
            return completions[0]["text"], -1
    except (LookupError, TypeError, AttributeError):
        raise ValueError("a completion of `label.steps` has no text and rating") from None
    return None, None


def _math_shepherd(row: _Row) -> StepwiseRecord:
    """As its card describes it, https://huggingface.co/datasets/peiyi9979/Math-Shepherd."""
    tagged, labeled = row.pop("input"), row.pop("label")
    pieces = [piece.strip().removeprefix("?").strip() for piece in tagged.split(STEP_TAG)[:-1]]
    signs = []
    for piece in pieces:
        labeled = labeled.lstrip()
        if not labeled.startswith(piece):
            raise ValueError("`label` has other steps than `input`")
        labeled = labeled[len(piece) :].lstrip().removeprefix(STEP_TAG).lstrip()
        signs.append(labeled[:1])
        labeled = labeled[1:]
    problem, first, rest = pieces[0].partition("Step 1:")
    if not problem.strip() or not first or not {*signs} <= {"+", "-"}:
        raise ValueError("no problem, `Step 1:` and + or - after each step, as Math-Shepherd has them")
    steps = [_on_one_line(step) for step in (first + rest, *pieces[1:])]
    prompt = [{"role": "user", "content": problem.strip()}]
    return StepwiseRecord(prompt, steps, [float(sign == "+") for sign in signs], unused=row.unused())


def _process_bench(row: _Row) -> StepwiseRecord:
    """As its paper describes it (2412.06559, section 3), https://huggingface.co/datasets/Qwen/ProcessBench."""
    problem, steps, first_wrong = row.pop("problem"), row.pop("steps"), row.pop("label")
    told = isinstance(problem, str) and isinstance(steps, list) and all(isinstance(step, str) for step in steps)
    if not told or type(first_wrong) is not int or not -1 <= first_wrong < len(steps):
        raise ValueError("no `problem`, list of `steps` and index of a step or -1 as `label`, as ProcessBench has them")
    labels: list[float | None] = [1.0] * len(steps)
    if first_wrong >= 0:
        labels[first_wrong:] = [0.0] + [None] * (len(steps) - first_wrong - 1)
    prompt = [{"role": "user", "content": problem}]
    return StepwiseRecord(prompt, [_on_one_line(step) for step in steps], labels, unused=row.unused())


def _on_one_line(text: str) -> str:
    """Lines within a step would be steps of their own."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _step_label(label: Any) -> float | None:
    if label is None or isinstance(label, bool):
        return label if label is None else float(label)
    if not _is_number(label) or not 0 <= label <= 1:
        raise ValueError("a step's label is neither true, false, null nor a number from 0 to 1")
    return float(label)


def _scored(row: _Row, objectives: Sequence[str]) -> ScoredRecord:
    prompt = row.values.get("prompt")
    if isinstance(prompt, str) and HELPSTEER_TURN.search(prompt):
        row.values["prompt"] = _helpsteer_turns(prompt)
    messages, tools = check_turns(_dialogue(row, "scored"), last="assistant"), _tools(row)
    if messages[-1].get("weight") == 0:
        raise ValueError("the scored response has weight 0")
    if "scores" in row:
        given = row.pop("scores")
        if not isinstance(given, dict):
            raise ValueError("`scores` is no object with a number for each objective")
        row.unread += [f"`scores.{name}`" for name in given if objectives and name not in objectives]
    else:
        given = {name: row.pop(name) for name in objectives if name in row}
    scores = {name: given.get(name) for name in objectives or given}
    for name, score in scores.items():
        if score is not None and not _is_number(score):
            raise ValueError(f"the score `{name}` is no finite number")
    return ScoredRecord(messages[:-1], messages[-1:], scores, tools, row.unused())


def _helpsteer_turns(prompt: str) -> Messages:
    """As its card describes it, https://huggingface.co/datasets/nvidia/HelpSteer2."""
    first, *others = HELPSTEER_TURN.split(prompt)
    turns = zip(others[::2], others[1::2], strict=True)
    return [{"role": "user", "content": first}, *({"role": role.lower(), "content": text} for role, text in turns)]


def _dialogue(row: _Row, kind: Kind) -> Messages:
    """The row's prompt and response, not checked yet."""
    if name := row.first(MESSAGE_LISTS):
        return _with_system(row, row.messages(name))
    for prompt, response in (*PAIRS, *product(PROMPTS, RESPONSES)):
        if prompt in row and response in row:
            prompt_turns = _asked(row, prompt)
            return _with_system(row, prompt_turns + row.turns(response, "assistant"))
    raise _unknown(row, kind)


def _unknown(row: _Row, kind: Kind) -> ValueError:
    names = ", ".join(f"`{name}`" for name in row.values)
    return ValueError(f"no known fields for {kind} data" + (f", only {names}" if names else ""))


def _asked(row: _Row, name: str) -> Messages:
    """The turns of a prompt field, after those of the row's history."""
    turns = row.turns(name, "user")
    more = row.first(("input", "context"))
    if name == "instruction" and more and len(turns) == 1:
        texts = turns[0]["content"], read_text(row.pop(more), more)
        turns = [{**turns[0], "content": "\n\n".join(text for text in texts if text)}]
    if "history" in row:
        turns = read_history(row.pop("history")) + turns
    return turns


def _response_to(row: _Row, prompt: str) -> Any:
    """The value of the field that responds to a prompt's, which stays where it is; None if there is none."""
    names = [response for asked, response in (*PAIRS, *product(PROMPTS, RESPONSES)) if asked == prompt]
    name = row.first(tuple(names))
    return None if name is None else row.values[name]


def _sides(row: _Row) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected, not checked yet."""
    if "chosen" not in row or "rejected" not in row:
        raise ValueError("no `chosen` and `rejected` fields")
    chosen, rejected = row.turns("chosen", "assistant"), row.turns("rejected", "assistant")
    have_prompts = all(side and side[0]["role"] != "assistant" for side in (chosen, rejected))
    before = set(row.taken)
    prompt = _prompt_of_pair(row)
    if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        # Some sets give the prompt and repeat it in front of both responses.
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    if prompt and not have_prompts:
        return prompt, chosen, rejected
    row.taken = before
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if shared == 0:
        raise ValueError("`chosen` and `rejected` do not share a prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _prompt_of_pair(row: _Row) -> Messages:
    """Of the field that holds it; empty if none does."""
    if "prompt" in row:
        return _asked(row, "prompt")
    for name in MESSAGE_LISTS:
        if name in row:
            messages, unread = read_messages(row.values[name], name)
            # Some sets repeat the chosen dialogue in such a list.
            if messages and messages[-1]["role"] != "assistant":
                row.pop(name)
                row.unread += unread
                return messages
    field = row.first((*PROMPTS, "context"))
    return _asked(row, field) if field else []


def _with_system(row: _Row, messages: Messages) -> Messages:
    """The messages after the system message of the row's own field, if it has one."""
    name = row.first(SYSTEMS)
    if name is None:
        return messages
    text = read_text(row.pop(name), name)
    if not text.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != text:
            raise ValueError(f"`{name}` differs from the dialogue's own system message; leave one of them out")
        return messages
    return [{"role": "system", "content": text}, *messages]


def _tools(row: _Row) -> list[dict] | None:
    return read_tools(row.pop("tools")) if "tools" in row else None


def _margin(row: _Row) -> float | None:
    if "margin" in row:
        margin = row.pop("margin")
    elif "score_chosen" in row and "score_rejected" in row:
        chosen, rejected = row.pop("score_chosen"), row.pop("score_rejected")
        margin = chosen - rejected if _is_number(chosen) and _is_number(rejected) else None
    else:
        return None
    if not _is_number(margin):
        raise ValueError("the margin is not a finite number")
    return float(margin)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
