"""What a model folder says of generation: made valid, and in agreement with the tokenizer."""

import re

from torch import nn


def repair_generation_config(model: nn.Module) -> str | None:
    """Makes a transformers model's generation config one that can be saved: transformers loads settings that
    contradict each other, and refuses to save them.

    Settings of sampling without `do_sample` switch it on; others that have no effect go back to their defaults.

    Returns:
        A line that says what was changed; None if nothing was.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    before, defaults = config.to_dict(), type(config)()
    while names := _contradictions(config):
        if not config.do_sample and "do_sample" in names.values():
            config.do_sample = True
        else:
            for name in names:
                setattr(config, name, getattr(defaults, name))
    after = config.to_dict()
    changes = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if not changes:
        return None
    return f"generation_config.json contradicts itself, changed to save it: {', '.join(changes)}"


def _contradictions(config) -> dict[str, str]:
    """Settings without effect, each with the first other setting that transformers names as the reason."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = re.findall(r"^- `(\w+)`: (.*)$", str(error), re.MULTILINE)
        return {name: (re.findall(r"`(\w+)`", reason) or [""])[0] for name, reason in lines}
    return {}


def align_eos(model: nn.Module, eos_token_id: int):
    """Makes a transformers model's configs name the tokenizer's EOS first, and then those that its generation config
    has: whatever generates from the saved folder ends where training did."""
    configs = [model.config, model.config.get_text_config()]
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        configs.append(generation)
    known = configs[-1].eos_token_id
    if not isinstance(known, list):
        known = [known]
    ids = [number for number in dict.fromkeys([eos_token_id, *known]) if number is not None]
    for config in configs:
        config.eos_token_id = ids if len(ids) > 1 else ids[0]
