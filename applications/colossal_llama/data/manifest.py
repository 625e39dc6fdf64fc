"""What a folder of packed rows holds: counted from the rows themselves, as JSON and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from colossal_llama.data.skipped_rows import Problem


@dataclass
class Counts:
    """Of one category in one bucket, or of a sum of such; `trained_tokens` are those with a label."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def as_dict(self, max_length: int) -> dict[str, float]:
        """With the share of the positions that are padding once rows are padded to `max_length`."""
        return {**asdict(self), "padding_share": round(1 - self.tokens / (self.rows * max_length), 6)}


def measure_bucket(folder: Path) -> dict[str, Counts]:
    """Read a written bucket and count by category; documents, which rows do not tell, are left at 0."""
    import datasets

    counts_of: dict[str, Counts] = {}
    for batch in datasets.load_from_disk(str(folder)).data.to_batches():
        lengths = np.diff(batch["input_ids"].offsets.to_numpy())
        labels = batch["labels"]
        trained = np.concatenate([[0], np.cumsum(labels.values.to_numpy() != -100)])
        trained = np.diff(trained[labels.offsets.to_numpy()])
        encoded = batch["category"].dictionary_encode()
        codes = encoded.indices.to_numpy()
        for code, name in enumerate(encoded.dictionary.to_pylist()):
            rows = codes == code
            counts = Counts(0, int(rows.sum()), int(lengths[rows].sum()), int(trained[rows].sum()))
            counts_of[name] = counts_of.get(name, Counts()) + counts
    return dict(sorted(counts_of.items()))


def summarize(buckets: list[dict[str, Counts]], max_length: int) -> dict:
    """The manifest's figures: by category, by bucket and of everything."""
    names = sorted({name for bucket in buckets for name in bucket})
    by_category = {name: sum((bucket[name] for bucket in buckets), Counts()) for name in names}
    return {
        "total": sum(by_category.values(), Counts()).as_dict(max_length),
        "categories": {name: counts.as_dict(max_length) for name, counts in by_category.items()},
        "buckets": [
            {
                "folder": f"bucket_{number:05d}",
                **sum(bucket.values(), Counts()).as_dict(max_length),
                "categories": {name: counts.as_dict(max_length) for name, counts in bucket.items()},
            }
            for number, bucket in enumerate(buckets)
        ],
    }


def print_tables(manifest: dict) -> None:
    """The manifest's figures by category and by bucket, and what was skipped, on stdout."""
    from rich.console import Console

    console = Console()
    total = {"all": manifest["total"]}
    console.print(_table("category", {**manifest["categories"], **total}))
    console.print(_table("bucket", {**{bucket["folder"]: bucket for bucket in manifest["buckets"]}, **total}))
    for kind in ("bad_rows", "dropped"):
        for problem in manifest[kind]:
            print(f"skipped {Problem(**problem)}")


def _table(title: str, rows: dict[str, dict]):
    from rich.markup import escape
    from rich.table import Table

    table = Table(title, *("documents", "rows", "tokens", "trained tokens", "padding"))
    for column in table.columns[1:]:
        column.justify = "right"
    *named, last = [
        [escape(name), *(f"{row[key]:,}" for key in ("documents", "rows", "tokens", "trained_tokens"))]
        + [f"{row['padding_share']:.2%}"]
        for name, row in rows.items()
    ]
    for cells in named:
        table.add_row(*cells)
    table.add_section()
    table.add_row(*last)
    return table
