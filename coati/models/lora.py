"""Low-rank adapters, through peft."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from coati.errors import UserError


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al., 2106.09685): W + alpha / rank * B A on the target modules.

    Attributes:
        variant: `lora`; `rslora` (2312.03732), which divides alpha by the square root of the rank; `dora` (2402.09353,
            eq. 5), which scales each row of that sum to a length that trains.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    variant: str = "lora"


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
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        layers = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(f"lora_target_modules {names} match nothing; this model has {', '.join(layers)}") from error


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def is_untrained_adapter(model: nn.Module) -> bool:
    """Whether a model trains LoRA alone, which changes nothing yet: B is 0 until the first step. Biases that train
    beside it are none of it: switching the adapter off would not bring the old ones back."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    second = [p for name, p in trained.items() if "lora_B" in name]
    alone = all("lora_A" in name or "lora_B" in name for name in trained)
    return bool(second) and alone and not any(p.any() for p in second)


def base_of_adapter(folder: str | Path) -> str:
    """The model that an adapter folder was trained on.

    Raises:
        UserError: the folder does not say.
    """
    base = json.loads((Path(folder) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder}/adapter_config.json lacks base_model_name_or_path: add the path of the base model")
    return base
