"""An engine whose model has no weights: it allocates what a real engine would, and returns zeros."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from coati.models.base import BaseModel
from coati.parallel import Engine, Runtime
from coati.parallel.engine import DTYPES
from coati.parallel.expert_load import ExpertLoad
from coati.parallel.factory import describing_class, memory_class
from coati.planner.live import LiveMemory
from coati.planner.parallel import Part


class PlannedEngine(Engine):
    """A model under a plugin, as one rank has it.

    The same work is run twice at most (memory may differ the second time); its results are known.

    Args:
        module: the model, on the meta device.
        name: in the plan.
        part: which part of a split model is this rank's.
        generates: whether `full()` will be used.
    """

    def __init__(
        self,
        live: LiveMemory,
        name: str,
        module: BaseModel,
        config,
        runtime: Runtime,
        part: Part,
        *,
        trained: bool,
        accumulates: bool = False,
        generates: bool = False,
        on_gpu: bool = True,
    ):
        self.live, self.name, self.module, self.model, self.part = live, name, module, module, part
        self.config, self.runtime, self.precision = config, runtime, config.precision
        self.kind = describing_class(config)
        self.data_ranks = runtime.data_ranks(config.model_parallel_size)
        self.skipped_steps = self.skipped_in_a_row = 0
        self.expert_load = ExpertLoad(nn.Identity())  # where tokens go is not known
        self.generating = part.copy_with_all_layers(module) if generates else None
        if not trained:
            module.requires_grad_(False)
        module.train(trained)
        part.reduce_to_part(module)
        self.memory = self._make_memory(module, trained=trained, accumulates=accumulates, on_gpu=on_gpu)
        if self.generating is not None:
            self.generating.requires_grad_(False).eval()
            self._make_memory(self.generating, trained=False, accumulates=False, on_gpu=on_gpu)
        self.done: Counter[tuple] = Counter()
        self.shapes: dict[tuple, Any] = {}
        head = module.transformer.get_output_embeddings()
        self.vocabulary = 0 if head is None else head.weight.shape[0]  # width of the logits on this rank

    def _make_memory(self, module: BaseModel, **how):
        memory, ranks = memory_class(self.config), self.data_ranks.world_size * self.config.sequence_parallel
        memory.cast(module, DTYPES[self.precision], trained=how["trained"])
        give_shapes(module, self.live.fake)
        return memory(self.live, self.name, module, self.config, self.precision, ranks, **how)

    # --- what a trainer calls

    def autocast(self):
        return self.kind.autocast(self)

    @contextmanager
    def full(self):
        """The module with unsharded weights."""
        with self.memory.computing(full=True), self.live.attributed_to(self.name, self.vocabulary), self.autocast():
            yield self.module if self.generating is None else self.generating

    def average_in(self, source, rate):
        """Works weight by weight, in place."""

    def __call__(self, **inputs):
        return self.forward_all([inputs])[0]

    @torch.no_grad()
    def forward_all(self, inputs):
        self.live.begin_phase("evaluate" if self.memory.trained or self.name == "reference" else "score")
        for one in inputs:
            key = ("forward", *key_of(one))
            if self.done[key] < 2:
                self.done[key] += 1
                self.compute(one)
        return [self.zeros(one) for one in inputs]

    def accumulate(self, tasks):
        """Runs the first micro-batch of each shape, and the last one, which finds the gradients of others in memory."""
        keys = [key_of(task.inputs) for task in tasks]
        chosen = {keys.index(key) for key in keys} | {len(keys) - 1}
        if self.part.in_flight > 1:
            chosen = {len(keys) - 1}
        of_step = ("update", *sorted({str(key) for key in keys}))
        self.done[of_step] += 1
        if self.done[of_step] > 1:
            chosen = set()
        metrics = []
        for i, task in enumerate(tasks):
            if i in chosen:
                in_flight = min(self.part.in_flight, len(tasks))
                self.forward_backward(task.inputs, is_last=i == max(chosen), in_flight=in_flight)
            metrics.append(task.loss(self.zeros(task.inputs))[1])
        return metrics

    def step(self, learning_rate, finite=True):
        self.live.begin_phase("learn: step")
        self.memory.step()
        return 0.0

    # --- how it allocates memory

    def compute(self, inputs: dict[str, Any]):
        """This rank's part of the forward pass; the output has shapes and no data."""
        with self.memory.computing(), self.live.attributed_to(self.name, self.vocabulary), self.autocast():
            output = self.part.forward(self.module, inputs)
        if self.part.gives_outputs:
            self.shapes[key_of(inputs)] = tree_map(spec_of, output)
        return output

    def forward_backward(self, inputs: dict[str, Any], *, is_last: bool, in_flight: int):
        """One micro-batch. The backward pass has two phases, since one grows with the activations of all layers and
        the other with their gradients.

        Args:
            in_flight: micro-batches that have gone forward when the first one goes back.
        """
        trained, finished = self.memory.trained, []

        def count(_):
            finished.append(1)
            if len(finished) == len(trained) // 2:
                self.live.begin_phase("learn: late backward")

        hooks = [p.register_post_accumulate_grad_hook(count) for p in trained]
        self.live.begin_phase("learn: early backward")
        self.memory.begin_micro_batch(is_last=is_last)
        outputs = [tree_leaves(self.compute(inputs)) for _ in range(in_flight)]
        differentiable = [x for x in outputs.pop() if x.requires_grad]
        with self.live.attributed_to(self.name, self.vocabulary):
            torch.autograd.backward(differentiable, [torch.zeros_like(x) for x in differentiable])
        self.memory.end_backward()
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def zeros(self, inputs: dict[str, Any]):
        """What the model gives, as zeros."""
        key = key_of(inputs)
        if key not in self.shapes:
            with self.live.uncounted(), self.autocast():
                self.shapes[key] = tree_map(spec_of, self.module(**inputs))
        return tree_map(lambda known: torch.zeros(known.shape, dtype=known.dtype), self.shapes[key])


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tensor.shape, tensor.dtype)


def key_of(inputs: dict[str, Any]) -> tuple:
    """The same for inputs of the same shapes."""
    leaves, structure = tree_flatten(inputs)
    return str(structure), *[x.shape if isinstance(x, Tensor) else x for x in leaves]


def give_shapes(module: nn.Module, fake):
    """Turns weights on the meta device into fake CPU tensors; tied ones stay tied. Those that are shared with a model
    before it may be fake already, or become so together."""
    with fake:
        for part in module.modules():
            for name, p in part.named_parameters(recurse=False):
                if p.device.type != "meta":
                    continue
                if not hasattr(p, "fake_twin"):
                    p.fake_twin = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
                    p.fake_twin.on_other_stage = getattr(p, "on_other_stage", False)
                setattr(part, name, p.fake_twin)
            for name, b in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty(b.shape, dtype=b.dtype))
