"""From records to token ids and response masks.

A record is rendered by the chat template and the text is tokenized once. Which tokens are labels follows from
where they start in the text: a token is part of a response if it starts inside the response's characters. So the
tokens are those of the whole dialogue, and nothing that a user writes can move the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coati.data.config import DataConfig
from coati.data.left_out import left_out
from coati.data.messages import Messages
from coati.data.records import (
    PreferenceRecord,
    PromptRecord,
    Record,
    RowRecord,
    ScoredRecord,
    SFTRecord,
    StepwiseRecord,
    UnpairedRecord,
)
from coati.data.teaching import PLACE
from coati.data.templates import ChatTemplate, Spans, TurnRewritten, response_spans, template_errors
from coati.steps import last_tokens, step_ends


class SkippedRow(ValueError):
    """Why a good row is skipped."""


class TooLong(SkippedRow):
    """A good row that is skipped for its length."""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids `[seq]` and whether each is part of a response `[seq]` (a response's EOS is)."""

    input_ids: list[int]
    loss_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PreferenceSample:
    """Two responses to one prompt, `tie` if neither is better; only the responses' tokens are in the loss masks."""

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float
    tie: bool = False

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class UnpairedSample:
    """A response that is good or bad; only its tokens are in the loss mask."""

    sequence: TokenSequence
    desirable: bool

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class StepwiseSample:
    """A response in steps: `labels` `[seq]` has the label of a step on the step's last token, and NaN elsewhere. Only
    the response's tokens are in the loss mask."""

    sequence: TokenSequence
    labels: list[float]

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class ScoredSample:
    """A response and its `scores` `[objectives]`, NaN where it has none; only its tokens are in the loss mask."""

    sequence: TokenSequence
    scores: list[float]

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class PromptSample:
    """A prompt up to where the response begins: ids `[seq]`, the rendered text, the row's other fields. Of a row for an
    environment the fields alone. `teacher_ids` is the prompt as a teacher reads it, where that differs; if that has a
    place for a response that is sampled later, up to there, and `teacher_rest` is what comes after it."""

    input_ids: list[int]
    text: str
    columns: dict[str, Any]
    teacher_ids: list[int] | None = None
    teacher_rest: list[int] | None = None

    def __len__(self) -> int:
        """Of the longer prompt."""
        return max(len(self.input_ids), len(self.teacher_ids or ()) + len(self.teacher_rest or ()))


TokenizedSample = TokenSequence | PreferenceSample | UnpairedSample | StepwiseSample | ScoredSample | PromptSample


@dataclass(frozen=True)
class TokenizeResult:
    """The result for a record: a sample or the reason why there is none; and what of its row is not in the sample."""

    sample: TokenizedSample | ValueError
    notes: list[str]


def tokenize(record: Record, tokenizer, config: DataConfig) -> TokenizedSample:
    """The sample of one record, for a tokenizer that went through `prepare_tokenizer`.

    Sequences end with the last learned response's EOS. Raises `TooLong` for a row over `config.max_length` (or
    `config.max_prompt_length`) that may not or can't be truncated, `SkippedRow` for one of which nothing is to be
    learned, and `ValueError` for a row that the template cannot label.
    """
    [result] = tokenize_many([record], tokenizer, config)
    if isinstance(result.sample, ValueError):
        raise result.sample
    return result.sample


def tokenize_many(records: Sequence[Record], tokenizer, config: DataConfig) -> list[TokenizeResult]:
    """As `tokenize`, in one tokenizer call."""
    rendered = [_attempt(_render, record, tokenizer, config) for record in records]
    texts = [piece.text for pieces in rendered if not isinstance(pieces, ValueError) for piece in pieces]
    encoded: Any = {"input_ids": [], "offset_mapping": []}
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    results = []
    for record, pieces in zip(records, rendered, strict=True):
        if isinstance(pieces, ValueError):
            results.append(TokenizeResult(pieces, []))
            continue
        notes = [note for piece in pieces for note in piece.notes]
        encoded_pieces = []
        for piece in pieces:
            input_ids, offsets = next(tokens)
            encoded_pieces.append(_Encoded(piece.text, piece.responses, input_ids, offsets))
        sample = _attempt(_sample, record, encoded_pieces, tokenizer, config)
        results.append(TokenizeResult(sample, list(dict.fromkeys([*record.unused, *notes]))))
    return results


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the `ValueError` (a reason to drop the row) that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


