"""Which documents go into which bucket, and a bucket's packed rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coati.errors import UserError
from coati.files import PARTIAL, atomic_write
from colossal_llama.data.bin_packing import best_fit, split_into_pieces
from colossal_llama.data.token_store import TokenStore

BATCH_TOKENS = 1 << 22  # of rows that are in memory at a time
IGNORED = -100


@dataclass(frozen=True)
class BucketTask:
    """A bucket to write: the documents of each category (numbers in the store, in order) and how to pack them."""

    number: int
    output: Path
    parts: list[Path]
    documents: dict[str, np.ndarray]
    max_length: int
    seed: int


@dataclass(frozen=True)
class Row:
    """A row to be: its category, and which tokens of which documents."""

    category: str
    pieces: list[tuple[int, int, int]]


def check_buckets(documents: dict[str, int], buckets: int) -> None:
    """Raise `UserError` unless every category has a document for every bucket; `documents` are counts."""
    short = [f"{name} has {count}" for name, count in sorted(documents.items()) if count < buckets]
    if short:
        raise UserError(
            f"--buckets {buckets}: every bucket gets a part of every category, but of documents {', '.join(short)}; "
            f"give --buckets {min(documents.values())} or fewer, or leave out or join small categories."
        )


def split(documents: np.ndarray, category: str, buckets: int, seed: int) -> list[np.ndarray]:
    """`documents`, shuffled by the seed and the category's name, as `buckets` lists whose sizes differ by 1 at most."""
    generator = np.random.default_rng([seed, *category.encode()])
    return [np.sort(part) for part in np.array_split(generator.permutation(documents), buckets)]


def write_bucket(task: BucketTask) -> int:
    """Pack a bucket's documents and write them as a `datasets` folder; returns the number of tokens.

    Columns: `input_ids`, `labels` (-100 over the source and where a piece begins, as nothing predicts its first
    token), `position_ids` (from 0 on in each piece), all list<int32>, and `category`. The rows are shuffled.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    datasets.disable_progress_bars()
    store = TokenStore(task.parts)
    rows = [row for name, documents in task.documents.items() for row in _pack(name, documents, store, task.max_length)]
    order = np.random.default_rng([task.seed, task.number]).permutation(len(rows))
    lists = datasets.List(datasets.Value("int32"))
    columns = {name: lists for name in ("input_ids", "labels", "position_ids")}
    features = datasets.Features({**columns, "category": datasets.Value("string")})
    rows_per_batch = max(1, BATCH_TOKENS // task.max_length)
    table = task.output.with_name(f"{task.output.name}.rows{PARTIAL}")
    with ArrowWriter(features=features, path=str(table)) as writer:
        for start in range(0, len(rows), rows_per_batch):
            writer.write_table(_table([rows[i] for i in order[start : start + rows_per_batch]], store))
        writer.finalize()
    with atomic_write(task.output) as partial:
        _save(table, partial)
    table.unlink()
    return sum(int(store.lengths[documents].sum()) for documents in task.documents.values())


def _save(table: Path, folder: Path) -> None:
    """With a fingerprint of the content: that of `datasets` would hold the time of writing."""
    import datasets

    with open(table, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    mapped = datasets.table.MemoryMappedTable.from_file(str(table))
    datasets.Dataset(mapped, fingerprint=digest.hexdigest()[:16]).save_to_disk(str(folder))


def _pack(category: str, documents: np.ndarray, store: TokenStore, max_length: int) -> Iterator[Row]:
    owner, start, stop = split_into_pieces(store.lengths[documents], max_length)
    pieces = list(zip(documents[owner].tolist(), start.tolist(), stop.tolist(), strict=True))
    for pack in best_fit(stop - start, max_length):
        yield Row(category, [pieces[item] for item in pack])


def _table(rows: list[Row], store: TokenStore):
    """The rows as an Arrow table."""
    import pyarrow as pa

    pieces = [piece for row in rows for piece in row.pieces]
    ids = [store.tokens(document)[start:stop] for document, start, stop in pieces]
    positions = [np.arange(stop - start, dtype=np.int32) for _, start, stop in pieces]
    labels = [piece.copy() for piece in ids]
    for (document, start, _), piece in zip(pieces, labels, strict=True):
        piece[: max(1, store.source_tokens[document] - start)] = IGNORED
    ends = np.cumsum([0, *(sum(stop - start for _, start, stop in row.pieces) for row in rows)], dtype=np.int32)
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    lists = {name: pa.ListArray.from_arrays(ends, np.concatenate(values)) for name, values in columns.items()}
    return pa.table({**lists, "category": pa.array([row.category for row in rows])})
