"""What can be evaluated: Hugging Face folders, LoRA adapters, and a coati run or checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from coati.errors import UserError
from coati.run_layout import find_model


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
    """The folder that transformers opens: `path` itself, the finished model or the newest checkpoint of a coati run.

    Raises:
        UserError: there is none in it.
    """
    if not Path(path).is_dir():
        raise UserError(f"--models {path} is no folder; models are read from folders, nothing is downloaded")
    folder = find_model(Path(path))
    if folder is None:
        raise UserError(
            f"--models {path} holds neither config.json nor adapter_config.json, nor a finished coati run, "
            "nor coati checkpoints that are complete"
        )
    return folder


def column_names(paths: list[str]) -> list[str]:
    """A short name per model: the folder's own, or the whole path where two would be the same.

    Raises:
        UserError: a model that is named twice.
    """
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"--models names {twice[0]} twice")
    short = [Path(path).resolve().name for path in paths]
    return [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]


def load_model(name: str, folder: Path, dtype: str, device, max_length: int | None = None) -> Loaded:
    """Load a model with its tokenizer.

    Raises:
        UserError: the folder can't be loaded; the tokenizer has ids that the model hasn't; max_length is too long.
    """
    import torch
    from transformers import AutoTokenizer

    from coati.models import Actor
    from coati.models.lora import base_of_adapter, is_adapter

    base = Path(base_of_adapter(folder)) if is_adapter(folder) else folder
    actor = Actor(str(folder), dtype=getattr(torch, dtype)).eval().to(device)
    location = folder if (folder / "tokenizer_config.json").is_file() else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(location))
    except (OSError, ValueError) as error:
        raise UserError(f"{location} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}") from error
    rows = actor.transformer.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer in {location} has {len(tokenizer)} tokens, the model in {folder} only {rows}")
    longest = longest_sequence(actor, tokenizer)
    if max_length is not None and max_length > longest:
        raise UserError(f"--max_length {max_length} is more than the {longest} tokens that {folder} can read")
    fingerprint = hash_files(folder)
    if base != folder and base.is_dir():
        fingerprint += hash_files(base)
    return Loaded(name, actor, tokenizer, max_length or longest, fingerprint)


def longest_sequence(actor, tokenizer) -> int:
    """The longest sequence, in tokens, that a model and its tokenizer say they read."""
    config = actor.transformer.config.get_text_config()
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([n for n in known if n] + [int(min(tokenizer.model_max_length, 2**20))])


def hash_files(folder: Path) -> str:
    """A hash of the names and contents of all files directly in `folder`."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        whole.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()[:32]
