"""Versions of a policy's weights as files: version v is what v iterations have made of it.

A whole file each, on a disk that trainer and generators see, or in /dev/shm on one machine. With LoRA it holds what
trains, and generators add it to the same frozen model.
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from coati.files import atomic_write, sync

CHUNK = 2**20  # bytes that a checksum reads at a time


class WeightVersions:
    """The versions that generators may be asked to sample with.

    Args:
        folder: of the files.
        state: gives the policy's full state on rank 0 (`Engine.state_dict`); all ranks call it together.
        policy: the module, which knows what of it trains.
        dtype: in which generators compute.
        runtime: this process's place in the run.
        staleness: how many versions before the newest stay.

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
    ):
        self.folder, self.state, self.policy, self.dtype = folder, state, policy, dtype
        self.runtime, self.staleness = runtime, staleness
        self.checksums: dict[int, str] = {}

    def path(self, version: int) -> Path:
        return version_file(self.folder, version)

    def publish(self, version: int):
        """Writes the weights that the policy has now, on all ranks together, unless that version is there already."""
        if version in self.checksums:
            return
        state, checksum = self.state(), None
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            checksum = write_weights(self.path(version), weights_of(self.policy, state, self.dtype))
        self.checksums[version] = self.runtime.communicator.broadcast(checksum)
        for old in [old for old in self.checksums if old < version - self.staleness]:
            del self.checksums[old]
            if self.runtime.is_main:
                self.path(old).unlink(missing_ok=True)

    def save(self, folder: Path, step: int):
        """Copies into a checkpoint what a run needs that goes on after `step` iterations: the versions before."""
        if not self.runtime.is_main:
            return
        for version in range(max(0, step - self.staleness), step):
            folder.mkdir(exist_ok=True)
            link_or_copy(self.path(version), version_file(folder, version))
        if folder.exists():
            sync(folder)

    def load(self, folder: Path, step: int):
        """The inverse of `save`. What else is in the folder of versions is another run's, or of steps that are
        abandoned."""
        found: dict[int, str] = {}
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("version-*"):
                path.unlink()
            for version in range(max(0, step - self.staleness), step):
                with suppress(FileNotFoundError):  # of a run that went on with less staleness
                    link_or_copy(version_file(folder, version), self.path(version))
                    found[version] = checksum_of(self.path(version))
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
    """Writes a version; returns its checksum."""
    from safetensors.torch import save_file

    with atomic_write(path) as partial:
        save_file(weights, partial)
        return checksum_of(partial)


@torch.no_grad()
def load_weights(policy: nn.Module, path: Path, checksum: str):
    """Gives a policy the weights of a file.

    Raises:
        RuntimeError: the file is damaged, or of another model. The policy is as it was then.
    """
    from safetensors import safe_open

    if checksum_of(path) != checksum:
        raise RuntimeError(f"{path} is damaged, or was written again: its checksum is not {checksum}")
    own = policy.state_dict()
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
        wrong = [name for name in names if name not in own or list(own[name].shape) != shapes[name]]
        if wrong:
            raise RuntimeError(f"{path} holds the weights of another model: {wrong[0]}")
        given = {own[name].data_ptr() for name in names}
        missing = [name for name, tensor in own.items() if tensor.data_ptr() not in given]
        if missing and not policy.has_adapter:
            raise RuntimeError(f"{path} lacks weights: {missing[0]}")
        for name in names:
            own[name].copy_(file.get_tensor(name))


def checksum_of(path: Path) -> str:
    """Of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path):
    """A second name for a file that nobody writes to again, or a copy on another disk."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
