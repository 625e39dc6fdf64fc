"""Folders of packed rows, written by hand, and the settings of a tiny stage."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def row(documents: Sequence[Sequence[int]], category: str, untrained: int = 0) -> dict:
    """A packed row; the first `untrained` tokens of each document are its source."""
    return {
        "input_ids": [token for document in documents for token in document],
        "labels": [-100 if i < untrained else token for document in documents for i, token in enumerate(document)],
        "position_ids": [i for document in documents for i in range(len(document))],
        "category": category,
    }


def write_packed(folder: Path, buckets: Sequence[Sequence[dict]], **manifest) -> str:
    """What `prepare_pretrain` leaves."""
    import datasets

    for k, rows in enumerate(buckets):
        datasets.Dataset.from_list(list(rows)).save_to_disk(str(folder / f"bucket_{k:05d}"))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def documents(seed: int, count: int, longest: int = 12) -> list[list[int]]:
    """Token ids that follow a simple rule, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        start, step = generator.integers(10, 300), generator.integers(1, 4)
        length = generator.integers(2, longest + 1)
        found.append([int(10 + (start + i * step) % 300) for i in range(length)])
    return found


def packed_world(folder: Path) -> dict[str, str]:
    """Training data of two buckets and two categories, and evaluation data."""

    def bucket(seed: int, rows: int) -> list[dict]:
        names = ("en", "zh")
        return [row(documents(seed + i, 1 + i % 3), names[i % 3 == 0], untrained=i % 2) for i in range(rows)]

    return {
        "packed": write_packed(folder / "train", [bucket(0, 20), bucket(100, 21)]),
        "packed_eval": write_packed(folder / "eval", [bucket(200, 7)]),
    }


def settings(world: dict[str, str], packed: dict[str, str], **changes) -> dict:
    """Settings of a tiny stage, as keywords of `PretrainConfig`."""
    common = dict(train_data=[packed["packed"]], eval_data=[packed["packed_eval"]], tokenizer=world["tokenizer"])
    common |= dict(model_config=world["model_config"], batch_size=8, micro_batch_size=2, steps=4, learning_rate=1e-2)
    return common | dict(max_length=48, progress="off", save_every=2, keep_checkpoints=9) | changes
