"""What `coati.parallel.Engine` keeps on one rank for one model, in tensors without data."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from coati.config.plugin import PluginConfig
from coati.parallel.engine import DTYPES
from coati.planner.live import LiveMemory

ZERO_BUCKET = 12 * 2**20  # gradients that ZeRO reduces at a time (Colossal-AI's default)
GEMINI_CHUNK = 32 * 2**20  # Gemini's smallest chunk; a model of fewer parameters isn't sharded


class Replica:
    """A model under a plugin, as one of `ranks` data-parallel ranks sees it.

    Args:
        trained: with gradients and optimiser states.
        accumulates: the gradients of earlier micro-batches are there when the next one starts.
        on_gpu: else Adam works tensor by tensor, and what is offloaded stays in the same memory.
    """

    def __init__(
        self,
        live: LiveMemory,
        name: str,
        module: nn.Module,
        config: PluginConfig,
        ranks: int,
        *,
        trained: bool,
        accumulates: bool,
        on_gpu: bool,
    ):
        self.live, self.name, self.module, self.config, self.ranks = live, name, module, config, ranks
        self.accumulates, self.on_gpu = accumulates, on_gpu
        if not trained:
            module.requires_grad_(False)
        module.train(trained)
        for part in module.modules():
            if hasattr(part, "layerdrop"):  # it would look into a tensor to skip a layer
                part.training = False
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.numel = sum(p.numel() for p in self.trained)
        self.wide = max([p.numel() for p in self.trained], default=0)
        self.states, self.bucket, self.gradients = [], [], []
        self.precision = config.precision
        self._hold_parameters()
        if trained:
            self._hold_states()
            for p in self.trained:
                p.register_post_accumulate_grad_hook(self._take_gradient)
            if accumulates and config.plugin == "gemini":  # its chunks of accumulated gradients are never freed
                self._hold_gradients()

    @property
    def vocabulary(self) -> int:
        """Width of the logits on this rank."""
        head = self.module.transformer.get_output_embeddings()
        return 0 if head is None else head.weight.shape[0]

    @property
    def sharded_weights(self) -> bool:
        """Gemini leaves small models and frozen weights whole."""
        return self.config.plugin == "gemini" and self.numel >= GEMINI_CHUNK

    @contextmanager
    def computing(self, *, whole: bool = False) -> Iterator[None]:
        """Around a forward and backward pass. With `whole`, all weights are gathered (`Engine.full`)."""
        plain = self.config.plugin == "ddp" and self.config.model_parallel_size == 1
        autocast = plain and self.precision != "fp32"
        gathered = None
        if self.sharded_weights:
            working = max(2 * GEMINI_CHUNK, 2 * self.wide)  # the chunk in use, and one on its way
            numel = self.numel * self._left_out() if whole else working
            gathered = self.live.make(2 * numel, (self.name, "communication"))
        context = torch.autocast("cpu", dtype=DTYPES[self.precision]) if autocast else nullcontext()
        with context, self.live.of(self.name, self.vocabulary):
            yield
        del gathered

    def step(self):
        """The optimiser's step: peaks by what it makes on the way, then the gradients go."""
        item = (self.name, "optimiser states")
        c, largest = self.config, 8 * self.wide
        if c.plugin == "ddp":
            whole = self.on_gpu or self._has_masters  # torch's AdamW takes all weights at once on a GPU
            scratch = self.live.make(4 * self.numel if whole else largest, item)
        elif c.plugin == "gemini":
            scratch = self.live.make(largest / self.ranks, item)
        else:  # ZeRO hands Adam its gradients in float32
            copies = 4 * self.numel / self.ranks if self.precision != "fp32" else 0
            scratch = self.live.make(copies + largest / self.ranks, item)
        del scratch
        for p in self.trained:
            p.grad = None
        if c.plugin != "gemini":
            self.gradients.clear()

    def begin_micro_batch(self):
        """The last micro-batch of a step finds the gradients of the others."""
        if self.accumulates and not self.gradients:
            self._hold_gradients()

    @property
    def _has_masters(self) -> bool:
        """ddp keeps float32 weights; with a model split over ranks, low-precision weights and float32 masters."""
        return self.config.model_parallel_size > 1 and self.precision != "fp32"

    def _left_out(self) -> float:
        """The share of the trained weights that this rank does not keep."""
        return self.config.shard_fraction * (1 - 1 / self.ranks) if self.sharded_weights else 0.0

    def _hold_parameters(self):
        share = 1 - self._left_out()
        for p in self.module.parameters():
            elsewhere = getattr(p, "elsewhere", False)  # on another pipeline stage
            kept = 0.0 if elsewhere else share if p.requires_grad else 1.0
            self.live.hold([p], (self.name, "parameters"), kept)
        self.live.hold(self.module.buffers(), (self.name, "parameters"))

    def _hold_states(self):
        c, make = self.config, self.live.make
        item = (self.name, "optimiser states")
        if c.plugin == "ddp":
            self.states.append(make((12 if self._has_masters else 8) * self.numel, item))
            if c.pipeline_parallel == 1:  # DDP's buckets, beside the gradients
                self.states.append(make(self.numel * self.trained[0].itemsize, (self.name, "communication")))
            return
        share = 1 - self._left_out() if c.plugin == "gemini" else 1 / self.ranks
        if self.on_gpu and c.plugin == "zero2-offload":
            share = 0.0
        if self.on_gpu and c.plugin == "gemini":
            share *= 1 - c.offload_optimizer_fraction
        self.states.append(make(12 * self.numel * share, item))  # float32 master weights and two moments

    def _hold_gradients(self):
        """Gradients of earlier micro-batches, as the plugin keeps them."""
        item, size = (self.name, "gradients"), DTYPES[self.precision].itemsize
        match self.config.plugin:
            case "ddp":
                for p in self.trained:
                    p.grad = torch.empty_like(p)
                self.live.hold([p.grad for p in self.trained], item)
            case "zero1":
                self.gradients.append(self.live.make(size * self.numel, item))
            case "gemini":
                self.gradients.append(self.live.make(size * self.numel * (1 - self._left_out()), item))
            case _:
                self.gradients.append(self.live.make(size * self.numel / self.ranks, item))

    def _take_gradient(self, p: nn.Parameter):
        """Called when the backward pass has finished the gradient of a parameter."""
        if self.config.plugin == "ddp":
            self.live.hold([p.grad], (self.name, "gradients"))
            return
        gradient, p.grad = p.grad, None
        if self.config.plugin == "gemini":  # copied into a chunk that is already counted
            if self.accumulates and not self.sharded_weights and p is self.trained[-1]:
                self.live.make(2 * self.numel, (self.name, "communication"))  # a copy of the one chunk, for a moment
            return
        if sum(g.numel() for g in self.bucket) + gradient.numel() > ZERO_BUCKET:
            self._reduce()
        self.bucket.append(gradient)
        self.live.hold([gradient], (self.name, "gradients"))

    def _reduce(self):
        """ZeRO's bucket: the gradients, their flat copy, and what comes back from the other ranks."""
        nbytes = sum(g.numel() * g.itemsize for g in self.bucket)
        if not nbytes:
            return
        flat = kept = self.live.make(nbytes, (self.name, "communication"))
        if self.config.plugin != "zero1":
            kept = self.live.make(nbytes / self.ranks, (self.name, "communication"))
        del flat
        self.bucket.clear()
        if not self.accumulates:
            self.live.hold([kept], (self.name, "gradients"))
            self.gradients.append(kept)

    def end_backward(self):
        """What is left in ZeRO's bucket goes too."""
        self._reduce()
