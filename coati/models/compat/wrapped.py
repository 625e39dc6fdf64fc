"""What a value-head model wraps: is it a language model, where is its head, which adapter does it have."""

import logging
from pathlib import Path

from torch import Tensor, nn

from coati.errors import UserError
from coati.models.adapters import load_adapter
from coati.models.base import load_transformer
from coati.models.lora import base_of_adapter

logger = logging.getLogger(__name__)


def check_language_model(model, wrapper) -> nn.Module:
    """The transformers model itself, inside any adapter, which `wrapper` is for.

    Raises:
        UserError: as `PreTrainedModelWrapper` says.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel

    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise UserError(
            "a value head goes on a transformers model (a PreTrainedModel or PeftModel) or its folder or name, not on "
            f"{type(model)}"
        )
    base = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        for config in model.peft_config.values():
            _check_adapter(config)
    name = type(base).__name__
    has_head = language_model_head(base, wrapper.lm_head_namings) is not None
    if not has_head or bool(base.config.is_encoder_decoder) != wrapper.is_encoder_decoder:
        kind = wrapper.transformers_parent_class.__name__
        raise UserError(f"{name} is no language model with a language model head that {kind} would load")
    if any(parameter.is_meta for parameter in base.parameters()):
        raise UserError(
            f"weights of {name} are offloaded: a value head needs a device_map that fits without offloading"
        )
    return base


def language_model_head(base: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The output layer of a transformers model: what it says is one, or else has one of the names."""
    head = base.get_output_embeddings()
    if head is not None:
        return head
    return next((module for name, module in base.named_modules() if name.rpartition(".")[2] in names), None)


def pop_head(model) -> dict[str, Tensor]:
    """Removes a head from a model that carries one, and gives its tensors, `v_head.*`."""
    owners = [part for part in (model, getattr(model, "base_model", None)) if isinstance(part, nn.Module)]
    owners += [model.get_base_model()] if hasattr(model, "get_base_model") else []
    for owner in owners:
        if "v_head" in owner._modules:
            head = owner.v_head
            del owner.v_head
            return {f"v_head.{name}": tensor for name, tensor in head.state_dict().items()}
    return {}


def _check_adapter(config):
    from peft import PeftConfig

    if not isinstance(config, PeftConfig):
        kind = type(config).__name__
        raise UserError(f"peft_config is a {kind}: give a peft config such as LoraConfig, which is a peft.PeftConfig")
    if config.is_prompt_learning:
        raise UserError(
            f"{type(config).__name__}: prompt and prefix tuning don't work with a value head (no PromptLearningConfig "
            "does): use LoRA"
        )


def load_base(auto_class, source: str, is_trainable: bool, hub: dict, kwargs: dict) -> nn.Module:
    """The model of a folder or name, inside its adapter if it is an adapter's."""
    from transformers.utils.peft_utils import find_adapter_config_file

    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    config_file = find_adapter_config_file(source, **hub)
    if config_file is None:
        return load_transformer(auto_class, source, config, kwargs)
    for name in ("revision", "subfolder"):  # the adapter's, which lies elsewhere than its base
        kwargs.pop(name, None)
    base = load_transformer(auto_class, base_of_adapter(Path(config_file).parent), config, kwargs)
    adapted, _ = load_adapter(base, source, is_trainable, **hub)
    return adapted


def add_adapter(model: nn.Module, peft_config, kbit: dict) -> nn.Module:
    from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

    _check_adapter(peft_config)
    if isinstance(model, PeftModel):
        logger.warning("peft_config is ignored: the model has an adapter already")
        return model
    if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
        model = prepare_model_for_kbit_training(model, **kbit)
    return get_peft_model(model, peft_config)