@dataclass(frozen=True)
class _Rendered:
    """A text, the characters of its responses to learn, each in one piece or more, and what it leaves out."""

    text: str
    responses: list[Spans]
    notes: list[str]


@dataclass(frozen=True)
class _Encoded:
    """A rendered text, the characters of its responses, its token ids and their character offsets."""

    text: str
    responses: list[Spans]
    input_ids: list[int]
    offsets: list[tuple[int, int]]

    def text_of(self, token: int) -> str:
        start, end = self.offsets[token]
        return self.text[start:end]


def _render(record: Record, tokenizer, config: DataConfig) -> list[_Rendered]:
    """The texts to tokenize for a record."""
    if isinstance(record, RowRecord):
        return []
    template = ChatTemplate(tokenizer, record.tools, config.template_arguments)
    try:
        if isinstance(record, PromptRecord):
            own = _rendered_prompt(template, record.prompt)
            if record.teacher_prompt is None:
                return [own]
            return [own, *_around_place(_rendered_prompt(template, record.teacher_prompt))]
        if isinstance(record, SFTRecord):
            first = record.start if config.train_on == "all" else len(record.messages) - 1
            return [_with_responses(template, record.messages, first, record.start)]
        if isinstance(record, StepwiseRecord):
            return [_with_responses(template, record.prompt + _response_of(record, config), len(record.prompt))]
        if isinstance(record, ScoredRecord) and all(score is None for score in record.scores.values()):
            raise SkippedRow(f"no score of {', '.join(record.scores) or 'any objective'}")
        sides = [record.chosen, record.rejected] if isinstance(record, PreferenceRecord) else [record.response]
        return [_with_responses(template, record.prompt + side, len(record.prompt)) for side in sides]
    except TurnRewritten as error:
        remedy = "mark responses in it with {% generation %}"
        if isinstance(record, SFTRecord):
            remedy += ", or learn each in a row of its own with --train_on each, or only the last with --train_on last"
        raise ValueError(f"{error} ({remedy})") from None
    except ValueError:
        raise
    except template_errors() as error:
        raise ValueError(f"the chat template refuses the row ({error})") from None


def _response_of(record: StepwiseRecord, config: DataConfig) -> Messages:
    """The steps as one message."""
    if all(label is None for label in record.labels):
        raise SkippedRow("no step has a label")
    separator = config.step_separator
    if any(separator in step for step in record.steps):
        raise ValueError(f"a step contains {separator!r}, which separates steps (another one: --step_separator)")
    return [{"role": "assistant", "content": separator.join(record.steps)}]


def _rendered_prompt(template: ChatTemplate, messages: Messages) -> _Rendered:
    text = template.render(messages, add_generation_prompt=True)
    return _Rendered(text, [], left_out(template, messages, text, is_prompt=True))


def _around_place(prompt: _Rendered) -> list[_Rendered]:
    """The texts before and after the place of a response; the whole text where there is none."""
    texts = prompt.text.split(PLACE)
    if len(texts) > 2:
        raise ValueError("the teacher's prompt has the place of a response more than once")
    return [replace(prompt, text=text) for text in texts]


def _with_responses(template: ChatTemplate, messages: Messages, first: int, start: int = 0) -> _Rendered:
    """A dialogue whose responses from message `first` on are learned, unless their weight is 0."""
    learned = [i for i in range(first, len(messages)) if _is_learned(messages[i])]
    if not learned:
        raise SkippedRow("the responses to learn have weight 0")
    eos = template.tokenizer.eos_token
    if any(_contains(messages[i], eos) for i in learned):
        raise ValueError(f"a response contains the EOS token {eos}, which must only end it")
    text, responses = response_spans(template, messages, learned)
    for pieces in responses:
        if not "".join(text[start:end] for start, end in pieces).replace(eos, "").strip():
            raise ValueError("the chat template writes nothing of a response but its end")
    notes = left_out(template, messages, text, is_prompt=False, start=start)
    if learned[-1] < len(messages) - 1:
        notes.append("the messages after the last response that is learned")
    return _Rendered(text, responses, notes)


