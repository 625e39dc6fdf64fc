"""Byte-pair encoding continued from a vocabulary that exists.

The `tokenizers` library's trainer starts from characters. Here each token of the existing tokenizer stands as one
character, so that training goes on where the tokenizer's own merges end; the merges that come out rank after all of
its own. A text's tokens are then the old ones, with the new merges applied to them: where no new merge applies,
nothing changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

# Above all spaces and surrogates; a vocabulary of a million tokens fits.
FIRST = 0x10000


def continue_merges(
    words: Iterable[Sequence[int]], vocabulary_size: int, merges: int, minimum_frequency: int
) -> list[tuple[list[int], list[int]]]:
    """The next merges of byte-pair encoding (Sennrich et al., 1508.07909, algorithm 1), the most frequent first.

    Args:
        words: token ids below `vocabulary_size`; merges don't cross from one word to the next.
        merges: at most so many.
        minimum_frequency: of a pair, to be merged.

    Returns:
        Pairs (left, right) of ids of the existing tokens that either side consists of.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size + merges,
        min_frequency=minimum_frequency,
        initial_alphabet=[chr(FIRST + token) for token in range(vocabulary_size)],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_lines(words), trainer)
    learned = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple([ord(letter) - FIRST for letter in side] for side in pair) for pair in learned]


def _lines(words: Iterable[Sequence[int]], size: int = 1000) -> Iterator[str]:
    line: list[str] = []
    for word in words:
        line.append("".join([chr(FIRST + token) for token in word]))
        if len(line) == size:
            yield " ".join(line)
            line = []
    yield " ".join(line)
