"""Tokenized documents on disk: a file for each part of the input, written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coati.files import atomic_write
from colossal_llama.data.deduplication import Deduplication
from colossal_llama.data.document_tokens import encode, text_tokenizer
from colossal_llama.data.documents import Document, Part, read_documents
from colossal_llama.data.quality_filters import Filters
from colossal_llama.data.skipped_rows import Problem, Problems

BATCH = 256  # documents in one call of the tokenizer


@dataclass(frozen=True)
class TokenizeTask:
    """One part of the input, and all that a process needs to tokenize it. `tokenizer` is a JSON file's path."""

    part: Part
    output: Path
    category: str | None
    tokenizer: str
    bos_id: int | None
    eos_id: int
    filters: Filters
    deduplication: Deduplication


def tokenize_part(task: TokenizeTask) -> int:
    """Tokenize the documents that pass the filters; returns the number of tokens.

    The file (Arrow, uncompressed) has a row per document, in the order of the input: `input_ids`, `source_tokens`,
    `category`, `line`, `signature`. Its metadata says where the documents are from and which the filters dropped.
    """
    import pyarrow as pa
    from pyarrow import feather

    dropped = Problems()
    rows = list(_tokenized(task, dropped))
    ids = [row.input_ids for row in rows]
    ends = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(ends, np.concatenate([np.empty(0, np.int32), *ids])),
        "source_tokens": pa.array([row.source_tokens for row in rows], pa.int32()),
        "category": pa.array([row.document.category for row in rows], pa.string()),
        "line": pa.array([row.document.line for row in rows], pa.int64()),
        "signature": pa.array([row.signature for row in rows], pa.binary()),
    }
    metadata = {"path": task.part.path, "dropped": json.dumps(dropped.as_json())}
    table = pa.table(columns).replace_schema_metadata(metadata)
    with atomic_write(task.output) as partial:
        feather.write_feather(table, str(partial), compression="uncompressed", chunksize=max(1, len(rows)))
    return int(ends[-1])


@dataclass(frozen=True)
class _Tokenized:
    """A document, its tokens, int32 `[tokens]`, of which the first `source_tokens` are not trained on."""

    document: Document
    input_ids: np.ndarray
    source_tokens: int
    signature: bytes


def _tokenized(task: TokenizeTask, dropped: Problems) -> Iterator[_Tokenized]:
    backend = text_tokenizer(task.tokenizer)
    chosen: list[Document] = []
    for document in read_documents(task.part, task.category, Problems()):
        reason = task.filters.reason_to_drop(document.source + document.target)
        if reason is None:
            chosen.append(document)
        else:
            dropped.add(task.part.path, document.line, reason)
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        signatures = task.deduplication.signatures([d.source + d.target for d in batch])
        encoded = encode(batch, backend, task.bos_id, task.eos_id)
        for document, (ids, source_tokens), signature in zip(batch, encoded, signatures, strict=True):
            yield _Tokenized(document, ids, source_tokens, signature)


class TokenStore:
    """The files of all parts, memory-mapped, as one list of documents numbered in input order.

    Attributes:
        lengths, source_tokens: int64 and int32 `[documents]`.
        category_names: sorted; `categories`: indices into them, `[documents]`.
        lines: int64 `[documents]`.
    """

    def __init__(self, paths: list[Path]) -> None:
        from pyarrow import feather

        tables = [feather.read_table(str(path), memory_map=True) for path in paths]
        self._metadata = [table.schema.metadata for table in tables]
        columns = {name: [t[name].combine_chunks() for t in tables] for name in tables[0].column_names}
        self._first = np.cumsum([0, *map(len, tables)])
        self._ends = [column.offsets.to_numpy() for column in columns["input_ids"]]
        self._tokens = [column.values.to_numpy() for column in columns["input_ids"]]
        self._signatures = columns["signature"]
        self.lengths = np.concatenate([np.diff(ends) for ends in self._ends]).astype(np.int64)
        self.source_tokens = np.concatenate([column.to_numpy() for column in columns["source_tokens"]])
        self.lines = np.concatenate([column.to_numpy() for column in columns["line"]])
        encoded = [column.dictionary_encode() for column in columns["category"]]
        self.category_names = sorted({name for column in encoded for name in column.dictionary.to_pylist()})
        self.categories = np.concatenate([self._codes(column) for column in encoded])

    def _codes(self, column) -> np.ndarray:
        own = [self.category_names.index(name) for name in column.dictionary.to_pylist()]
        return np.array(own, dtype=np.int64)[column.indices.to_numpy()]

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int) -> np.ndarray:
        """The ids of a document, int32 `[tokens]`; a view of the file."""
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        row = document - self._first[part]
        return self._tokens[part][self._ends[part][row] : self._ends[part][row + 1]]

    def signatures(self) -> Iterator[bytes]:
        """The documents' signatures, in order."""
        return (value.as_py() for column in self._signatures for value in column)

    def path(self, document: int) -> str:
        """The input file of a document."""
        part = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._metadata[part][b"path"].decode()

    def dropped(self) -> Iterator[Problem]:
        """What the filters dropped, part by part."""
        return (Problem(**fields) for metadata in self._metadata for fields in json.loads(metadata[b"dropped"]))