def _is_learned(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _contains(value: Any, text: str) -> bool:
    """Whether the text is in one of the strings of a message."""
    if isinstance(value, dict):
        return any(_contains(inner, text) for inner in value.values())
    if isinstance(value, list):
        return any(_contains(inner, text) for inner in value)
    return isinstance(value, str) and text in value


def _sample(record: Record, pieces: list[_Encoded], tokenizer, config: DataConfig) -> TokenizedSample:
    if isinstance(record, RowRecord):
        return PromptSample([], "", record.columns)
    if isinstance(record, PromptRecord):
        return _prompt_sample(record, pieces, tokenizer, config)
    if isinstance(record, StepwiseRecord):
        return _stepwise_sample(record, pieces[0], tokenizer, config)
    sequences = _fit([_mask_responses(piece, tokenizer) for piece in pieces], tokenizer, config)
    if isinstance(record, SFTRecord):
        return sequences[0]
    if isinstance(record, UnpairedRecord):
        return UnpairedSample(sequences[0], record.desirable)
    if isinstance(record, ScoredRecord):
        scores = record.scores.values()
        return ScoredSample(sequences[0], [math.nan if score is None else float(score) for score in scores])
    if sequences[0] == sequences[1]:
        raise ValueError("`chosen` equals `rejected` once the chat template has written them")
    return PreferenceSample(sequences[0], sequences[1], record.margin or 0.0, record.tie)


def _stepwise_sample(record: StepwiseRecord, piece: _Encoded, tokenizer, config: DataConfig) -> StepwiseSample:
    content = config.step_separator.join(record.steps).strip()
    [spans] = piece.responses
    start = piece.text.find(content, spans[0][0], spans[-1][1])
    if start < 0:
        raise ValueError("the chat template does not write the steps of a response as they are")
    ends = [start + end for end in step_ends(content, config.step_separator)]
    if len(ends) != len(record.steps):
        raise ValueError(f"steps can't be told apart once {config.step_separator!r} stands between them")
    last = last_tokens(_token_starts(piece.offsets).tolist(), ends)
    if len({*last}) < len(last):
        raise ValueError("two steps end within one token (another text between them: --step_separator)")
    labels = [math.nan] * len(piece.input_ids)
    for token, label in zip(last, record.labels, strict=True):
        labels[token] = math.nan if label is None else label
    whole = _mask_responses(piece, tokenizer)
    [sequence] = _fit([whole], tokenizer, config)
    # what was truncated stood in the prompt, where nothing is labeled
    return StepwiseSample(sequence, labels[len(whole) - len(sequence) : len(whole)])


def _mask_responses(piece: _Encoded, tokenizer) -> TokenSequence:
    """Mask the responses, each up to its end, and leave out what follows the last."""
    ids, starts = np.array(piece.input_ids), _token_starts(piece.offsets)
    mask = np.zeros(len(ids), dtype=bool)
    for response in piece.responses:
        in_pieces = [np.flatnonzero((starts >= start) & (starts < end)) for start, end in response]
        inside = np.concatenate(in_pieces)
        # {% generation %} tags often end in front of the EOS.
        after = inside[-1] + 1 if len(inside) else len(ids)
        if after < len(ids) and ids[after] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[inside]:
            inside = np.append(inside, after)
        end = _end_of_response(piece, inside, ids, tokenizer)
        mask[inside[inside <= end]] = True
    length = int(np.flatnonzero(mask)[-1]) + 1
    return TokenSequence(piece.input_ids[:length], mask[:length].tolist())


def _end_of_response(piece: _Encoded, inside: np.ndarray, ids: np.ndarray, tokenizer) -> int:
    """Where the response's last token is: its EOS, else (some calls of tools) another special token that ends it."""
    eos = inside[ids[inside] == tokenizer.eos_token_id]
    if len(eos):
        rest = "".join(piece.text_of(i) for i in inside[inside > eos[0]])
        if rest.replace(tokenizer.eos_token, "").strip():
            raise ValueError("the chat template goes on with a response after the EOS token")
        return int(eos[0])
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for i in reversed(inside.tolist()):
        if ids[i] in special:
            return i
        if piece.text_of(i).strip():
            break
    raise ValueError("the chat template does not end a response with the EOS token")


def _token_starts(offsets: list[tuple[int, int]]) -> np.ndarray:
    """Where each token starts, `[seq]`.

    Some byte-level tokenizers trim spaces off the offsets, which leaves a token of spaces empty at its own
    end: that token starts where the one before it ends.
    """
    spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    before = np.concatenate([[0], spans[:-1, 1]]) if len(spans) else spans[:, 0]
    return np.where(spans[:, 0] == spans[:, 1], np.minimum(before, spans[:, 0]), spans[:, 0])


def _fit(sequences: list[TokenSequence], tokenizer, config: DataConfig) -> list[TokenSequence]:
    """The sequences within `max_length`: all lose the same tokens from the prompt's left, but for BOS."""
    surplus = max(len(sequence) for sequence in sequences) - config.max_length
    if surplus <= 0:
        return sequences
    if config.too_long == "drop":
        raise TooLong(f"the row is longer than --max_length {config.max_length} tokens")
    kept = _bos_length(sequences[0].input_ids, tokenizer)
    prompt_length = min(sequence.loss_mask.index(True) for sequence in sequences)
    # One prompt token must stay: without it the response's first token has nothing to be predicted from.
    if prompt_length - surplus < max(1, kept):
        raise TooLong(f"the response alone is longer than --max_length {config.max_length} tokens allows")
    return [_without(sequence, kept, surplus) for sequence in sequences]


def _without(sequence: TokenSequence, kept: int, surplus: int) -> TokenSequence:
    """`surplus` tokens less, those that follow the first `kept`."""
    ids, mask = sequence.input_ids, sequence.loss_mask
    return TokenSequence(ids[:kept] + ids[kept + surplus :], mask[:kept] + mask[kept + surplus :])


def mismatched_sequence(
    prompt_from: TokenSequence, response_from: TokenSequence, tokenizer, max_length: int
) -> TokenSequence:
    """The prompt of one row with the response of another, both within `max_length`.

    The prompt loses what is too much from its left, but for BOS: there is room for a token of it, as there was for the
    response's own prompt.
    """
    prompt, start = prompt_from.loss_mask.index(True), response_from.loss_mask.index(True)
    ids = prompt_from.input_ids[:prompt] + response_from.input_ids[start:]
    joined = TokenSequence(ids, [False] * prompt + response_from.loss_mask[start:])
    return _without(joined, _bos_length(ids, tokenizer), max(len(ids) - max_length, 0))


def _prompt_sample(record: PromptRecord, pieces: list[_Encoded], tokenizer, config: DataConfig) -> PromptSample:
    ids, text = _fit_prompt(pieces[0], "prompt", "max_prompt_length", tokenizer, config)
    if len(pieces) == 1:
        return PromptSample(ids, text, record.columns)
    rest = pieces[2].input_ids if len(pieces) == 3 else None
    taken = len(rest or ())
    teacher_ids, _ = _fit_prompt(pieces[1], "teacher's prompt", "max_length", tokenizer, config, taken)
    return PromptSample(ids, text, record.columns, teacher_ids, rest)


def _fit_prompt(
    piece: _Encoded, what: str, setting: str, tokenizer, config: DataConfig, taken: int = 0
) -> tuple[list[int], str]:
    """Ids and text of a prompt within the length that a setting allows, less the tokens that are `taken` of it."""
    limit = getattr(config, setting) - taken
    surplus = len(piece.input_ids) - limit
    if surplus <= 0:
        return piece.input_ids, piece.text
    if config.too_long == "drop":
        raise TooLong(f"the {what} is longer than --{setting} {limit + taken} tokens")
    kept = _bos_length(piece.input_ids, tokenizer)
    if kept >= limit:
        raise TooLong(f"--{setting} {limit + taken} leaves no room for a prompt")
    text = piece.text[: piece.offsets[kept - 1][1] if kept else 0] + piece.text[piece.offsets[kept + surplus][0] :]
    return piece.input_ids[:kept] + piece.input_ids[kept + surplus :], text


def _bos_length(input_ids: list[int], tokenizer) -> int:
    return int(tokenizer.bos_token_id is not None and input_ids[:1] == [tokenizer.bos_token_id])
