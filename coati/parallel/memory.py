"""What an engine keeps of one model on one rank, for `coati plan`: no weights, only blocks that are counted.

Each engine has its own beside it (`DDPMemory`, `ZeroMemory`, `GeminiMemory`). A model that is split by tensor,
pipeline or sequence parallelism has that of the plugin around it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coati.config.plugin import PluginConfig
from coati.parallel.engine import DTYPES


class Blocks(Protocol):
    """Where memory is counted. An item is a model's name and a kind of memory, such as `("actor", "gradients")`."""

    def hold(self, tensors, item: tuple[str, str], fraction: float = 1.0):
        """Records what tensors are for, and which fraction of them this rank has."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is recorded what a tensor is for."""

    def make(self, nbytes: float, item: tuple[str, str]) -> Any:
        """A block of this size, which is there until it is dropped."""


class EngineMemory:
    """A model under a plugin, as one of `ranks` data-parallel ranks has it.

    Args:
        module: its part that this rank has; its tensors have shapes and no data. A parameter with the attribute
            `on_other_stage` is another pipeline stage's.
        trained: with gradients and optimizer states.
        accumulates: whether the gradients of earlier micro-batches may be there when the next one starts.
        on_gpu: else what is offloaded stays in the same memory.

    Attributes:
        trained: the parameters that train; numel: how many numbers they are; widest: of the largest one.
        kept: blocks that stay from step to step; gradients: those that stay until a step is done.
    """

    def __init__(
        self,
        blocks: Blocks,
        name: str,
        module: nn.Module,
        config: PluginConfig,
        precision: str,
        ranks: int,
        *,
        trained: bool,
        accumulates: bool,
        on_gpu: bool,
    ):
        self.blocks, self.name, self.module, self.config, self.ranks = blocks, name, module, config, ranks
        self.precision, self.dtype = precision, DTYPES[precision]
        self.accumulates, self.on_gpu = accumulates, on_gpu
        self.trained = [p for p in module.parameters() if p.requires_grad] if trained else []
        self.numel = sum(p.numel() for p in self.trained)
        self.widest = max([p.numel() for p in self.trained], default=0)
        self.kept: list[Any] = []
        self.gradients: list[Any] = []
        for p in module.parameters():
            if blocks.holds(p):  # with a model before this one, see `SharedWeights`
                continue
            on_other_stage = getattr(p, "on_other_stage", False)
            blocks.hold([p], self.item("parameters"), 0.0 if on_other_stage else self.local_fraction(p))
        blocks.hold(module.buffers(), self.item("parameters"))
        self.hold_states()
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self.gradient_ready)

    def item(self, kind: str) -> tuple[str, str]:
        return self.name, kind

    # --- what each engine defines for its plugin

    @classmethod
    def cast(cls, module: nn.Module, dtype: torch.dtype, *, trained: bool):
        """Gives a model's weights the dtype that they are held in, where that isn't the one that they are loaded in."""
        if not trained:
            cast_tensors([*module.parameters(), *module.buffers()], dtype)

    def local_fraction(self, parameter: nn.Parameter) -> float:
        """Which fraction of a weight this rank keeps."""
        return 1.0

    def hold_states(self):
        """What stays beside the weights: optimizer states, master weights, buffers."""
        raise NotImplementedError

    def gradient_ready(self, parameter: nn.Parameter):
        """Called when the backward pass has finished the gradient of a parameter."""
        raise NotImplementedError

    def begin_micro_batch(self, *, is_last: bool):
        """Before a forward pass; the step comes after the last one of them."""

    def end_backward(self):
        """After a micro-batch's backward pass."""

    def gathered(self, *, full: bool) -> float:
        """Bytes of weights that are gathered while the model computes, or (`full`) generates."""
        return 0.0

    def step_bytes(self) -> float:
        """What the optimizer makes on the way."""
        return 0.0

    # --- a step

    @contextmanager
    def computing(self, *, full: bool = False) -> Iterator[None]:
        """Counts gathered weights while the model computes."""
        block = self.blocks.make(self.gathered(full=full), self.item("communication"))
        yield
        del block

    def step(self):
        """The optimizer's step, after which gradients go."""
        self.blocks.make(self.step_bytes(), self.item("optimizer states"))  # and dropped again
        for p in self.trained:
            p.grad = None
        self.gradients.clear()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def cast_tensors(tensors: Iterable[Tensor], dtype: torch.dtype):
    """Casts those of floating point where they are: `module.to(dtype)` refuses tensors without data that another model
    has too."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
