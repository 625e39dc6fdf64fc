"""Pieces that a tokenizer never produces ("dead" ones)."""

from __future__ import annotations

from colossal_llama.tokenizer.vocabulary import Vocabulary

# At a text's beginning, a line's, and within a word.
CONTEXTS = ("{}", "\n{}\n", "a{}")


def dead_pieces(vocabulary: Vocabulary, tokenizer=None) -> list[str]:
    """The added pieces that no text of their own gives.

    A piece of whole characters is looked for among the tokens of its text in `CONTEXTS`, through the whole
    tokenizer: normalization, splitting into words, merges. A piece that is part of a character's bytes must come out
    of the merges alone.
    """
    tokenizer = tokenizer or vocabulary.tokenizer()
    texts = {piece: text for piece in vocabulary.new if (text := vocabulary.text(piece)) is not None}
    model = tokenizer.model
    alive = {piece for piece in vocabulary.new if piece not in texts and split(model, piece) == [piece]}
    waiting = list(texts)
    for context in CONTEXTS:
        encoded = tokenizer.encode_batch([context.format(texts[piece]) for piece in waiting], add_special_tokens=False)
        reached = {piece for piece, tokens in zip(waiting, encoded, strict=True) if vocabulary.new[piece] in tokens.ids}
        alive |= reached
        waiting = [piece for piece in waiting if piece not in reached]
    return [piece for piece in vocabulary.new if piece not in alive]


def split(model, piece: str) -> list[str]:
    """The tokens that the merges alone make of a piece's symbols."""
    return [token.value for token in model.tokenize(piece)]
