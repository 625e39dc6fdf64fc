"""What can be evaluated: Hugging Face folders, LoRA adapters, and a coati run or checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coati.errors import UserError
from colossal_eval.run.response_store import hash_files

_FILES = ("config.json", "adapter_config.json")
_INSIDE = ("model", "actor/model", "model/model")


@dataclass
class Loaded:
    """A model ready to answer.

    Attributes:
        actor: a `coati.models.Actor` in evaluation mode.
        max_length: the longest sequence of tokens that it reads, answer included.
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
    folder = Path(path).expanduser()
    for candidate in (folder, *(folder / name for name in _INSIDE)):
        if any((candidate / name).is_file() for name in _FILES):
            return candidate
    for step in sorted((folder / "checkpoints").glob("step-" + "[0-9]" * 8), reverse=True):
        if (step / "manifest.json").is_file():
            return model_folder(str(step))
    if not folder.is_dir():
        raise UserError(f"--models {path} is no folder; models are read from folders, nothing is downloaded")
    raise UserError(
        f"--models {path} holds neither {' nor '.join(_FILES)}, nor {', '.join(_INSIDE)}, nor coati checkpoints"
    )


def column_names(paths: list[str]) -> list[str]:
    """A short name a model: the folder's own, or the whole path where two would be the same.

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
    place = folder if (folder / "tokenizer_config.json").is_file() else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place))
    except (OSError, ValueError) as error:
        raise UserError(f"{place} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}") from error
    rows = actor.transformer.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer in {place} has {len(tokenizer)} tokens, the model in {folder} only {rows}")
    most = longest(actor, tokenizer)
    if max_length is not None and max_length > most:
        raise UserError(f"--max_length {max_length} is more than the {most} tokens that {folder} can read")
    fingerprint = hash_files(folder) + (hash_files(base) if base != folder and base.is_dir() else "")
    return Loaded(name, actor, tokenizer, max_length or most, fingerprint)


def longest(actor, tokenizer) -> int:
    """The longest sequence, in tokens, that a model and its tokenizer say they read."""
    config = actor.transformer.config.get_text_config()
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([n for n in known if n] + [int(min(tokenizer.model_max_length, 2**20))])
