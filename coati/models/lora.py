"""Low-rank adapters, through peft."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from coati.errors import UserError


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al., 2106.09685): W + alpha / rank * B A on the target modules."""

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freezes `model` and adds trainable adapters.

    Raises:
        UserError: no module has one of the names.
    """
    from peft import LoraConfig, get_peft_model

    names = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names[0] if names == ["all-linear"] else names,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        found = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(f"lora_target_modules {names} match nothing; this model has {', '.join(found)}") from error


def merged_on_host(model: nn.Module) -> nn.Module:
    """A copy of a model with its adapters added to the weights, in the host's memory: a GPU may have no room for it."""
    held = [*model.parameters(), *model.buffers()]
    # deepcopy takes what the memo holds for already copied
    memo: dict[int, Any] = {id(x): x.detach().to("cpu", copy=True) for x in held}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo).merge_and_unload()


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def is_untrained_adapter(model: nn.Module) -> bool:
    """Whether the model's trainable adapter changes nothing yet: B is 0 until the first step."""
    second = [p for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad]
    return bool(second) and not any(p.any() for p in second)


def base_of_adapter(folder: str | Path) -> str:
    """The model that an adapter folder was trained on.

    Raises:
        UserError: the folder does not say.
    """
    base = json.loads((Path(folder) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}/adapter_config.json lacks base_model_name_or_path: add the path of the base model")
    return base


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts a saved adapter on its base model, trainable."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
