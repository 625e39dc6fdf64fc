"""Which pieces are added: learned from texts, or given, and what becomes of those that would be dead."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from colossal_llama.tokenizer.bpe_training import continue_merges
from colossal_llama.tokenizer.character_filter import RUN, CharacterFilter
from colossal_llama.tokenizer.dead_pieces import dead_pieces, split
from colossal_llama.tokenizer.vocabulary import Vocabulary

BREAK, SPACE, INSIDE = range(3)
BATCH = 64


def frequent_characters(counts: Counter[str], allowed: CharacterFilter, coverage: float, minimum: int) -> list[str]:
    """The most frequent characters that make up `coverage` of all allowed ones (sentencepiece's option), in order."""
    ranked = sorted(
        ((count, letter) for letter, count in counts.items() if allowed(letter) and _is_visible(letter)),
        key=lambda pair: (-pair[0], pair[1]),
    )
    total = sum(count for count, _ in ranked)
    chosen, covered = [], 0
    for count, letter in ranked:
        if covered >= coverage * total or count < minimum:
            break
        chosen.append(letter)
        covered += count
    return chosen


def _is_visible(letter: str) -> bool:
    return unicodedata.category(letter)[0] not in "ZC"


def add_characters(vocabulary: Vocabulary, letters: Iterable[str], allowed: CharacterFilter, limit: int) -> None:
    """Make each character one token, while there are fewer than `limit` additions.

    A byte-level tokenizer gets the character's bytes joined from the left. A beginning that characters share which
    the filter does not pass is not joined: their tokens would change.
    """
    tokenizer = vocabulary.tokenizer()
    model = tokenizer.model
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    for letter in letters:
        symbols = vocabulary.symbols(letter)
        if symbols in vocabulary or letter not in normalize(letter):
            continue
        parts = split(model, symbols) if vocabulary.byte_level else [symbols]
        joins = ["".join(parts[:end]) for end in range(2, len(parts) + 1)] or parts
        if len(vocabulary.new) + sum(piece not in vocabulary for piece in joins) > limit:
            break
        if joins[-1] != symbols or not all(allowed.owns_prefix(vocabulary.piece_bytes(part)) for part in joins[:-1]):
            continue
        if len(parts) == 1:
            vocabulary.add(symbols)
        for left, right in zip([parts[0], *joins], parts[1:], strict=False):
            vocabulary.join(left, right)


def learn_pieces(
    vocabulary: Vocabulary, texts: Iterable[str], allowed: CharacterFilter, limit: int, minimum_frequency: int
) -> None:
    """Go on with byte-pair encoding where the tokenizer's merges end, until there are `limit` additions."""
    words = token_words(vocabulary, texts, allowed)
    _join(vocabulary, words, limit, minimum_frequency)


def _join(vocabulary: Vocabulary, words: Iterable[Sequence[int]], limit: int, minimum_frequency: int) -> None:
    piece_of = {token: piece for piece, token in (vocabulary.old | vocabulary.new).items()}
    room = limit - len(vocabulary.new)
    for pair in continue_merges(words, len(vocabulary), max(room, 0), minimum_frequency):
        left, right = ("".join([piece_of[token] for token in side]) for side in pair)
        if left in vocabulary and right in vocabulary:
            vocabulary.join(left, right)


def token_words(vocabulary: Vocabulary, texts: Iterable[str], allowed: CharacterFilter) -> Iterator[list[int]]:
    """The stretches of tokens that may become one: within a run of one script and a word of the tokenizer's, each
    token whole characters of which one passes the filter; the first may be a space."""
    tokenizer, kinds = vocabulary.tokenizer(), _kinds(vocabulary, allowed)
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            yield from _words(text, encoding, kinds)


def _kinds(vocabulary: Vocabulary, allowed: CharacterFilter) -> bytearray:
    kinds = bytearray(len(vocabulary))
    for piece, token in (vocabulary.old | vocabulary.new).items():
        text = vocabulary.text(piece)
        if text == " ":
            kinds[token] = SPACE
        elif text and allowed(text.strip(" ")):
            kinds[token] = INSIDE
    return kinds


def _words(text: str, encoding, kinds: bytearray) -> Iterator[list[int]]:
    runs = RUN.finditer(text)
    run = next(runs, None)
    word: list[int] = []
    place = None
    for token, (start, end), pretoken in zip(encoding.ids, encoding.offsets, encoding.word_ids, strict=True):
        while run and run.end() <= start:
            run = next(runs, None)
        kind = kinds[token] if run and run.start() <= start and end <= run.end() else BREAK
        here = (run and run.start(), pretoken)
        if kind != INSIDE or here != place:
            if len(word) > 1:
                yield word
            word = []
        if kind != BREAK:
            word.append(token)
        place = here
    if len(word) > 1:
        yield word


def add_given(vocabulary: Vocabulary, pieces: Iterable[str], with_steps: bool) -> None:
    """Add pieces (in the vocabulary's symbols), short ones first. With steps, whatever lies between the tokenizer's
    pieces and them is added too; without, those that are no two tokens stay without a merge, and dead."""
    pieces = sorted(dict.fromkeys(piece for piece in pieces if piece not in vocabulary), key=len)
    if with_steps:
        letters = dict.fromkeys(letter for piece in pieces for letter in vocabulary.text(piece) or "")
        add_characters(vocabulary, letters, CharacterFilter(["any"]), limit=1 << 30)
    model, length = vocabulary.tokenizer().model, 0
    for piece in pieces:
        if len(piece) != length and vocabulary.byte_level and not with_steps:
            model, length = vocabulary.tokenizer().model, len(piece)
        vocabulary.add(piece)
        if len(parts := split(model, piece)) == 2 and vocabulary.byte_level:
            vocabulary.join(*parts)


def settle_dead(vocabulary: Vocabulary, choice: str) -> tuple[Vocabulary, list[str], list[str]]:
    """Reach, drop or keep the dead pieces; "reach" drops those that no merges can reach.

    Returns:
        The vocabulary, the pieces that were dead, and of those the ones that were dropped.
    """
    dead = found = dead_pieces(vocabulary)
    for _ in range(3 if choice == "reach" else 0):
        if dead:
            reach(vocabulary, dead)
            dead = dead_pieces(vocabulary)
    dropped: list[str] = []
    while dead and choice != "keep":
        dropped += dead
        vocabulary = vocabulary.without(set(dead))
        dead = dead_pieces(vocabulary)
    return vocabulary, found, dropped


def reach(vocabulary: Vocabulary, pieces: list[str]) -> None:
    """Add the pieces and merges through which byte-pair encoding gets to these."""
    model, ids = vocabulary.tokenizer().model, vocabulary.old | vocabulary.new
    words = [split(model, piece) for piece in pieces]
    words = [word for word, piece in zip(words, pieces, strict=True) if "".join(word) == piece and len(word) > 1]
    steps = sum(len(word) - 1 for word in words)
    _join(vocabulary, [[ids[part] for part in word] for word in words], len(vocabulary.new) + steps, 1)
