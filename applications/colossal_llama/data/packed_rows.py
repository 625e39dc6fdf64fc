"""Packed rows on disk, as `prepare_pretrain` writes them, and the order in which a stage reads them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coati.errors import UserError


@dataclass(frozen=True)
class PackedBatch:
    """Right-padded rows of packed documents, all `[batch, seq]`.

    Attributes:
        input_ids: long.
        attention_mask: bool, False on padding.
        loss_mask: bool, True on tokens that are trained on; a document's first token never is, as nothing predicts it.
        position_ids: long, starting again at 0 where a document begins; 0 on padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    position_ids: Tensor

    def to(self, device: torch.device | str):
        """The same batch on `device`."""
        return PackedBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def collate(rows: Sequence[dict[str, list[int]]], pad_id: int) -> PackedBatch:
    """The rows as a batch as long as the longest."""

    def column(name: str, fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row[name], dtype=torch.long) for row in rows], True, fill)

    labels, positions = column("labels", -100), column("position_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    real = torch.arange(labels.shape[1]) < lengths[:, None]
    return PackedBatch(column("input_ids", pad_id), real, (labels != -100) & (positions > 0), positions)


class PackedDataset:
    """The rows of one or several folders of `prepare_pretrain`, memory-mapped.

    Attributes:
        manifests: of each folder.
        categories: their names, sorted.
        lengths: tokens of each row, int `[rows]`.
        category_of_row: index into `categories`, int `[rows]`.
        bucket_of_row: int `[rows]`.
        key: tells the rows from any others.

    Raises:
        UserError: a folder isn't what `prepare_pretrain` leaves when it has finished.
    """

    def __init__(self, folders: Sequence[str]):
        import datasets
        import pyarrow.compute as pc

        self.manifests = [read_manifest(folder) for folder in folders]
        self.key = hashlib.sha256(json.dumps(self.manifests, sort_keys=True).encode()).hexdigest()
        parts, buckets = [], []
        for folder in folders:
            for k, path in enumerate(sorted(Path(folder).glob("bucket_*"))):
                parts.append(datasets.load_from_disk(str(path)))
                buckets.append(np.full(len(parts[-1]), k))
        self._table = datasets.concatenate_datasets(parts)
        self.bucket_of_row = np.concatenate(buckets)
        self.lengths = pc.list_value_length(self._table.data.column("input_ids")).to_numpy().astype(np.int64)
        names = np.asarray(self._table.data.column("category").to_pylist())
        self.categories, self.category_of_row = np.unique(names, return_inverse=True)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return self._table[int(row)]


def read_manifest(folder: str) -> dict:
    """What `prepare_pretrain` says about a folder that it has finished."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no folder of packed rows ({path} can't be read): run prepare_pretrain") from error


class MixedOrder:
    """The batches of a stage: at any moment the tokens seen of each category are in the proportions of the mixture, to
    within a row. Each category is read bucket by bucket, shuffled within a bucket; one that ends begins again.

    Args:
        data: where the rows come from.
        buckets: which buckets, in which order; none for all in their own.
        mix: each category's share of the tokens; none for its share in the data. Categories without one are skipped.
        steps: batches; or, if 0,
        tokens: the stage ends with the batch that reaches them; or, if 0,
        epochs: the tokens of the chosen buckets and categories, times this.
        start: a batch, and the row that it begins with, see `BatchSampler`.

    Raises:
        UserError: a bucket or category that isn't there, a share that isn't above 0.
    """

    def __init__(
        self,
        data: PackedDataset,
        batch_size: int,
        seed: int,
        *,
        steps: int = 0,
        tokens: int = 0,
        epochs: float = 1.0,
        buckets: Sequence[int] = (),
        mix: dict[str, float] | None = None,
        start: tuple[int, int] = (0, 0),
    ):
        self.data, self.batch_size, self.seed, self.start = data, batch_size, seed, start
        self.buckets = list(buckets) or sorted(set(data.bucket_of_row.tolist()))
        if missing := sorted(set(self.buckets) - set(data.bucket_of_row.tolist())):
            raise UserError(f"there is no bucket {missing[0]}: the data has 0 to {data.bucket_of_row.max()}")
        self.shares = self._shares(mix)
        self.chosen = np.isin(data.bucket_of_row, self.buckets) & np.isin(data.category_of_row, list(self.shares))
        tokens = tokens or epochs * data.lengths[self.chosen].sum()
        rows, seen = [], 0
        for row in self._stream():
            rows.append(row)
            seen += data.lengths[row]
            batches, rest = divmod(len(rows) - start[1], batch_size)
            if rest == 0 and batches >= 0 and (start[0] + batches >= steps if steps else seen >= tokens):
                break
        self.rows, self.tokens = np.array(rows), int(seen)

    def __len__(self) -> int:
        """Batches."""
        return self.start[0] + (len(self.rows) - self.start[1]) // self.batch_size

    def position(self, k: int) -> int:
        """Rows before batch `k`."""
        return self.start[1] + (k - self.start[0]) * self.batch_size

    def batch(self, k: int) -> list[int]:
        """Rows of batch `k`, over all ranks and micro-batches."""
        return self.rows[self.position(k) : self.position(k + 1)].tolist()

    def epoch(self, k: int) -> float:
        """Rows seen before batch `k`, by how many the chosen buckets and categories have."""
        return self.position(k) / self.chosen.sum()

    def _shares(self, mix: dict[str, float] | None) -> dict[int, float]:
        names, chosen = self.data.categories.tolist(), np.isin(self.data.bucket_of_row, self.buckets)
        if mix is None:
            counted = np.bincount(self.data.category_of_row[chosen], self.data.lengths[chosen])
            return {i: float(count) for i, count in enumerate(counted) if count}
        for name, share in mix.items():
            if name not in names:
                raise UserError(f"mix names the category {name!r}: the data has {', '.join(names)}")
            if not share > 0:
                raise UserError(f"mix gives {name} the share {share}: give one above 0, or leave the category out")
            if not (chosen & (self.data.category_of_row == names.index(name))).any():
                raise UserError(f"mix names the category {name!r}, of which the buckets {self.buckets} have no row")
        return {names.index(name): share for name, share in mix.items()}

    def _stream(self) -> Iterator[int]:
        """An endless stream of rows: always of the category that lags behind the most."""
        streams = {category: self._category(category) for category in self.shares}
        seen = dict.fromkeys(self.shares, 0)
        while True:
            category = min(seen, key=lambda c: seen[c] / self.shares[c])
            row = next(streams[category])
            seen[category] += self.data.lengths[row]
            yield row

    def _category(self, category: int) -> Iterator[int]:
        turn = 0
        while True:
            for bucket in self.buckets:
                here = (self.data.category_of_row == category) & (self.data.bucket_of_row == bucket)
                generator = np.random.default_rng([self.seed, category, turn, bucket])
                yield from generator.permutation(np.flatnonzero(here)).tolist()
            turn += 1
