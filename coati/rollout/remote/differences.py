"""What of a version's weights is not as in the version before it.

Tensors are compared as bits, so NaN equals itself and 0 is not -0. A tensor without a change is left out. Of another
one either all of it is stored, or the numbers that changed and where they are, whichever takes fewer bytes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from coati.files import atomic_write

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number
GAPS, VALUES = "/gaps", "/values"  # after the name of a tensor
FULL = 255  # numbers that a byte of gaps skips without one that changed


@dataclass(frozen=True)
class Base:
    """What a file of differences tells of itself.

    Attributes:
        file, weights: the file of the version that they are added to, in the same folder, and its weights' checksum.
        result: checksum of the weights that come of it.
        differences: checksum of the differences.
    """

    file: str
    weights: str
    result: str
    differences: str


class DifferenceWriter:
    """Writes versions one after the other, each as its differences from the one before.

    The first is written whole, and so is one where all differences since the last whole one would be as many bytes as
    that: to get at a version, at most twice the bytes of the weights are read.

    Attributes:
        path, checksum, weights: what was written last; the weights are a copy.
        bytes: of the differences since the last whole file.
    """

    def __init__(self):
        self.path, self.checksum = Path(), ""
        self.weights: dict[str, Tensor] = {}
        self.bytes = 0

    def write(self, path: Path, weights: dict[str, Tensor]) -> str:
        """Writes a version into the folder of the one before; returns the checksum of its weights.

        Args:
            weights: contiguous tensors, with names, shapes and dtypes that never change.
        """
        checksum = checksum_of(weights)
        differences = differences_of(self.weights, weights) if self.weights else weights
        self.bytes += bytes_of(differences)
        if self.weights and self.bytes < bytes_of(weights):
            base = Base(self.path.name, self.checksum, checksum, checksum_of(differences))
            write_file(path, differences, asdict(base))
        else:
            self.bytes = 0
            write_file(path, weights)
        self.path, self.checksum = path, checksum
        for name, tensor in weights.items():
            if name in self.weights:
                self.weights[name].copy_(tensor)
            else:
                self.weights[name] = tensor.clone()
        return checksum


def differences_of(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What makes `new` of `old`, on the CPU: of a tensor that mostly changed all of it, under its name; of others
    `NAME/values`, the numbers that changed, and `NAME/gaps`, where they are (`gaps_of`)."""
    stored = {}
    for name, tensor in new.items():
        bits = BITS[tensor.element_size()]
        changed = old[name].view(bits) != tensor.view(bits)
        count = int(changed.count_nonzero())
        if count == 0:
            continue
        if count * (1 + tensor.element_size()) >= tensor.nbytes:
            stored[name] = tensor
        else:
            positions = np.flatnonzero(changed.numpy())
            stored[name + GAPS] = torch.from_numpy(gaps_of(positions))
            stored[name + VALUES] = tensor.view(-1)[torch.from_numpy(positions)]
    return stored


def apply_differences(weights: Mapping[str, Tensor], differences: Mapping[str, Tensor]):
    """Changes `weights` in place, on whatever device they are."""
    for key, tensor in differences.items():
        if key.endswith(VALUES):
            name = key.removesuffix(VALUES)
            target = weights[name]
            positions = torch.from_numpy(positions_of(differences[name + GAPS].numpy()))
            target.view(-1)[positions.to(target.device)] = tensor.to(target.device, target.dtype)
        elif not key.endswith(GAPS):
            weights[key].copy_(tensor)


def gaps_of(positions: np.ndarray) -> np.ndarray:
    """Rising positions, int64, as bytes: for each how many numbers lie between it and the one before, after a 255 for
    each 255 of them.

    >>> gaps_of(np.array([0, 3, 260, 1000])).tolist()
    [0, 2, 255, 1, 255, 255, 229]
    """
    gaps = np.diff(positions, prepend=-1) - 1
    far = np.flatnonzero(gaps >= FULL)
    skips, gaps[far] = np.divmod(gaps[far], FULL)
    return np.insert(gaps.astype(np.uint8), np.repeat(far, skips), FULL)


def positions_of(gaps: np.ndarray) -> np.ndarray:
    """The inverse of `gaps_of`.

    >>> positions_of(np.array([0, 2, 255, 1, 255, 255, 229], np.uint8)).tolist()
    [0, 3, 260, 1000]
    """
    between = np.cumsum(gaps, dtype=np.int64)[gaps < FULL]
    return between + np.arange(len(between))


def write_file(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None):
    """Writes tensors atomically, and what is told of them."""
    from safetensors.torch import save_file

    with atomic_write(path) as partial:
        save_file(tensors, partial, about)


def base_of(path: Path) -> Base | None:
    """What a file of differences is added to; None for whole weights."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    return Base(**about) if about else None


def chain_of(path: Path, loaded: str = "") -> list[Path]:
    """The files that a version is put together from, oldest first: from a whole one on, or from the one that is added
    to the weights with the checksum `loaded`."""
    chain = [path]
    while (base := base_of(chain[0])) is not None and base.weights != loaded:
        chain.insert(0, path.with_name(base.file))
    return chain


def put_together(path: Path) -> dict[str, Tensor]:
    """The whole weights of a version."""
    from safetensors.torch import load_file

    first, *others = chain_of(path)
    weights = {name: tensor.clone() for name, tensor in load_file(first).items()}
    for file in others:
        apply_differences(weights, load_file(file))
    return weights


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes of tensors on the CPU, in whatever order they are."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
