"""What OpenAI's API takes and gives, as far as coati has it: requests are read here, responses written.

Fields that change nothing here are ignored (`IGNORED`), others that coati lacks are refused unless they have the value
that asks for nothing (`NEUTRAL`), and so is any field that the API doesn't have.
"""

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coati.data.messages import Messages

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
}
READ = ("model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs")
READ_BY_CHAT = (*READ, "messages", "max_completion_tokens", "top_logprobs")
READ_BY_COMPLETIONS = (*READ, "prompt", "echo")
MOST_CHOICES, MOST_STOPS, MOST_HEADS, MOST_PROMPTS = 128, 16, 20, 2048
COMPLETION_TOKENS = 16  # of /v1/completions, if it is not told


class ApiError(Exception):
    """A refusal: its HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """A field with a wrong value."""
    return ApiError(400, f"{param} {message}", param, code)


@dataclass(frozen=True)
class Wanted:
    """How a request wants to be completed, whichever way it came.

    Attributes:
        max_tokens: None for as many as there is room for.
        seed: None for another one each time.
        log_probs: of sampled tokens; heads: of how many of the most likely ones besides.
        with_usage: whether a stream ends with the usage.
    """

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    with_usage: bool = False
    log_probs: bool = False
    heads: int = 0


@dataclass(frozen=True)
class ChatRequest:
    """A request to /v1/chat/completions."""

    wanted: Wanted
    messages: Messages


@dataclass(frozen=True)
class CompletionRequest:
    """A request to /v1/completions: prompts as texts or as token ids, and whether they come back with responses."""

    wanted: Wanted
    prompts: list[str | list[int]]
    echo: bool


@dataclass(frozen=True)
class Token:
    """A token of a prompt or a response.

    Attributes:
        log_prob: None for a prompt's first one; top: the most likely tokens there, as texts, bytes and log-probs.
    """

    bytes: bytes
    log_prob: float | None
    top: list[tuple[bytes, float]] = field(default_factory=list)


@dataclass
class Choice:
    """A response, or a piece of one, and its tokens if log-probs are wanted."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


# --- requests


class _Fields:
    """A request's fields, of which null ones count as absent."""

    def __init__(self, body: Any, read: Sequence[str]):
        if not isinstance(body, dict):
            raise ApiError(400, "the body is no JSON object")
        self.values = {name: value for name, value in body.items() if value is not None}
        for name, value in self.values.items():
            if name in read or name in IGNORED:
                continue
            if name not in NEUTRAL:
                raise ApiError(400, f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")
            if value not in NEUTRAL[name]:
                raise refused(name, "is not supported by this server: leave it out", "unsupported_parameter")

    def number(self, name: str, default, low: float, high: float, whole: bool = False):
        value = self.values.get(name, default)
        if value is default:
            return default
        kinds = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            raise refused(name, f"must be {kind} from {low} to {high}, and is {value!r:.80}")
        return value

    def truth(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise refused(name, f"must be true or false, and is {value!r:.80}")
        return value

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not is_text(value):
            raise refused(name, "must be a text")
        return value

    def stops(self) -> tuple[str, ...]:
        value = self.values.get("stop", [])
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(map(is_text, stops)):
            raise refused("stop", f"must be a text or a list of at most {MOST_STOPS}")
        return tuple(stop for stop in stops if stop)

    def wanted(self, **others) -> Wanted:
        options = self.values.get("stream_options", {})
        if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
            raise refused("stream_options", "may have include_usage only")
        return Wanted(
            model=self.text("model"),
            temperature=float(self.number("temperature", 1.0, 0, 2)),
            top_p=float(self.number("top_p", 1.0, 1e-6, 1)),
            n=self.number("n", 1, 1, MOST_CHOICES, whole=True),
            stop=self.stops(),
            seed=self.number("seed", None, -(2**63), 2**63 - 1, whole=True),
            stream=self.truth("stream"),
            with_usage=options.get("include_usage") is True,
            **others,
        )


def read_chat(body: Any) -> ChatRequest:
    """Reads the JSON of a request to /v1/chat/completions.

    Raises:
        ApiError: what it says can't be done.
    """
    fields = _Fields(body, READ_BY_CHAT)
    longest = fields.number("max_tokens", None, 1, 2**31, whole=True)
    longest = fields.number("max_completion_tokens", longest, 1, 2**31, whole=True)
    heads = fields.number("top_logprobs", 0, 0, MOST_HEADS, whole=True)
    log_probs = fields.truth("logprobs")
    if heads and not log_probs:
        raise refused("top_logprobs", "needs logprobs: true")
    wanted = fields.wanted(max_tokens=longest, log_probs=log_probs, heads=heads)
    return ChatRequest(wanted, read_messages(fields.values.get("messages")))


def read_messages(values: Any) -> Messages:
    """Messages whose contents are texts; parts of texts are joined."""
    if not isinstance(values, list) or not values:
        raise refused("messages", "must be a list of at least one message")
    messages = []
    for i, value in enumerate(values):
        place = f"messages[{i}]"
        if not isinstance(value, dict) or value.get("role") not in ("system", "developer", "user", "assistant"):
            raise refused(place, "must have one of the roles system, developer, user and assistant")
        content = value.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = None if None in parts else "".join(map(str, parts))
        if not is_text(content):
            raise refused(place, "must have a content that is a text, or parts of type text")
        role = "system" if value["role"] == "developer" else value["role"]
        messages.append({"role": role, "content": content})
    return messages


def read_completion(body: Any) -> CompletionRequest:
    """Reads the JSON of a request to /v1/completions.

    Raises:
        ApiError: what it says can't be done.
    """
    fields = _Fields(body, READ_BY_COMPLETIONS)
    echo, heads = fields.truth("echo"), fields.number("logprobs", None, 0, MOST_HEADS, whole=True)
    longest = fields.number("max_tokens", COMPLETION_TOKENS, 0 if echo else 1, 2**31, whole=True)
    wanted = fields.wanted(max_tokens=longest, log_probs=heads is not None, heads=heads or 0)
    if echo and wanted.stream:
        raise refused("echo", "is not supported in a stream")
    return CompletionRequest(wanted, read_prompts(fields.values.get("prompt")), echo)


def read_prompts(value: Any) -> list[str | list[int]]:
    """A text, token ids, or a list of either."""
    prompts = value
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(x, int) for x in value)):
        prompts = [value]
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MOST_PROMPTS or not all(map(is_prompt, prompts)):
        raise refused("prompt", f"must be a text, a list of token ids, or a list of 1 to {MOST_PROMPTS} of these")
    return prompts


