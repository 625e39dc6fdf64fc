"""Less memory for long rows: feed-forward blocks a stretch at a time, and activations that wait on the host."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from coati.errors import UserError
from coati.models.experts import is_experts

Pack, Unpack = Callable[[Tensor], Any], Callable[[Any], Tensor]


def split_feed_forward(transformer: nn.Module, tokens: int):
    """Has each layer's feed-forward block (`mlp`) compute so many tokens of its rows at a time, and again in the
    backward pass, so that its widest activations are of these tokens only. Blocks of experts stay as they are: they
    choose among tokens.

    Raises:
        UserError: the model has no such blocks.
    """
    blocks = [module for name, module in transformer.named_modules() if name.rpartition(".")[2] == "mlp"]
    blocks = [block for block in blocks if not any(is_experts(part) for part in block.modules())]
    if not blocks:
        raise UserError(f"feed_forward_tokens: {type(transformer).__name__} has no blocks named mlp: leave it out")
    for block in blocks:
        block.forward = partial(_in_stretches, block.forward, tokens)


def _in_stretches(compute: Callable[..., Tensor], tokens: int, *inputs: Tensor) -> Tensor:
    """Args: inputs: `[..., seq, width]`, as what `compute` gives for them."""
    if inputs[0].shape[-2] <= tokens:
        return compute(*inputs)
    stretches = zip(*([part.contiguous() for part in x.split(tokens, -2)] for x in inputs), strict=True)
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False)
    return torch.cat([compute(*stretch) for stretch in stretches], -2)


def checkpointing_keeping_by(pack: Pack, unpack: Unpack) -> Callable[..., Any]:
    """What a layer is called through: its activations are computed again in the backward pass, and its input, which
    that needs, is what `pack` has kept of it."""

    def call(layer: Callable[..., Any], *inputs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return checkpoint(layer, *inputs, use_reentrant=False)

    return call


def to_host(x: Tensor) -> tuple[torch.device, Tensor]:
    """A copy in pinned memory of the host. The device goes on at once: work on one stream keeps its order."""
    waiting = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return x.device, waiting.copy_(x, non_blocking=True)


def from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, waiting = packed
    return waiting.to(device, non_blocking=True)
