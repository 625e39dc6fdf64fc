"""Models to generate from, with their tokenizers: of Hugging Face folders and LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.errors import UserError


@dataclass
class OpenedModel:
    """A model that is ready to generate.

    Attributes:
        folder: where its weights lie, or its adapter's; base: the base model of an adapter, else the same.
        actor: an `Actor` in evaluation mode.
        tokenizer: as it lies in the folder, or in that of the base.
        max_length: the longest sequence, in tokens, that both say they read.
    """

    folder: Path
    base: Path
    actor: Any
    tokenizer: Any
    max_length: int


def open_model(folder: Path, dtype, device) -> OpenedModel:
    """Loads the model that `coati.run_layout.model_folder` has found, and its tokenizer.

    Args:
        dtype: a torch dtype; None for that of the files.

    Raises:
        UserError: the folder can't be loaded, or the tokenizer has ids that the model hasn't.
    """
    from transformers import AutoTokenizer

    from coati.models.actor import Actor
    from coati.models.base import stored_dtype
    from coati.models.lora import base_of_adapter, is_adapter

    base = Path(base_of_adapter(folder)) if is_adapter(folder) else folder
    actor = Actor(str(folder), dtype=dtype or stored_dtype(base)).eval().to(device)
    location = folder if (folder / "tokenizer_config.json").is_file() else base
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(location))
    except (OSError, ValueError) as error:
        raise UserError(f"{location} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}") from error
    rows = actor.transformer.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer in {location} has {len(tokenizer)} tokens, the model in {folder} only {rows}")
    return OpenedModel(folder, base, actor, tokenizer, longest_sequence(actor, tokenizer))


def longest_sequence(actor, tokenizer) -> int:
    """The longest sequence, in tokens, that a model and its tokenizer say they read."""
    config = actor.transformer.config.get_text_config()
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    return min([n for n in known if n] + [int(min(tokenizer.model_max_length, 2**20))])
