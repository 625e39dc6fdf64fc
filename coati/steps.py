"""The steps of a response: where they end in its text, and with which of its tokens. Free of torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character


def step_spans(text: str, separator: str) -> list[tuple[int, int]]:
    """The characters of each step, without the spaces around it; steps of nothing but spaces are none. Spaces around
    the whole text, such as a chat template's, are no part of a separator.

    Examples:
        >>> step_spans("1 + 2 = 3 \\n\\n3 + 4 = 7\\n", "\\n")
        [(0, 9), (12, 21)]
    """
    spans, start = [], len(text) - len(text.lstrip())
    for piece in text.strip().split(separator):
        if piece.strip():
            spans.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
        start += len(piece) + len(separator)
    return spans


def step_ends(text: str, separator: str) -> list[int]:
    """After which character each step ends, see `step_spans`."""
    return [end for _, end in step_spans(text, separator)]


def last_tokens(starts: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The token that holds the last character before each end: the last one that starts before it.

    Args:
        starts: the character where each token starts, in order.
    """
    return [bisect_left(starts, end) - 1 for end in ends]


def decode_with_starts(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The text of some ids, and the character where each of them starts. Tokens of a character that isn't complete yet
    start where it does."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if again["input_ids"] != list(ids):  # sampled, but not how the tokenizer would write it
        return decode_one_by_one(ids, tokenizer)
    offsets = again["offset_mapping"]
    ends = [0, *(end for _, end in offsets)]
    # some tokenizers leave a token's space out of its offsets
    return text, [min(start, before) for (start, _), before in zip(offsets, ends, strict=False)]


def decode_one_by_one(ids: Sequence[int], tokenizer: Any) -> tuple[str, list[int]]:
    """As `decode_with_starts`: each token after those before it, as it may be written otherwise alone."""
    pieces: list[str] = []
    starts: list[int] = []
    length = first = shown = 0  # ids before `first` are not needed to decode what comes after `shown`
    for i in range(len(ids)):
        starts.append(length)
        before = tokenizer.decode(ids[first:shown], skip_special_tokens=False)
        with_it = tokenizer.decode(ids[first : i + 1], skip_special_tokens=False)
        is_last = i == len(ids) - 1
        if len(with_it) > len(before) and (is_last or not with_it.endswith(REPLACEMENT)):
            pieces.append(with_it[len(before) :])
            length += len(pieces[-1])
            first, shown = shown, i + 1
    return "".join(pieces), starts
