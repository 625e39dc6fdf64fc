"""Low-rank adapters, through peft."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from coati.errors import UserError
from coati.models.experts import parameters_of_experts
from coati.models.towers import modules_of_towers

ROUTERS = ("gate", "router", "shared_expert_gate")  # what some mixtures of experts call linear layers that route


@dataclass(frozen=True)
class LoraSettings:
    """LoRA (Hu et al., 2106.09685): W + alpha / rank * B A on the target modules.

    Attributes:
        variant: `lora`; `rslora` (2312.03732), which divides alpha by the square root of the rank; `dora` (2402.09353,
            eq. 5), which scales each row of that sum to a length that trains.
        modules_to_save: modules beside those that train whole.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    variant: str = "lora"
    modules_to_save: list[str] = field(default_factory=list)


def add_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """Freezes `model` and adds trainable adapters.

    Of a mixture of experts, "all-linear" is what all tokens pass, but for routers; experts get adapters if their
    parameters (`gate_up_proj`, `down_proj`) are named, as each forward pass then makes a copy of all their weights.
    What reads images or sound gets none.

    Raises:
        UserError: no module has one of the names; a kind of adapter that experts can't have.
    """
    from peft import LoraConfig, get_peft_model

    whole = _modules_to_save(model, settings.modules_to_save)
    names = settings.target_modules
    modules: str | list[str] = "all-linear" if names == ["all-linear"] else names
    parameters: list[str] = []
    if experts := parameters_of_experts(model):
        parameters = [name for name in experts if _is_named(name, names)]
        modules = _layers_beside_experts(model, names)
    if parameters and (settings.dropout or settings.variant == "dora"):
        raise UserError(f"adapters of experts ({parameters[0]}) take neither lora_dropout nor lora_variant dora")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
        exclude_modules=modules_of_towers(model),
        modules_to_save=whole or None,
    )
    try:
        with warnings.catch_warnings():  # tied embeddings that train whole are no longer tied
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message=".*exclude_modules.*")  # towers without layers of these names
            return get_peft_model(model, config)
    except ValueError as error:
        layers = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise UserError(f"lora_target_modules {names} match nothing; this model has {', '.join(layers)}") from error


def _modules_to_save(model: nn.Module, names: list[str]) -> list[str]:
    """The names of modules that a model has: one without a head, such as a critic's, may lack some."""
    there = [name for name in names if any(_is_named(module, [name]) for module, _ in model.named_modules())]
    if there != names and model.get_output_embeddings() is not None:
        lacking = next(name for name in names if name not in there)
        children = sorted(
            {name.rpartition(".")[2] for name, _ in model.named_modules() if not name[-1:].isdigit()} - {""}
        )
        raise UserError(f"lora_modules_to_save {lacking} matches nothing; this model has {', '.join(children)}")
    return there


def experts_note(model: nn.Module, settings: LoraSettings) -> str | None:
    """A note on experts that get no adapters."""
    left = [name for name in parameters_of_experts(model) if not _is_named(name, settings.target_modules)]
    names = sorted({name.rpartition(".")[2] for name in left})
    if not names:
        return None
    return f"LoRA leaves the experts as they are: add {' and '.join(names)} to lora_target_modules to adapt them too"


def _layers_beside_experts(model: nn.Module, names: list[str]) -> list[str]:
    """The linear layers with one of these names; of "all-linear" all but routers, the output layer, and those whose
    names peft takes for the experts' (in some architectures dense and shared experts' projections)."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [name for name in linear if _is_named(name, names)]
    if "all-linear" in names:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        known = LoraConfig(target_modules=[name for name in linear if name.rpartition(".")[2] not in ROUTERS])
        convert_peft_config_for_transformers(known, model, None)
        chosen += [name for name in known.target_modules if model.get_submodule(name) is not head]
    return sorted(set(chosen))


def _is_named(name: str, names: list[str]) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in names)


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
