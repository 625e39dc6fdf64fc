"""The reference of preference optimization: log-probs of whole responses under the policy that a run starts from."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coati.data.dataset import cache_write_errors
from coati.data.sources import hash_file
from coati.files import atomic_write
from coati.losses import response_targets
from coati.losses.masking import masked
from coati.models.lora import base_of_adapter, is_adapter
from coati.parallel import Engine, Runtime, resolve_precision
from coati.parallel.factory import engine_class
from coati.trainers.batching import Batching
from coati.trainers.config import PreferenceConfig
from coati.transfer import to_device

CACHE_VERSION = 2  # count up whenever the same model and data give other log-probs


def response_sums(engine: Engine, batches: Sequence, inputs: Callable[[Any], dict[str, Any]]) -> list[Tensor]:
    """Sums of the log-probs of each row's response tokens, `[rows]`, by batch; no gradient.

    Args:
        inputs: what the model is called with, of a batch.
    """
    outputs = engine.forward_all([inputs(batch) for batch in batches])
    return [
        masked(log_probs, response_targets(batch.loss_mask)).sum(1)
        for log_probs, batch in zip(outputs, batches, strict=True)
    ]


class Reference:
    """Sums of log-probs under a frozen copy of the policy, or the policy without its adapter.

    Args:
        engine: the frozen copy, or the policy whose adapter is switched off.
        inputs: what the model is called with, of a batch.
    """

    def __init__(self, engine: Engine, inputs: Callable[[Any], dict[str, Any]]):
        self.engine, self.inputs = engine, inputs

    def sums(self, data, chunks: Sequence[Sequence[int]], batches: Sequence) -> list[Tensor]:
        """Of each row's response, `[rows]`, by batch.

        Args:
            data, chunks: where the batches' rows are from.
        """
        return self.sums_of(batches)

    def sums_of(self, batches: Sequence) -> list[Tensor]:
        """`sums` of batches that are no rows of the data."""
        return response_sums(self.engine, batches, self.inputs)


class CachedReference:
    """The sums of all rows of some data sets, computed once and kept in files.

    Args:
        of_sets: by the data's key, of chosen and rejected responses, `[rows, 2]`.
    """

    def __init__(self, of_sets: dict[str, Tensor], device: torch.device):
        self.of_sets, self.device = of_sets, device

    def sums(self, data, chunks: Sequence[Sequence[int]], batches: Sequence) -> list[Tensor]:
        """See `Reference`."""
        # chosen responses first, as in the batch
        return [to_device(self.of_sets[data.key][list(chunk)].T.flatten(), self.device) for chunk in chunks]


def cached_reference(
    config: PreferenceConfig,
    runtime: Runtime,
    data_sets: Sequence,
    make: Callable[[], Reference],
    load: Callable[[Any, list[int]], Any],
    batching: Batching,
) -> CachedReference:
    """Reads the sums of all rows, or computes them and writes them for later runs.

    Args:
        make: the reference; called only if something has to be computed.
        load: the batch of some rows.
    """
    main = runtime.is_main
    name = runtime.communicator.broadcast(_name_of_reference(config) if main else None)
    folder = Path(config.data.cache_dir or "~/.cache/coati").expanduser()
    found: dict[str, Tensor] = {}
    reference: Reference | None = None
    for data in data_sets:
        digest = hashlib.sha256(json.dumps([name, data.key]).encode()).hexdigest()[:32]
        path = folder / f"reference-{digest}.safetensors"
        stored = runtime.communicator.broadcast(_read(path) if main else None)
        if stored is None:
            reference = reference or make()
            runtime.say(f"computing the reference's log-probs of {len(data)} rows, once ...")
            stored = _compute(reference, data, load, batching)
            runtime.say(f"reference log-probs of {len(data)} rows: {path}")
            if main:
                with cache_write_errors(folder):
                    _write(path, stored)
        found[data.key] = stored
    return CachedReference(found, runtime.device)


def _compute(reference: Reference, data, load, batching: Batching) -> Tensor:
    """The sums of all rows, `[rows, 2]`; each rank computes its share."""
    found: dict[int, list[float]] = {}
    for chunk in batching.shard_all(data.lengths):
        rows = [row for row, _ in chunk]
        [sums] = reference.sums_of([load(data, rows)])
        found |= zip(rows, sums.view(2, -1).T.tolist(), strict=True)
    whole = {row: sums for part in batching.ranks.gather(found) for row, sums in part.items()}
    return torch.tensor([whole[row] for row in range(len(data))])


def _name_of_reference(c: PreferenceConfig) -> list:
    """All that the reference's log-probs depend on beside the data, for a hash."""
    folders = [Path(c.model.path)]
    if is_adapter(c.model.path):
        folders.append(Path(base_of_adapter(c.model.path)))
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
    if c.model.model_config and Path(c.model.model_config).is_file():
        files.append(Path(c.model.model_config))
    hashes = [hash_file(path) for path in files]
    return [
        CACHE_VERSION,
        resolve_precision(c.parallel),
        str(engine_class(c.parallel).loads_in(c.parallel)),
        *hashes,
        *map(_revision_of, folders),
    ]


def _revision_of(model: Path) -> str | None:
    """The commit of a model of the Hugging Face hub; None for a folder."""
    from transformers import AutoConfig

    return None if model.is_dir() else AutoConfig.from_pretrained(str(model))._commit_hash


def _read(path: Path) -> Tensor | None:
    from safetensors.torch import load_file

    return load_file(path)["log_probs"] if path.is_file() else None


def _write(path: Path, log_probs: Tensor):
    from filelock import FileLock
    from safetensors.torch import save_file

    with FileLock(f"{path}.lock"), atomic_write(path) as aside:  # another run may compute the same
        save_file({"log_probs": log_probs.contiguous()}, aside)
