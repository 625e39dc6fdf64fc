"""Which attention kernel a transformers model runs."""

from torch import nn

from coati.errors import UserError


def soft_cap(config) -> float | None:
    """What attention's scores are capped at, as in Gemma 2 (2408.00118, section 2); None for no cap."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    caps = [getattr(part, "attn_logit_softcapping", None) for part in parts]
    return next((cap for cap in caps if cap), None)


def check_attention(config, attn_implementation: str):
    """Raises for a kernel that a model's config doesn't support.

    Raises:
        UserError: sdpa for a model with capped scores, which some releases of transformers would leave out.
    """
    cap = soft_cap(config)
    if attn_implementation == "sdpa" and cap:
        raise UserError(
            f"sdpa attention can't cap scores, and {config.model_type} caps them at {cap}: leave attn_implementation "
            "at auto, or give eager"
        )


def set_eager_where_capped(model: nn.Module):
    """Transformers chose a kernel: sdpa where the model supports it. Capped scores need another."""
    if model.config._attn_implementation == "sdpa" and soft_cap(model.config):
        model.set_attn_implementation("eager")
