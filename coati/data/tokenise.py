"""From records to token ids and answer masks.

A record is rendered by the chat template and the text is tokenised once. Which tokens are labels follows from
where they start in the text: a token is part of an answer if it starts inside the answer's characters. So the
tokens are those of the whole dialogue, and nothing that a user writes can move the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coati.data.config import DataConfig
from coati.data.records import PreferenceRecord, PromptRecord, Record, SFTRecord, UnpairedRecord
from coati.data.templates import answer_spans, render


class TooLong(ValueError):
    """A good row that is dropped for its length."""


@dataclass(frozen=True)
class TokenSequence:
    """Token ids `[seq]` and whether each is part of an answer `[seq]` (an answer's EOS is)."""

    input_ids: list[int]
    loss_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class PreferenceSample:
    """Two answers to one prompt; only the answers' tokens are in the loss masks."""

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class UnpairedSample:
    """An answer that is good or bad; only its tokens are in the loss mask."""

    sequence: TokenSequence
    desirable: bool

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class PromptSample:
    """A prompt up to where the answer begins: ids `[seq]`, the rendered text, the row's other fields."""

    input_ids: list[int]
    text: str
    columns: dict[str, Any]

    def __len__(self) -> int:
        return len(self.input_ids)


Sample = TokenSequence | PreferenceSample | UnpairedSample | PromptSample


def tokenise(record: Record, tokenizer, config: DataConfig) -> Sample:
    """The sample of one record, for a tokenizer that went through `prepare_tokenizer`.

    Sequences end with the last answer's EOS. Raises `TooLong` for a row over `config.max_length` (or
    `config.max_prompt_length`) that may not or cannot be cut, and `ValueError` for a row that the template
    cannot label.
    """
    [sample] = tokenise_many([record], tokenizer, config)
    if isinstance(sample, ValueError):
        raise sample
    return sample


def tokenise_many(records: Sequence[Record], tokenizer, config: DataConfig) -> list[Sample | ValueError]:
    """As `tokenise`, in one tokenizer call; a record that fails has its error in its place."""
    rendered = [_attempt(_render, record, tokenizer, config) for record in records]
    texts = [text for pieces in rendered if not isinstance(pieces, ValueError) for text, _ in pieces]
    if not texts:
        return rendered
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    samples = []
    for record, pieces in zip(records, rendered, strict=True):
        if not isinstance(pieces, ValueError):
            pieces = [_Encoded(text, spans, *next(tokens)) for text, spans in pieces]
            pieces = _attempt(_sample, record, pieces, tokenizer, config)
        samples.append(pieces)
    return samples


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the `ValueError` (a reason to drop the row) that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


@dataclass(frozen=True)
class _Encoded:
    """A rendered text, the characters of its answers, its token ids and their character offsets."""

    text: str
    spans: list[tuple[int, int]]
    input_ids: list[int]
    offsets: list[tuple[int, int]]


def _render(record: Record, tokenizer, config: DataConfig) -> list[tuple[str, list[tuple[int, int]]]]:
    """The texts to tokenise for a record, each with its answers' spans."""
    from jinja2 import TemplateError

    try:
        if isinstance(record, PromptRecord):
            return [(render(tokenizer, record.prompt, add_generation_prompt=True), [])]
        if isinstance(record, PreferenceRecord):
            dialogues = [record.prompt + record.chosen, record.prompt + record.rejected]
            return [answer_spans(tokenizer, dialogue, len(record.prompt)) for dialogue in dialogues]
        if isinstance(record, UnpairedRecord):
            return [answer_spans(tokenizer, record.prompt + record.answer, len(record.prompt))]
        first = len(record.messages) - 1 if config.train_on == "last" else 0
        return [answer_spans(tokenizer, record.messages, first)]
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the row ({error})") from None


def _sample(record: Record, pieces: list[_Encoded], tokenizer, config: DataConfig) -> Sample:
    if isinstance(record, PromptRecord):
        return _prompt_sample(record, pieces[0], tokenizer, config)
    sequences = _fit([_labelled(piece, tokenizer) for piece in pieces], tokenizer, config)
    if isinstance(record, SFTRecord):
        return sequences[0]
    if isinstance(record, UnpairedRecord):
        return UnpairedSample(sequences[0], record.desirable)
    if sequences[0] == sequences[1]:
        raise ValueError("`chosen` equals `rejected` once the chat template has written them")
    return PreferenceSample(sequences[0], sequences[1], record.margin or 0.0)


def _labelled(piece: _Encoded, tokenizer) -> TokenSequence:
    """Mask the answers, each up to its EOS, and leave out what follows the last."""
    ids, starts = np.array(piece.input_ids), _token_starts(piece.offsets)
    is_eos = ids == tokenizer.eos_token_id
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in piece.spans:
        inside = np.flatnonzero((starts >= start) & (starts < end))
        after = inside[-1] + 1 if len(inside) else len(ids)
        # {% generation %} tags often end in front of the EOS.
        if after < len(ids) and is_eos[after] and not is_eos[inside].any():
            inside = np.append(inside, after)
        eos = inside[is_eos[inside]]
        if len(eos) == 0:
            raise ValueError("the chat template does not end an answer with the EOS token")
        if len(eos) > 1:
            raise ValueError(f"an answer contains the EOS token {tokenizer.eos_token}, which must only end it")
        mask[inside[inside <= eos[0]]] = True
    length = int(np.flatnonzero(mask)[-1]) + 1
    return TokenSequence(piece.input_ids[:length], mask[:length].tolist())


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
    # One prompt token must stay: without it the answer's first token has nothing to be predicted from.
    if prompt_length - surplus < max(1, kept):
        raise TooLong(f"the answer alone is longer than --max_length {config.max_length} tokens allows")
    return [_without(sequence, kept, surplus) for sequence in sequences]


def _without(sequence: TokenSequence, kept: int, surplus: int) -> TokenSequence:
    """`surplus` tokens less, those that follow the first `kept`."""
    ids, mask = sequence.input_ids, sequence.loss_mask
    return TokenSequence(ids[:kept] + ids[kept + surplus :], mask[:kept] + mask[kept + surplus :])


def exchange_answers(asked: TokenSequence, answered: TokenSequence, tokenizer, max_length: int) -> TokenSequence:
    """The prompt of one row with the answer of another, both within `max_length`.

    The prompt loses what is too much from its left, but for BOS: there is room for a token of it, as there was for the
    answer's own prompt.
    """
    prompt, start = asked.loss_mask.index(True), answered.loss_mask.index(True)
    ids = asked.input_ids[:prompt] + answered.input_ids[start:]
    whole = TokenSequence(ids, [False] * prompt + answered.loss_mask[start:])
    return _without(whole, _bos_length(ids, tokenizer), max(len(ids) - max_length, 0))


def _prompt_sample(record: PromptRecord, piece: _Encoded, tokenizer, config: DataConfig) -> PromptSample:
    surplus = len(piece.input_ids) - config.max_prompt_length
    if surplus <= 0:
        return PromptSample(piece.input_ids, piece.text, record.columns)
    if config.too_long == "drop":
        raise TooLong(f"the prompt is longer than --max_prompt_length {config.max_prompt_length} tokens")
    kept = _bos_length(piece.input_ids, tokenizer)
    if kept == config.max_prompt_length:
        raise TooLong(f"--max_prompt_length {config.max_prompt_length} leaves no room for a prompt")
    text = piece.text[: piece.offsets[kept - 1][1] if kept else 0] + piece.text[piece.offsets[kept + surplus][0] :]
    return PromptSample(piece.input_ids[:kept] + piece.input_ids[kept + surplus :], text, record.columns)


def _bos_length(input_ids: list[int], tokenizer) -> int:
    return int(tokenizer.bos_token_id is not None and input_ids[:1] == [tokenizer.bos_token_id])
