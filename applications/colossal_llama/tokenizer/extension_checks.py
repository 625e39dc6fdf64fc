"""What an extension did to a tokenizer, measured on texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coati.errors import UserError
from colossal_llama.tokenizer.character_filter import CharacterFilter
from colossal_llama.tokenizer.tokenizer_folder import TokenizerFolder, load_tokenizer

EXAMPLE = 60


@dataclass
class Comparison:
    """How many of `texts` two tokenizers tokenize differently, and the beginning of the first such."""

    texts: int
    different: int
    example: str | None

    def __str__(self) -> str:
        share = f"{self.texts - self.different} of {self.texts} alike"
        return share + (f"; differs: {self.example!r}" if self.different else "")


def compare(texts: Iterable[str], one, other) -> Comparison:
    """Compare two functions from a list of texts to their lists of ids."""
    texts = list(texts)
    different = [text for text, a, b in zip(texts, one(texts), other(texts), strict=True) if list(a) != list(b)]
    return Comparison(len(texts), len(different), different[0][:EXAMPLE] if different else None)


def encoder(tokenizer):
    """Of a `tokenizers.Tokenizer`: ids without special tokens."""
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def lines_without(texts: Iterable[str], allowed: CharacterFilter) -> list[str]:
    """The lines, not empty, in which no character passes the filter."""
    return [line for text in texts for line in text.splitlines() if line.strip() and not allowed(line)]


def variants(folder: Path, tokenizer, sample: list[str]) -> dict[str, Comparison]:
    """`tokenizer.json` against what transformers makes of the folder, and against sentencepiece's `tokenizer.model`."""
    fast = encoder(tokenizer)
    loaded = load_tokenizer(folder)
    others = {"transformers": lambda texts: [loaded.encode(text, add_special_tokens=False) for text in texts]}
    if (folder / "tokenizer.model").exists():
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        others["sentencepiece"] = processor.encode
    return {name: compare(sample, fast, encode) for name, encode in others.items()}


def check_ids(source: TokenizerFolder, folder: Path) -> None:
    """Every token of the source has its id in the written tokenizer too, as transformers loads it.

    Raises:
        UserError: one has another id.
    """
    loaded = load_tokenizer(folder).get_vocab()
    for piece, token in load_tokenizer(source.path).get_vocab().items():
        if loaded.get(piece) != token:
            raise UserError(
                f"transformers gives {piece!r} id {loaded.get(piece)} in the extended tokenizer and {token} in "
                f"{source.path}; its class renumbers tokens, so that it can't be extended."
            )


def as_json(value: Any) -> Any:
    """Comparisons as plain dicts."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    return asdict(value) if isinstance(value, Comparison) else value
