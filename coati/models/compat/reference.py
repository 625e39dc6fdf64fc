"""A frozen copy of a model, which may share its first layers."""

import copy
import re

from torch import nn

from coati.errors import UserError

LAYER_PATTERNS = (
    "transformer.h.{layer}",  # GPT-2, BLOOM
    "model.decoder.layers.{layer}",  # OPT
    "gpt_neox.layers.{layer}",
    "model.layers.{layer}",  # Llama, Mistral, Qwen, Gemma, Phi
)


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """A copy in eval mode that nothing trains.

    Args:
        model: a transformers model, or a wrapper of one.
        num_shared_layers: the embeddings and this many first layers are one storage with `model`'s, not a second copy.
            They are frozen in `model` too, since the reference would move with them. None: everything is copied.
        pattern: how layers are named if not as in `LAYER_PATTERNS`, with `{layer}` for the number.

    Raises:
        UserError: no such layer, a pattern without `{layer}`, or weights that are sharded over processes.
    """
    if any(parameter.numel() == 0 for parameter in model.parameters()):
        raise UserError("weights are sharded over processes: load the reference model with from_pretrained instead")
    shared = [] if num_shared_layers is None else _first_layers(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)
    # deepcopy takes what the memo holds for already copied; own Parameters, so that .to() of one leaves the other alone
    memo = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in shared}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


def _first_layers(model: nn.Module, count: int, pattern: str | None) -> list[nn.Parameter]:
    """The parameters in front of layer `count`."""
    if pattern is not None and "{layer}" not in pattern:
        raise UserError(f"pattern {pattern!r} lacks {{layer}}: write it as transformer.h.{{layer}}")
    patterns = LAYER_PATTERNS if pattern is None else (pattern,)
    named = list(model.named_parameters())
    for candidate in patterns:
        layer = f".{candidate.replace('{layer}', str(count))}."
        for i, (name, _) in enumerate(named):
            if layer in f".{name}":
                return [parameter for name, parameter in named[:i] if not _comes_late(name)]
    raise UserError(
        f"no layer {count} in {type(model).__name__}, whose parameters are named like {named[len(named) // 2][0]}: "
        f"tried {', '.join(patterns)}; share fewer layers or give the pattern"
    )


def _comes_late(name: str) -> bool:
    """OPT registers these before its layers but runs them after."""
    return bool(re.search(r"(^|\.)decoder\.(final_layer_norm|project_out)\.", name))
