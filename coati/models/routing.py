"""Which experts a mixture's tokens go to: noted while it samples, and replayed while it trains (R3, 2510.11370).

Rounding lets a router choose other experts in training than in sampling, and then log-probs differ by much more than by
rounding. With the experts of sampling they don't.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coati.models.experts import is_router


def routers_of(model: nn.Module) -> list[nn.Module]:
    """Its routers, layer after layer."""
    return [module for module in model.modules() if is_router(module)]


class RoutingNotes:
    """The experts that tokens go to in the forward passes of a model, while these are noted."""

    def __init__(self, model: nn.Module):
        self.routers = routers_of(model)
        self._by_layer: list[Tensor] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within it."""
        hooks = [router.register_forward_hook(self._note) for router in self.routers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._by_layer = []

    def take(self) -> Tensor:
        """The experts of the last pass, int16 `[tokens, layers, k]`."""
        chosen = torch.stack(self._by_layer, 1).short()
        self._by_layer = []
        return chosen

    def _note(self, router: nn.Module, inputs: Any, output: Any):
        self._by_layer.append(output[2])


class RoutingReplay:
    """Sends the tokens of a model's forward passes to given experts.

    What a router makes of them is its own: they are weighed by its scores of now, and it gets a gradient.

    Attributes:
        given: the experts of the next pass, long `[tokens, layers, k]`, -1 where a router chooses; None if it chooses
            everywhere.
    """

    def __init__(self, model: nn.Module):
        self.given: Tensor | None = None
        self._of_pass: Tensor | None = None
        model.register_forward_pre_hook(self._begin)
        for layer, router in enumerate(routers_of(model)):
            router.register_forward_hook(partial(self._replay, layer))

    def _begin(self, model: nn.Module, inputs: Any):
        """They stay until the next pass, as activations may be computed again in the backward pass."""
        self._of_pass, self.given = self.given, None

    def _replay(self, layer: int, router: nn.Module, inputs: Any, output: Any):
        if self._of_pass is None:
            return None
        with _GivenChoice(output[0].shape[-1], self._of_pass[:, layer]):
            return router.forward(*inputs)


class _GivenChoice(TorchFunctionMode):
    """Within it the largest entries of `[tokens, experts]` are taken to be others: the last step of every router that
    transformers has."""

    def __init__(self, experts: int, given: Tensor):
        super().__init__()
        self.experts, self.given = experts, given

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function not in (torch.topk, Tensor.topk) or args[0].shape[1:] != (self.experts,):
            return found
        index = torch.where(self.given < 0, found.indices, self.given)
        return torch.return_types.topk((args[0].gather(1, index), index))
