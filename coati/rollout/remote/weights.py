"""Versions of a policy's weights as files: version v is what v iterations have made of it.

A file each, on a disk that trainer and generators see, or in /dev/shm on one machine: the whole weights, or their
differences from the version before (`differences.py`). With LoRA they are what trains, which generators add to the
same frozen model. Jobs name a version by the checksum of its weights, however they are stored.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from coati.files import sync
from coati.rollout.remote.differences import (
    DifferenceWriter,
    apply_differences,
    base_of,
    chain_of,
    checksum_of,
    put_together,
    write_file,
)

VERSIONS = "version-*"  # their files


class WeightVersions:
    """The versions that generators may be asked to sample with.

    Args:
        folder: of the files.
        state: gives the policy's full state on rank 0 (`Engine.state_dict`); all ranks call it together.
        policy: the module, which knows what of it trains.
        dtype: in which generators compute.
        runtime: this process's place in the run.
        staleness: how many versions before the newest stay, with the files that they are put together from.
        differences: writes versions as differences; None: each is a whole file.

    Attributes:
        checksums: of the versions that are there.
    """

    def __init__(
        self,
        folder: Path,
        state: Callable[[], dict[str, Tensor]],
        policy: nn.Module,
        dtype: torch.dtype,
        runtime,
        staleness: int,
        differences: DifferenceWriter | None = None,
    ):
        self.folder, self.state, self.policy, self.dtype = folder, state, policy, dtype
        self.runtime, self.staleness, self.differences = runtime, staleness, differences
        self.checksums: dict[int, str] = {}

    def path(self, version: int) -> Path:
        return version_file(self.folder, version)

    def publish(self, version: int) -> int:
        """Writes the weights that the policy has now, on all ranks together, unless that version is there already;
        returns the bytes of the file."""
        if version in self.checksums:
            return 0
        state, written = self.state(), None
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path, weights = self.path(version), weights_of(self.policy, state, self.dtype)
            write = write_weights if self.differences is None else self.differences.write
            written = write(path, weights), path.stat().st_size
        self.checksums[version], size = self.runtime.communicator.broadcast(written)
        for old in [old for old in self.checksums if old < version - self.staleness]:
            del self.checksums[old]
        if self.runtime.is_main:
            needed = {path for version in self.checksums for path in chain_of(self.path(version))}
            for path in self.folder.glob(VERSIONS):
                if path not in needed:
                    path.unlink()
        return size

    def save(self, folder: Path, step: int):
        """Puts into a checkpoint what a run needs that goes on after `step` iterations: the versions before, as whole
        files."""
        if not self.runtime.is_main:
            return
        for version in range(max(0, step - self.staleness), step):
            folder.mkdir(exist_ok=True)
            path, target = self.path(version), version_file(folder, version)
            if base_of(path) is None:
                link_or_copy(path, target)
            else:
                write_weights(target, put_together(path))
        if folder.exists():
            sync(folder)

    def load(self, folder: Path, step: int):
        """The inverse of `save`. What else is in the folder of versions is another run's, or of steps that are
        abandoned."""
        from safetensors.torch import load_file

        found: dict[int, str] = {}
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(VERSIONS):
                path.unlink()
            for version in range(max(0, step - self.staleness), step):
                with suppress(FileNotFoundError):  # of a run that went on with less staleness
                    link_or_copy(version_file(folder, version), self.path(version))
                    found[version] = checksum_of(load_file(self.path(version)))
        self.checksums = self.runtime.communicator.broadcast(found)


def version_file(folder: Path, version: int) -> Path:
    """The file of a version."""
    return folder / f"version-{version:08d}.safetensors"


def weights_of(policy: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What generators need of a policy's state: the transformer's weights, or with adapters what trains.

    Args:
        policy: an `Actor`, or an `ActorCritic`, whose value head is left out.
    """
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    chosen: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in state.items():
        is_shared = tensor.data_ptr() in seen and tensor.numel() > 0
        if not name.startswith("model.") or is_shared or (policy.has_adapter and name not in trained):
            continue
        seen.add(tensor.data_ptr())
        chosen[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    return chosen


def write_weights(path: Path, weights: dict[str, Tensor]) -> str:
    """Writes a version as a whole file; returns the checksum of its weights."""
    write_file(path, weights)
    return checksum_of(weights)


@torch.no_grad()
def load_weights(policy: nn.Module, path: Path, checksum: str, loaded: str = ""):
    """Gives a policy the weights of a version.

    Args:
        path: the version's file; those that it is put together from are in the same folder.
        checksum: of the version's weights.
        loaded: of the weights that the policy has now, if they are a version's: differences are added to these.

    Raises:
        RuntimeError: a file is damaged, or of another model. The policy is as it was then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        files = [(file, base_of(file), load_file(file)) for file in chain_of(path, loaded)]
    except SafetensorError as error:
        raise RuntimeError(f"{path} or a file of the weights before it is damaged: {error}") from error
    for file, base, tensors in reversed(files):
        result, expected = (checksum, checksum) if base is None else (base.result, base.differences)
        if result != checksum or checksum_of(tensors) != expected:
            raise RuntimeError(f"{file} is damaged, or was written again: its weights' checksum is not {checksum}")
        checksum = "" if base is None else base.weights
    own = policy.state_dict()
    file, base, tensors = files[0]
    if base is None:
        refuse_other_model(policy, own, tensors, file)
    for _, _, tensors in files:
        apply_differences(own, tensors)


def refuse_other_model(policy: nn.Module, own: dict[str, Tensor], given: dict[str, Tensor], path: Path):
    """Raises a RuntimeError unless the whole weights of a file are those of a policy with this state."""
    wrong = [name for name in given if name not in own or own[name].shape != given[name].shape]
    if wrong:
        raise RuntimeError(f"{path} holds the weights of another model: {wrong[0]}")
    places = {own[name].data_ptr() for name in given}
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in places]
    if missing and not policy.has_adapter:
        raise RuntimeError(f"{path} lacks weights: {missing[0]}")


def link_or_copy(source: Path, target: Path):
    """A second name for a file that nobody writes to again, or a copy on another disk."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
