"""How evenly a mixture of experts uses them, counted while it trains."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from coati.parallel.communication import Communicator


class ExpertLoad:
    """Counts how many tokens go to each expert of each layer in the forward passes of training, padding left out.
    Activations that are computed again count again, which changes no share.

    Args:
        module: a model, before it is split over ranks.
    """

    def __init__(self, module: Any):
        self.module = module
        self.sizes: list[int] = []
        self.counts: dict[int, Tensor] = {}
        self._real: Tensor | None = None
        for experts in filter(is_experts, module.modules()):
            layer = len(self.sizes)
            self.sizes.append(experts.num_experts)
            experts.register_forward_pre_hook(lambda part, inputs, layer=layer: self._count(layer, inputs[1]))
        if self.sizes:
            module.register_forward_pre_hook(self._note_mask, with_kwargs=True)

    def metrics(self, ranks: Communicator) -> dict[str, float]:
        """Of the passes since the last call, on all ranks of the run; nothing for a model without experts.

        `expert_load_max`: tokens of the busiest expert of any layer over those of an even share, from 1 to the number
        of experts. `expert_load_entropy`: of a layer's shares, over that of even ones, the mean of all layers.
        `experts_idle`: which fraction got no token.
        """
        if not self.sizes:
            return {}
        counts = [self.counts.get(i, torch.zeros(size)).cpu() for i, size in enumerate(self.sizes)]
        self.counts.clear()
        by_layer = ranks.sum(torch.cat(counts).to(ranks.device)).double().cpu().split(self.sizes)
        shares = [layer / layer.sum().clamp(min=1) for layer in by_layer]
        entropies = [torch.special.entr(share).sum() / math.log(max(len(share), 2)) for share in shares]
        return {
            "expert_load_max": max(float(share.max()) * len(share) for share in shares),
            "expert_load_entropy": float(sum(entropies)) / len(entropies),
            "experts_idle": float((torch.cat(by_layer) == 0).double().mean()),
        }

    def _note_mask(self, module, inputs, keywords):
        mask = keywords.get("attention_mask")
        self._real = None if mask is None else module.layout.split(mask)

    def _count(self, layer: int, chosen: Tensor):
        """Args: chosen: int `[tokens, k]`, the numbers of each token's experts."""
        if not (self.module.training and torch.is_grad_enabled()):
            return
        if layer not in self.counts:
            self.counts[layer] = torch.zeros(self.sizes[layer], device=chosen.device)
        # of tokens that are not where the mask has them (prompts that are read once), all count
        real = self._real
        if real is None or real.numel() != len(chosen):
            real = torch.ones(len(chosen), device=chosen.device)
        self.counts[layer].index_add_(0, chosen.flatten(), real.flatten().float().repeat_interleave(chosen.shape[-1]))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a layer's experts in stacked weights, as transformers has them."""
    return hasattr(module, "num_experts") and any(p.ndim == 3 for p in module.parameters(recurse=False))