def is_text(value: Any) -> bool:
    """Whether it is a string that has bytes: JSON can write halves of characters, which have none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_prompt(value: Any) -> bool:
    if is_text(value):
        return True
    return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)


# --- responses


def new_head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """The fields that all parts of a response share."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def chat_choice(choice: Choice, with_log_probs: bool) -> dict[str, Any]:
    """A choice of `chat.completion`."""
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    log_probs = chat_log_probs(choice.tokens) if with_log_probs else None
    return {
        "index": choice.index,
        "message": message,
        "logprobs": log_probs,
        "finish_reason": choice.finish_reason,
    }


def chat_delta(choice: Choice, with_log_probs: bool, is_first: bool) -> dict[str, Any]:
    """A choice of `chat.completion.chunk`."""
    delta = {"role": "assistant"} if is_first else {}
    if choice.text or is_first:
        delta["content"] = choice.text
    log_probs = chat_log_probs(choice.tokens) if with_log_probs and choice.tokens else None
    return {"index": choice.index, "delta": delta, "logprobs": log_probs, "finish_reason": choice.finish_reason}


def chat_log_probs(tokens: Iterable[Token]) -> dict[str, Any]:
    def entry(token: bytes, log_prob: float | None) -> dict[str, Any]:
        return {"token": token.decode(errors="replace"), "logprob": log_prob, "bytes": list(token)}

    content = [
        entry(token.bytes, token.log_prob) | {"top_logprobs": [entry(*head) for head in token.top]} for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_choice(choice: Choice, with_log_probs: bool, offset: int = 0) -> dict[str, Any]:
    """A choice of `text_completion`, or of a chunk of it that begins `offset` characters after the text's beginning."""
    log_probs = completion_log_probs(choice.tokens, offset) if with_log_probs else None
    return {
        "index": choice.index,
        "text": choice.text,
        "logprobs": log_probs,
        "finish_reason": choice.finish_reason,
    }


def completion_log_probs(tokens: Iterable[Token], offset: int = 0) -> dict[str, Any]:
    """Tokens, log-probs, most likely tokens and beginnings in the text as four lists. The token itself is always among
    the most likely ones, as the API has it."""
    names, log_probs, tops, offsets = [], [], [], []
    for token in tokens:
        name = token_name(token.bytes)
        top = {token_name(other): log_prob for other, log_prob in reversed(token.top)}  # of equal names the likelier
        names.append(name)
        log_probs.append(token.log_prob)
        tops.append(None if token.log_prob is None else {name: token.log_prob} | top)
        offsets.append(offset)
        offset += len(token.bytes.decode(errors="ignore"))
    return {"tokens": names, "token_logprobs": log_probs, "top_logprobs": tops, "text_offset": offsets}


def token_name(token: bytes) -> str:
    """A token's text; of parts of characters their bytes, as the API writes them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
