"""What can be evaluated: Hugging Face folders, LoRA adapters, and a coati run or checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from coati import run_layout
from coati.errors import UserError


@dataclass
class Loaded:
    """A model ready to respond.

    Attributes:
        actor: a `coati.models.Actor` in evaluation mode.
        max_length: the longest sequence of tokens that it reads, response included.
        fingerprint: a hash of its files, and of its base model's if it is an adapter.
    """

    name: str
    actor: object
    tokenizer: object
    max_length: int
    fingerprint: str


def model_folder(path: str) -> Path:
    """The folder that transformers opens, see `coati.run_layout.model_folder`."""
    return run_layout.model_folder(path, "--models")


def column_names(paths: list[str]) -> list[str]:
    """A short name per model: the folder's own, or the whole path where two would be the same.

    Raises:
        UserError: a model that is named twice.
    """
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"--models names {twice[0]} twice")
    return run_layout.names_of(paths)


def load_model(name: str, folder: Path, dtype: str, device, max_length: int | None = None) -> Loaded:
    """Load a model with its tokenizer.

    Raises:
        UserError: the folder can't be loaded; the tokenizer has ids that the model hasn't; max_length is too long.
    """
    import torch

    from coati.models.opened import open_model

    model = open_model(folder, getattr(torch, dtype), device)
    longest = model.max_length
    if max_length is not None and max_length > longest:
        raise UserError(f"--max_length {max_length} is more than the {longest} tokens that {folder} can read")
    fingerprint = hash_files(folder)
    if model.base != folder and model.base.is_dir():
        fingerprint += hash_files(model.base)
    return Loaded(name, model.actor, model.tokenizer, max_length or longest, fingerprint)


def hash_files(folder: Path) -> str:
    """A hash of the names and contents of all files directly in `folder`."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        whole.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()[:32]
