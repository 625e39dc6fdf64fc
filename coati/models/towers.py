"""Models of text and images, sound or video, of which coati reads and trains the language model alone."""

from torch import nn

# other configs have parts too: of attention (DBRX, MPT), of a language model's stages (BLT)
TOWERS = {"vision_config", "audio_config", "vq_config"}


def has_towers(config) -> bool:
    """Whether a config describes parts beside a language model, such as a vision tower."""
    return not TOWERS.isdisjoint(getattr(config, "sub_configs", {}))


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the largest modules that text doesn't reach: what reads images, sound or video, and what hands that on
    to the language model. None in a language model."""
    if not has_towers(model.config):
        return {}
    text = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    of_text = {id(p) for part in text for p in part.parameters()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        own = {id(p) for p in module.parameters()}
        if own and not own & of_text and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def freeze_towers(model: nn.Module) -> str | None:
    """Keeps towers as they are: text gives them no gradient, but weight decay would shrink them.

    Returns:
        A line for the user; None of a language model.
    """
    found = towers(model)
    for module in found.values():
        module.requires_grad_(False)
    if not found:
        return None
    return f"{type(model).__name__}: {', '.join(found)} stay as they are, as coati reads texts only"


def without_towers(stored, config) -> str | None:
    """A line for the user where only the language model was made of what is stored.

    Args:
        stored: the config beside the weights.
        config: that of the model that was made.
    """
    if not has_towers(stored) or has_towers(config):
        return None
    return f"of this {stored.model_type} the language model alone is loaded, and saved: it reads texts only"


def modules_of_towers(model: nn.Module) -> str | None:
    """A pattern of the names of all modules in towers, whatever the model is a part of; None where there are none."""
    names = sorted({name.rpartition(".")[2] for name in towers(model)})
    return rf"(.*\.)?({'|'.join(names)})(\..*)?" if names else None
