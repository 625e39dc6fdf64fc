"""Pipeline parallelism: each rank holds consecutive layers; micro-batches flow through them one behind another.

A stage keeps the model's own code. What it doesn't hold is replaced: earlier layers by a module that passes the hidden
states on, the embedding by one that gives what the stage before sent, and the first later layer by one that ends the
forward pass there. So any architecture, with any head around it, works without code of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.pipeline.schedule import OneForwardOneBackwardSchedule
from colossalai.pipeline.schedule._utils import model_forward
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads


class _StageEnd(Exception):
    """Carries the hidden states out of the model."""

    def __init__(self, hidden_states: Tensor):
        super().__init__()
        self.hidden_states = hidden_states


class _Pass(nn.Module):
    """Replaces another stage's layer."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class _End(nn.Module):
    def forward(self, hidden_states: Tensor, *args, **kwargs):
        raise _StageEnd(hidden_states)


class _Received(nn.Module):
    """Stands for the embedding: gives what the stage before has sent."""

    hidden_states: Tensor

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden_states


class _Zero(nn.Module):
    """Stands for position embeddings, which the first stage has added."""

    def forward(self, positions: Tensor, *args, **kwargs) -> Tensor:
        return torch.zeros((), device=positions.device)


def split_stage(model: nn.Module, part: nn.Module, entry, manager):
    """Leaves this stage's layers in `model`, whose decoder is `part`; its forward gives or takes hidden states."""
    layers = getattr(part, entry.layers)
    start, end = manager.get_stage_index(manager.distribute_layers(len(layers)))
    first, last = manager.is_first_stage(), manager.is_last_stage()
    if not last:
        _drop_after_layers(model, part, entry)
    for i, layer in enumerate(layers):
        if not start <= i < end:
            layers[i] = _like(layer, _End() if i == end else _Pass())
    received = _Received()
    if not first:
        setattr(part, entry.embedding, received)
        for name in entry.positions:
            setattr(part, name, _Zero())
        for name in entry.entrance:
            if getattr(part, name) is not None:
                setattr(part, name, nn.Identity())
    full_forward = model.forward

    def forward(hidden_states=None, **inputs):
        received.hidden_states = hidden_states
        try:
            return full_forward(**inputs)
        except _StageEnd as end:
            return {"hidden_states": end.hidden_states}

    model.forward = forward


def tied_weights(model: nn.Module, part: nn.Module, entry, manager) -> list[dict[int, Tensor]]:
    """The embedding's weight by stage, if it trains and the last stage's head uses it too (in Colossal-AI's form)."""
    embedding = getattr(part, entry.embedding)
    if not embedding.weight.requires_grad:
        return []
    others = [m for m in model.modules() if m is not embedding and getattr(m, "weight", None) is embedding.weight]
    return [{0: embedding.weight, manager.num_stages - 1: embedding.weight}] if others else []


def _drop_after_layers(model: nn.Module, part: nn.Module, entry):
    """Removes the final norm and the heads, which this stage doesn't reach."""
    part_name = next(name for name, module in model.named_modules() if module is part)
    prefix = f"{part_name}." if part_name else ""
    kept = tuple(prefix + name for name in (entry.layers, entry.embedding, *entry.positions, *entry.entrance))
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    for owner in owners:
        if not f"{owner}.".startswith(tuple(f"{name}." for name in kept)):
            model.set_submodule(owner, nn.Identity())


def _like(layer: nn.Module, substitute: nn.Module) -> nn.Module:
    """Decoders with several kinds of attention ask each layer which it has."""
    if hasattr(layer, "attention_type"):
        substitute.attention_type = layer.attention_type
    return substitute


class MicroBatches(OneForwardOneBackwardSchedule):
    """1F1B over micro-batches of any shapes; Colossal-AI's own splits one batch of equal rows."""

    def __init__(self, manager, group):
        super().__init__(manager, num_microbatches=1, enable_metadata_cache=False)
        self.group = group

    def load_batch(self, data_iter, device=None):
        """Takes `(inputs, loss of output)` pairs."""
        self.waiting = list(data_iter)
        self.num_microbatches = len(self.waiting)
        self.metrics: list[dict[str, float]] = []

    def load_micro_batch(self) -> dict[str, Any]:
        inputs, self.loss_of = self.waiting.pop(0)
        return inputs

    def criterion(self, output, inputs) -> Tensor:
        """The partial loss of the micro-batch that was loaded last; undoes the schedule's mean."""
        loss, metrics = self.loss_of(output)
        self.metrics.append({name: float(value) for name, value in metrics.items()})
        return loss * self.num_microbatches

    def forward_all(self, model: Callable, inputs: Sequence[dict[str, Any]]) -> list:
        """Outputs of all micro-batches, on every stage. No gradient."""
        outputs = []
        with torch.no_grad():
            for one in inputs:
                output = model_forward(model, one, self.recv_forward())
                if self.stage_manager.is_last_stage():
                    outputs.append(output)
                else:
                    self.send_forward(output)
        return self.tensors_from_last_stage(outputs)

    def from_last_stage(self, value):
        """The last stage's object without tensors, on every stage."""
        box = [value]
        dist.broadcast_object_list(box, src=self._last_rank, group=self.group)
        return box[0]

    def tensors_from_last_stage(self, value):
        """The last stage's lists and tuples of tensors, on every stage and its own device."""
        tensors, structure = tree_flatten(value)
        shapes, structure = self.from_last_stage(([(x.shape, x.dtype) for x in tensors], treespec_dumps(structure)))
        device = get_accelerator().get_current_device()
        received = []
        for i, (shape, dtype) in enumerate(shapes):
            at_last = self.stage_manager.is_last_stage()
            tensor = tensors[i].contiguous() if at_last else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensor, src=self._last_rank, group=self.group)
            received.append(tensor)
        return tree_unflatten(received, treespec_loads(structure))

    @property
    def _last_rank(self) -> int:
        return dist.get_global_rank(self.group, self.stage_manager.num_stages - 1)
