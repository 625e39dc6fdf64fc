"""How evenly a mixture of experts uses them: counted while it trains, and a loss that evens it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.experts import is_experts, router_of
from coati.models.packed import PackedGroups
from coati.parallel.communication import Communicator
from coati.transfer import upload


class ExpertLoad:
    """Counts how many tokens go to each expert of each layer in the forward passes of training, padding left out.
    Activations that are computed again count again, which changes no share.

    The loss is that of Switch Transformers (2101.03961, eq. 4 to 6), the mean of all layers: for a layer with E experts

        E sum_e f_e P_e

    f_e being the share of choices that went to expert e, and P_e the router's probability of e, the mean of all tokens
    of the step on all ranks. Only P has a gradient. f is the share of all micro-batches and ranks in the step before
    (even ones before the first), so that the loss is a sum over tokens: neither micro-batches nor ranks change it.
    Routers that score by sigmoid have the scores over their sum as probabilities (DeepSeek-V3, 2412.19437, eq. 19).

    Args:
        module: a model, before it is split over ranks.
        coefficient: of the loss; 0 for none.
        copies: how many ranks go through the same tokens (tensor parallelism), and so add the same gradient.

    Attributes:
        shares: f of each layer, once a step was done with the loss; a checkpoint holds them.
        tokens: in the step, on all ranks; set before its forward passes.

    Raises:
        UserError: a coefficient for a model without experts, or without routers that tell their scores.
    """

    def __init__(self, module: Any, coefficient: float = 0.0, copies: int = 1):
        self.module, self.coefficient, self.copies = module, coefficient, copies
        self.sizes: list[int] = []
        self.shares: list[list[float]] | None = None
        self.tokens = 1.0
        self.counts: dict[int, Tensor] = {}  # of a layer: tokens by expert
        self.probabilities: dict[int, Tensor] = {}  # their sums over tokens, by expert
        self.entropies: dict[int, Tensor] = {}  # of a layer: the sum of its router's over tokens, and the tokens
        self.tells_entropy = True
        self._terms: dict[int, Tensor] = {}
        self._weights: Tensor | None = None
        modules = dict(module.named_modules())
        for name, experts in modules.items():
            if is_experts(experts):
                self._watch(experts, router_of(modules, name))
        if self.sizes:
            module.register_forward_pre_hook(self._begin, with_kwargs=True)
        elif coefficient:
            raise UserError(f"router_loss is {coefficient:g}, and this model has no experts: leave it out")

    def loss(self) -> Tensor:
        """This rank's part of the loss for the micro-batch that went through the model, times the coefficient."""
        total = torch.stack(list(self._terms.values())).sum()
        self._terms = {}
        return total * (self.coefficient / len(self.sizes) / self.copies)

    def metrics(self, ranks: Communicator) -> dict[str, float]:
        """Of the passes since the last call, on all ranks of the run; nothing for a model without experts.

        `expert_load_max`: tokens of the busiest expert of any layer over those of an even share, from 1 to the number
        of experts. `expert_load_entropy`: of a layer's shares, over that of even ones, the mean of all layers.
        `experts_idle`: which fraction got no token. `router_entropy`: of a router's probabilities for a token, over
        that of even ones, the mean of all tokens and layers; where the routers tell their scores. `router_loss`:
        without its coefficient, 1 where all is even.
        """
        if not self.sizes:
            return {}
        by_layer = self._shares(self.counts, ranks)
        entropies = [torch.special.entr(share).sum() / math.log(max(len(share), 2)) for share in by_layer]
        metrics = {
            "expert_load_max": max(float(share.max()) * len(share) for share in by_layer),
            "expert_load_entropy": float(sum(entropies)) / len(entropies),
            "experts_idle": float((torch.cat(by_layer) == 0).double().mean()),
        }
        if self.tells_entropy:
            metrics["router_entropy"] = self._mean_entropy(ranks)
        if self.coefficient:
            pairs = zip(self._used_shares(), self._shares(self.probabilities, ranks), strict=True)
            losses = [len(f) * float(torch.tensor(f, dtype=p.dtype) @ p) for f, p in pairs]
            metrics["router_loss"] = sum(losses) / len(losses)
            self.shares = [share.tolist() for share in by_layer]
        return metrics

    def _watch(self, experts: Any, router: nn.Module | None):
        layer = len(self.sizes)
        self.sizes.append(experts.num_experts)
        experts.register_forward_pre_hook(lambda part, inputs: self._count(layer, inputs[1]))
        if router is not None:
            router.register_forward_hook(lambda router, inputs, output: self._observe(layer, router, output[0]))
            return
        self.tells_entropy = False
        if self.coefficient:
            raise UserError(f"router_loss: the routers of {type(self.module).__name__} are unknown: leave it out")

    def _begin(self, module, inputs, keywords):
        if not self._trains():
            return
        mask, group = keywords.get("attention_mask"), keywords.get("shared_prefix_group", 1)
        weights = None if mask is None or module.padding_free else module.layout.split(mask)
        if group > 1:  # prompts that are read once count once for each of their rows
            weights = PackedGroups.from_rows(keywords["input_ids"], mask, group).multiplicity
        self._weights = None if weights is None else weights.flatten().float()
        self._terms = {}  # of a forward pass whose activations were computed again

    def _count(self, layer: int, chosen: Tensor):
        """Args: chosen: int `[tokens, k]`, the numbers of each token's experts."""
        if self._trains():
            weights = self._weights_of(chosen).repeat_interleave(chosen.shape[-1])
            if layer not in self.counts:
                self.counts[layer] = torch.zeros(self.sizes[layer], device=chosen.device)
            self.counts[layer].index_add_(0, chosen.flatten(), weights)

    def _observe(self, layer: int, router: Any, logits: Tensor):
        """Args: logits: `[tokens, experts]`."""
        if not self._trains():
            return
        scores = logits.float().sigmoid() if hasattr(router, "e_score_correction_bias") else logits.float().softmax(-1)
        probabilities, weights = scores / scores.sum(-1, keepdim=True), self._weights_of(logits)
        entropies = torch.special.entr(probabilities.detach()).sum(-1)
        self.entropies[layer] = self.entropies.get(layer, 0.0) + torch.stack([weights @ entropies, weights.sum()])
        if self.coefficient:
            self._add_term(layer, weights @ probabilities)

    def _add_term(self, layer: int, by_expert: Tensor):
        """Args: by_expert: `[experts]`, the router's probabilities, summed over tokens."""
        shares = upload(self._used_shares()[layer], by_expert.device, torch.float32)
        self._terms[layer] = len(shares) * (shares @ by_expert) / self.tokens
        self.probabilities[layer] = self.probabilities.get(layer, 0.0) + by_expert.detach()

    def _trains(self) -> bool:
        return self.module.training and torch.is_grad_enabled()

    def _weights_of(self, tokens: Tensor) -> Tensor:
        """float `[tokens]`: how often each counts, 0 for padding."""
        return torch.ones(len(tokens), device=tokens.device) if self._weights is None else self._weights

    def _used_shares(self) -> list[list[float]]:
        return self.shares or [[1 / size] * size for size in self.sizes]

    def _mean_entropy(self, ranks: Communicator) -> float:
        """Over that of even probabilities, of all tokens and layers on all ranks; what was added up is emptied."""
        sums = torch.stack([self.entropies.get(i, torch.zeros(2)).cpu() for i in range(len(self.sizes))])
        self.entropies.clear()
        sums = ranks.sum(sums.to(ranks.device)).double().cpu()
        by_layer = sums[:, 0] / sums[:, 1].clamp(min=1)
        highest = torch.tensor([math.log(max(size, 2)) for size in self.sizes], dtype=torch.float64)
        return float((by_layer / highest).mean())

    def _shares(self, table: dict[int, Tensor], ranks: Communicator) -> list[Tensor]:
        """Each layer's sums over all ranks, divided by the layer's total; the table is emptied."""
        sums = [table.get(i, torch.zeros(size)).cpu() for i, size in enumerate(self.sizes)]
        table.clear()
        by_layer = ranks.sum(torch.cat(sums).to(ranks.device)).double().cpu().split(self.sizes)
        return [layer / layer.sum().clamp(min=1) for layer in by_layer]
