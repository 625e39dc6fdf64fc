"""A BPE tokenizer's vocabulary with pieces added behind its own.

Two kinds of tokenizer differ in what a piece is made of and in which merges it gets:

- byte-level (GPT-2, Llama-3, Qwen): one symbol per byte; a piece has the merges that are added for it;
- sentencepiece (Llama-2, Mistral, Gemma): one symbol per character, spaces as "▁", bytes for unknown characters.
  sentencepiece joins any two neighbors whose join is a piece (`bpe_model.cc`), so a piece's merges are all its splits
  into two pieces, as transformers' `generate_merges` has them too.

Old ids stay; old merges come first. As no piece may be added without a character that the filter passes, a text
without such characters has the tokens that it had.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cached_property
from typing import Any

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary:
    """The pieces of a `tokenizer.json` and those added to it.

    Args:
        spec: the parsed `tokenizer.json` of a BPE tokenizer; it is not changed.
        byte_level: the kind.
    """

    def __init__(self, spec: dict[str, Any], byte_level: bool) -> None:
        self.byte_level = byte_level
        self._spec = {**spec, "model": {**spec["model"]}}
        self.old: dict[str, int] = dict(spec["model"]["vocab"])
        # In the model's vocabulary they keep their ids: `tokenizers` renumbers other added tokens when it loads.
        self.old |= {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
        self._special = {token["content"] for token in spec.get("added_tokens", [])}
        self.first_new = max(self.old.values()) + 1
        self.new: dict[str, int] = {}
        self.merges: dict[tuple[str, str], None] = {}

    def __contains__(self, piece: str) -> bool:
        return piece in self.old or piece in self.new

    def __len__(self) -> int:
        """The ids in use are below this."""
        return self.first_new + len(self.new)

    def add(self, piece: str) -> None:
        """Add a piece without merges of its own: of one character, or one that others make reachable."""
        if piece not in self:
            self.new[piece] = len(self)

    def join(self, left: str, right: str) -> None:
        """Let two neighbors become one piece, which is added unless it exists."""
        self.add(left + right)
        self.merges.setdefault((left, right))

    def without(self, pieces: set[str]) -> Vocabulary:
        """The same additions less these pieces and what was joined of them."""
        rest = Vocabulary(self._spec, self.byte_level)
        for piece in self.new:
            if piece not in pieces:
                rest.add(piece)
        rest.merges = {
            (left, right): None
            for left, right in self.merges
            if left in rest and right in rest and left + right in rest
        }
        return rest

    def symbols(self, text: str) -> str:
        """A text as this kind of tokenizer writes it in its vocabulary."""
        if not self.byte_level:
            return text.replace(" ", "▁")
        return "".join(self._symbol_of_byte[byte] for byte in text.encode())

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes that a piece represents; a symbol that represents no byte has none."""
        if not self.byte_level:
            return piece.replace("▁", " ").encode()
        return bytes(self._byte_of_symbol[symbol] for symbol in piece if symbol in self._byte_of_symbol)

    def text(self, piece: str) -> str | None:
        """The piece as text; None if it is not whole characters, a byte's stand-in, or an added token."""
        if piece in self._special or (not self.byte_level and BYTE.fullmatch(piece)):
            return None
        try:
            return self.piece_bytes(piece).decode()
        except UnicodeDecodeError:
            return None

    @cached_property
    def _symbol_of_byte(self) -> dict[int, str]:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return bytes_to_unicode()

    @cached_property
    def _byte_of_symbol(self) -> dict[str, int]:
        return {symbol: byte for byte, symbol in self._symbol_of_byte.items()}

    def spec(self) -> dict[str, Any]:
        """The `tokenizer.json` with the additions."""
        spec = copy.copy(self._spec)
        merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in spec["model"]["merges"]
        ]
        merges = self._byte_level_merges(merges) if self.byte_level else self._sentencepiece_merges(merges)
        if merges and spec["model"]["merges"] and isinstance(spec["model"]["merges"][0], str):
            written = [" ".join(merge) for merge in merges]
        else:
            written = [list(merge) for merge in merges]
        spec["model"] = {**spec["model"], "vocab": self.old | self.new, "merges": written}
        return spec

    def _byte_level_merges(self, old: list[tuple[str, str]]) -> list[tuple[str, str]]:
        known = set(old)
        return old + [merge for merge in self.merges if merge not in known]

    def _sentencepiece_merges(self, old: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """All splits of the new pieces, in order; a new split of an old piece ranks right behind its others."""
        merges: list[tuple[str, str]] = []
        last = {left + right: place for place, (left, right) in enumerate(old)}
        splits_of_old = {piece: splits for piece in self.old if (splits := self._splits(piece, new_only=True))}
        for place, (left, right) in enumerate(old):
            merges.append((left, right))
            if last[left + right] == place:
                merges += splits_of_old.pop(left + right, [])
        for splits in splits_of_old.values():
            merges += splits
        for piece in self.new:
            merges += self._splits(piece, new_only=False)
        return merges

    def _splits(self, piece: str, new_only: bool) -> list[tuple[str, str]]:
        if piece in self._special:
            return []
        pairs = ((piece[:position], piece[position:]) for position in range(1, len(piece)))
        return [
            (left, right)
            for left, right in pairs
            if left in self
            and right in self
            and not {left, right} & self._special
            and (not new_only or left in self.new or right in self.new)
        ]

    def tokenizer(self):
        """A `tokenizers.Tokenizer` with the additions, neither padding nor truncating."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(json.dumps(self.spec()))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
