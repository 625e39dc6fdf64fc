"""Finding documents that say the same, exactly or nearly.

A signature is made of each document where it is tokenized; signatures are compared later, all in one place and in
input order, so that the document kept is the first whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHINGLE = 5  # characters; words would not do for Chinese
PERMUTATIONS = 128


@dataclass(frozen=True)
class Deduplication:
    """How documents are compared; `threshold` is the Jaccard similarity of near duplicates."""

    kind: Literal["none", "exact", "minhash"] = "none"
    threshold: float = 0.8

    def signatures(self, texts: list[str]) -> list[bytes]:
        """One per text: empty (none), a SHA-256 (exact, 32 bytes) or a MinHash of its shingles (512 bytes)."""
        if self.kind == "none":
            return [b""] * len(texts)
        if self.kind == "exact":
            return [hashlib.sha256(normalize(text).encode()).digest() for text in texts]
        from datasketch import MinHash
        from xxhash import xxh32_intdigest

        shingled = ([shingle.encode() for shingle in shingles(text)] for text in texts)
        sketches = MinHash.generator(shingled, num_perm=PERMUTATIONS, hashfunc=xxh32_intdigest)
        return [sketch.hashvalues.tobytes() for sketch in sketches]

    def is_first(self, signatures: Iterable[bytes]) -> np.ndarray:
        """Whether each document is kept, bool `[documents]`: none before it that is kept is like it.

        `minhash` compares with the candidates of locality-sensitive hashing only and estimates their similarity from
        128 hashes (standard error up to 0.044), so that documents near the threshold can go either way.
        """
        if self.kind == "none":
            return np.ones(len(list(signatures)), dtype=bool)
        if self.kind == "exact":
            return _is_new(signatures)
        return self._is_first_of_its_kind(signatures)

    def _is_first_of_its_kind(self, signatures: Iterable[bytes]) -> np.ndarray:
        from datasketch import LeanMinHash, MinHashLSH

        # false candidates are rejected below; missed ones stay missed
        index = MinHashLSH(threshold=self.threshold, num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        kept: dict[int, np.ndarray] = {}
        is_first = []
        for number, signature in enumerate(signatures):
            hashes = np.frombuffer(signature, dtype=np.uint32)
            sketch = LeanMinHash(seed=1, hashvalues=hashes, scheme="affine32")
            candidates = index.query(sketch)
            is_first.append(not any((kept[c] == hashes).mean() >= self.threshold for c in candidates))
            if is_first[-1]:
                kept[number] = hashes
                index.insert(number, sketch)
        return np.array(is_first, dtype=bool)


def _is_new(signatures: Iterable[bytes]) -> np.ndarray:
    """Whether none before it equals it, bool `[documents]`."""
    seen: set[bytes] = set()
    is_new = []
    for signature in signatures:
        is_new.append(signature not in seen)
        seen.add(signature)
    return np.array(is_new, dtype=bool)


def normalize(text: str) -> str:
    """`text` in Unicode's composed form (NFC), runs of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def shingles(text: str) -> set[str]:
    """The runs of 5 characters of the normalized text, in lower case; a shorter text is its own only shingle."""
    text = normalize(text).lower()
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
