"""From documents to token ids: BOS? source target EOS.

- BOS comes first if the tokenizer itself puts it in front of a text (`--bos` says otherwise); EOS always ends a
  document. A special token that is spelled out in a text is text: real EOS stands at the ends of documents only.
- Source and target are tokenized once, as one text. Which tokens belong to the source follows from where they end in
  that text: a token that straddles the border belongs to the target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from coati.errors import UserError
from colossal_llama.data.documents import Document
from colossal_llama.tokenizer.tokenizer_folder import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class TokenizerData:
    """A tokenizer without its framework: `backend` is the JSON of `tokenizers`, `bos_id` None where none is put."""

    backend: str
    bos_id: int | None
    eos_id: int
    files: dict[str, str]
    """The SHA-256 of each of its files, by name."""

    @property
    def hash(self) -> str:
        """The SHA-256 of the files' names and hashes."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


def read_tokenizer(folder: str, bos: Literal["auto", "always", "never"]) -> TokenizerData:
    """Read a model's tokenizer.

    Raises `UserError` if it can't be loaded, see `load_tokenizer`, or lacks a special token.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer in {folder} has no EOS token to end documents with; set its eos_token.")
    if bos == "always" and tokenizer.bos_token_id is None:
        raise UserError(f"--bos always: the tokenizer in {folder} has no BOS token; use --bos auto.")
    puts_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    bos_id = tokenizer.bos_token_id if bos == "always" or (bos == "auto" and puts_bos) else None
    names = sorted({*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()})
    files = {
        n: hashlib.sha256((Path(folder) / n).read_bytes()).hexdigest() for n in names if (Path(folder) / n).is_file()
    }
    return TokenizerData(tokenizer.backend_tokenizer.to_str(), bos_id, tokenizer.eos_token_id, files)


@lru_cache(maxsize=1)
def text_tokenizer(path: str):
    """The `tokenizers.Tokenizer` in a JSON file, without truncation and padding, for texts without special tokens."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(path)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    # It would add special tokens, which is done here, and trim white space off the offsets.
    backend.post_processor = None
    return backend


def encode(documents: Sequence[Document], backend, bos_id: int | None, eos_id: int) -> list[tuple[np.ndarray, int]]:
    """`(input_ids, source_tokens)` of each document: int32 `[tokens]`, of which the first `source_tokens` (BOS among
    them, if there is a source) are not trained on."""
    encodings = backend.encode_batch([d.source + d.target for d in documents], add_special_tokens=False)
    bos = [] if bos_id is None else [bos_id]
    encoded = []
    for document, encoding in zip(documents, encodings, strict=True):
        ids = np.array([*bos, *encoding.ids, eos_id], dtype=np.int32)
        border = len(document.source)
        encoded.append((ids, len(bos) + _tokens_before(border, encoding.offsets) if border else 0))
    return encoded


def _tokens_before(border: int, offsets: Sequence[tuple[int, int]]) -> int:
    """How many tokens come before the first that ends behind character `border`."""
    return next((i for i, (_, end) in enumerate(offsets) if end > border), len(offsets))
