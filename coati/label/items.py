"""Items: a prompt and the responses to it that people compare. From files, checked line by line."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.data import load_rows, parse_record
from coati.data.messages import Messages
from coati.errors import UserError

MOST_CHARACTERS = 200_000  # of a prompt or a response: a page shows it whole


@dataclass(frozen=True)
class Response:
    """A response and the name of the model that it is from, "" where that isn't known."""

    text: str
    model: str = ""


@dataclass(frozen=True)
class Item:
    """A prompt with two or more responses.

    Attributes:
        key: the row's `id`, or a hash of the row; the same row always has the same.
        prompt: as the row has it, text or messages.
        messages: the same as role and content.
    """

    key: str
    prompt: Any
    messages: list[dict[str, Any]]
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt to which models draw responses.

    Attributes:
        place: where it stands, for messages.
        key: the row's `id`, or a hash of the prompt.
        prompt: as the row has it, text or messages; dialogue: the same as messages.
    """

    place: str
    key: str
    prompt: Any
    dialogue: Messages


def read_prompts(path: Path) -> list[AskedPrompt]:
    """The prompts of a file of `{"prompt", "id"}` rows; one that is there twice without an id is one.

    Raises:
        UserError: a row is wrong (with its line), two have the same id, or there is none.
    """
    prompts: dict[str, AskedPrompt] = {}
    for place, row in rows_of(path):
        prompt, key = row.get("prompt"), row.get("id")
        key = make_item(place, prompt, ["to be drawn"], _hash(prompt) if key is None else key).key
        if key in prompts and "id" in row:
            raise UserError(f"{place}: the id {key!r} is there already; give every row an `id` of its own")
        prompts.setdefault(key, AskedPrompt(place, key, prompt, dialogue(place, prompt)))
    if not prompts:
        raise UserError(f'{path} has no prompts; write rows of {{"prompt": ...}}')
    return list(prompts.values())


def read_items(path: Path) -> list[Item]:
    """The items of a file of `{"prompt", "responses": [{"text", "model"}, ...], "id"}` rows.

    Raises:
        UserError: a row is wrong (with its line), or two have the same id.
    """
    items: dict[str, Item] = {}
    for place, row in rows_of(path):
        texts = row.get("responses")
        if not isinstance(texts, list) or len(texts) < 2:
            raise UserError(f"{place}: `responses` must be a list of two or more; add some, or remove the row")
        item = make_item(place, row.get("prompt"), texts, row.get("id"))
        if item.key in items:
            raise UserError(f"{place}: the id {item.key!r} is there already; give every row an `id` of its own")
        items[item.key] = item
    return list(items.values())


def join_items(sources: dict[str, Path]) -> tuple[list[Item], int]:
    """Items from files of `{"prompt", "response"}` rows by model, joined by prompt; and how many prompts were left out
    because a single response is there.

    Raises:
        UserError: a row is wrong (with its line).
    """
    prompts: dict[str, tuple[str, Any]] = {}
    responses: dict[str, list[Any]] = {}
    for model, path in sources.items():
        for place, row in rows_of(path):
            text = row.get("response", row.get("completion"))
            key = _canonical(row.get("prompt"))
            prompts.setdefault(key, (place, row.get("prompt")))
            responses.setdefault(key, []).append({"text": text, "model": model})
            make_item(place, row.get("prompt"), [responses[key][-1]])  # a mistake is said of its own line
    joined = [(*prompts[key], found) for key, found in responses.items() if len(found) > 1]
    return [make_item(place, prompt, found) for place, prompt, found in joined], len(responses) - len(joined)


def read_scores(path: Path, items: Sequence[Item]) -> dict[str, list[float]]:
    """Scores of an item's responses, in their order, by the item's key.

    A row names its item by `id` or `prompt` and has `scores`, or `responses` each with a `score`; so a file of items
    may be one of scores as well.

    Raises:
        UserError: a row is wrong (with its line), or no row is about any of the items.
    """
    by_key = {item.key: item for item in items}
    by_prompt = {_canonical(item.prompt): item for item in items}
    found: dict[str, list[float]] = {}
    for place, row in rows_of(path):
        item = by_key.get(str(row["id"])) if "id" in row else by_prompt.get(_canonical(row.get("prompt")))
        if item is None:
            continue
        scores = row.get("scores")
        if scores is None and isinstance(row.get("responses"), list):
            scores = [value.get("score") if isinstance(value, dict) else None for value in row["responses"]]
        if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
            raise UserError(f"{place}: no `scores` that are a list of numbers, and no `score` in each of `responses`")
        if len(scores) != len(item.responses):
            raise UserError(f"{place}: {len(scores)} scores for {len(item.responses)} responses; give one for each")
        found[item.key] = scores
    if not found:
        raise UserError(f"{path} has no scores of these items; name them by `id` or `prompt`")
    return found


def completion(prompt: Any, text: str) -> Any:
    """A response as a row of training data has it beside this prompt: text beside text, messages beside messages."""
    if isinstance(prompt, str) and not text.startswith("\n\nHuman:"):  # which would be read as a dialogue
        return text
    return [{"role": "assistant", "content": text}]


def text_fault(text: Any) -> str | None:
    """Why a text can't be a response, if it can't."""
    if not isinstance(text, str) or not text.strip():
        return "it is not a text, or empty"
    if len(text) > MOST_CHARACTERS:
        return f"it has more than {MOST_CHARACTERS} characters"
    if not is_unicode(text):
        return "it has half a surrogate pair"
    return None


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of rows, with their place (file and line, or number in a list).

    Raises:
        UserError: the file isn't there, or a row is no object.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; name one of JSON lines")
    for number, row in load_rows(str(path)):
        place = f"{path}:{number}"
        if not isinstance(row, dict):
            raise UserError(f"{place}: {row if isinstance(row, ValueError) else 'the row is no object'}")
        yield place, row


def _response(place: str, value: Any) -> Response:
    value = {"text": value} if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise UserError(f'{place}: a response is neither a text nor an object; write {{"text": ..., "model": ...}}')
    if fault := text_fault(value.get("text")):
        raise UserError(f"{place}: a response can't be shown, {fault}; correct or remove it")
    model = value.get("model") or ""
    if not isinstance(model, str):
        raise UserError(f"{place}: the `model` of a response is not a text")
    return Response(value["text"], model)


def make_item(place: str, prompt: Any, values: Sequence[Any], key: Any = None) -> Item:
    """An item, checked.

    Args:
        place: where it stands, for messages.
        values: responses as a row has them.
        key: the row's id, if it has one.

    Raises:
        UserError: the prompt or a response is wrong.
    """
    responses = [_response(place, value) for value in values]
    if not isinstance(prompt, str | list):
        raise UserError(f"{place}: `prompt` is neither a text nor a list of messages")
    messages = [_shown(message) for message in dialogue(place, prompt, responses[0].text)]
    if not all(is_unicode(message["content"]) for message in messages):
        raise UserError(f"{place}: the prompt has half a surrogate pair; write the file as UTF-8")
    if sum(len(message["content"]) for message in messages) > MOST_CHARACTERS:
        raise UserError(f"{place}: the prompt has more than {MOST_CHARACTERS} characters")
    if key is not None and not (isinstance(key, str | int) and is_unicode(str(key))):
        raise UserError(f"{place}: `id` is neither a text nor an integer")
    if key is None:
        key = _hash([prompt, [[response.text, response.model] for response in responses]])
    return Item(str(key), prompt, messages, tuple(responses))


def dialogue(place: str, prompt: Any, text: str = "a response") -> Messages:
    """A prompt as messages, checked as that of a row of training data in which the text is a response to it.

    Raises:
        UserError: it can't be one.
    """
    row = {"prompt": prompt, "chosen": completion(prompt, text), "rejected": completion(prompt, text + ".")}
    try:
        [record] = parse_record(row, "preference")
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    return record.prompt


def _shown(message: dict[str, Any]) -> dict[str, str]:
    """What a page shows of a message: calls of tools as JSON below its text."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    parts = [message["content"], *calls]
    return {"role": message["role"], "content": "\n\n".join(part for part in parts if part)}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _hash(value: Any) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()[:16]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
