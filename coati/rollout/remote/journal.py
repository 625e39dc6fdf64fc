"""The samples of a job as a file of JSON lines, which is written atomically: it is there when all of them are.

    RUN/journal/version-00000012/JOB.jsonl

The first line tells the job: version and checksum of the weights, how many samples, which generator, when and how long.
Each of the others is a sample as `coati.samples.Sample` has it, with the seed of its noise (run, iteration, row, ...)
and without the row's columns. The last is the checksum of the lines before it.
"""

import base64
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from coati.files import atomic_write
from coati.rollout.sampler import Prompt
from coati.samples import Sample, Turn


def job_file(journal: Path, version: int, job: str) -> Path:
    """Where a job's samples stand.

    Args:
        version: of the weights.
    """
    return journal / f"version-{version:08d}" / f"{job}.jsonl"


def write_samples(path: Path, header: dict[str, Any], prompts: Sequence[Prompt], samples: Sequence[Sample]):
    """Writes a job's samples.

    Raises:
        TypeError: an environment's message holds what JSON doesn't.
    """
    lines = [json.dumps(header)]
    for prompt, sample in zip(prompts, samples, strict=True):
        lines.append(json.dumps(row_of(sample, prompt)))
    body = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(body + json.dumps({"checksum": checksum_of(body)}) + "\n", encoding="utf-8")


def read_samples(path: Path, prompts: Sequence[Prompt]) -> tuple[dict[str, Any], list[Sample]] | None:
    """A job's header and samples; None if there are none, or the file is damaged.

    Args:
        prompts: of the job, whose columns the samples get.
    """
    try:
        *lines, last = path.read_text(encoding="utf-8").splitlines(keepends=True)
        body = "".join(lines)
        if json.loads(last) != {"checksum": checksum_of(body)}:
            return None
        header, *rows = map(json.loads, lines)
    except (FileNotFoundError, ValueError):  # ValueError: no line, no UTF-8, or no JSON
        return None
    return header, [sample_of(row, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def row_of(sample: Sample, prompt: Prompt) -> dict[str, Any]:
    """A sample as a journal has it."""
    row = {"seed": list(prompt.seed)} | asdict(sample)
    del row["columns"]
    row["heads"] = [[ids.tolist(), log_probs.tolist()] for ids, log_probs in sample.heads]
    if sample.routing is not None:
        row["routing"] = [sample.routing.shape, base64.b64encode(sample.routing.tobytes()).decode()]
    return row


def sample_of(row: dict[str, Any], prompt: Prompt) -> Sample:
    """The inverse of `row_of`."""
    row = {name: value for name, value in row.items() if name != "seed"}
    row["turns"] = [Turn(**turn) for turn in row["turns"]]
    row["heads"] = [(np.array(ids, np.int64), np.array(log_probs, np.float32)) for ids, log_probs in row["heads"]]
    if row["routing"] is not None:
        shape, numbers = row["routing"]
        row["routing"] = np.frombuffer(base64.b64decode(numbers), np.int16).reshape(shape)
    return Sample(columns=prompt.columns, **row)


def remove_before(journal: Path, version: int):
    """Removes what older weights have sampled."""
    for folder in journal.glob("version-*"):
        if int(folder.name.removeprefix("version-")) < version:
            shutil.rmtree(folder, ignore_errors=True)


def checksum_of(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
