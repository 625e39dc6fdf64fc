"""Tensor, pipeline and sequence parallelism: the part of a model that one rank has."""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coati.models.base import BaseModel
from coati.parallel.decoders import check_splits, find_decoder
from coati.parallel.tensor import is_adapted, present


@dataclass(frozen=True)
class Sizes:
    """How many ways each kind of parallelism splits the run."""

    data: int
    tensor: int
    pipeline: int
    sequence: int


def sizes(config, gpus: int) -> Sizes:
    """Data-parallel ranks are what the other kinds leave."""
    split = config.tensor_parallel, config.pipeline_parallel, config.sequence_parallel
    return Sizes(gpus // config.model_parallel_size, *split)


@dataclass(frozen=True)
class Part:
    """Which part of a model a rank has.

    Attributes:
        stage: of the pipeline, counted from 0.
    """

    sizes: Sizes
    stage: int = 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.sizes.pipeline - 1

    @property
    def gives_outputs(self) -> bool:
        """Whether the rank's part of the forward pass gives the outputs of all tokens."""
        return self.is_last and self.sizes.sequence == 1

    @property
    def in_flight(self) -> int:
        """Micro-batches whose activations a stage of the 1F1B schedule holds at once, if a step has so many."""
        return self.sizes.pipeline - self.stage

    def copy_with_all_layers(self, model: BaseModel) -> BaseModel | None:
        """What generates under pipeline parallelism; None if the model itself does."""
        if self.sizes.pipeline == 1:
            return None
        full_model = copy.deepcopy(model)
        if self.sizes.tensor > 1:
            split_tensors(full_model, self.sizes.tensor)
        return full_model

    def reduce_to_part(self, model: BaseModel):
        """Reduces the model to this part."""
        tensor, stages = self.sizes.tensor, self.sizes.pipeline
        if tensor > 1 or stages > 1:
            check_splits(model, tensor, stages)
        if tensor > 1:
            split_tensors(model, tensor)
        if stages > 1:
            decoder, entry = find_decoder(model)
            layers = getattr(decoder, entry.layers)
            del layers[-(-len(layers) // stages) :]
            leave_out_other_stages(model, self.stage == 0, self.is_last)

    def forward(self, model: BaseModel, inputs: dict[str, Any]):
        """What the rank computes: of a split sequence, its tokens; on all stages but the last, hidden states."""
        length = -(-inputs["input_ids"].shape[1] // self.sizes.sequence)
        states = inputs.get("teacher_states")
        inputs = {name: x[:, :length] if isinstance(x, Tensor) else x for name, x in inputs.items()}
        if states is not None:  # a row for each target
            inputs["teacher_states"] = states[: len(model.target_indices(inputs["targets"])[0])]
        if self.is_last:
            return model(**inputs)
        mask = inputs["attention_mask"].long()
        return model.transformer.base_model(inputs["input_ids"], attention_mask=mask, use_cache=False)[0]


def split_tensors(model: BaseModel, parts: int):
    """Shrinks the weights as tensor parallelism does; the model then computes nonsense of the right shapes."""
    decoder, entry = find_decoder(model)
    for layer in getattr(decoder, entry.layers):
        for name in present(layer, entry.column):
            _shrink_adapted(layer.get_submodule(name), True, parts)
        for name in present(layer, entry.row):
            _shrink_adapted(layer.get_submodule(name), False, parts)
        for name in present(layer, (entry.experts,)):
            experts: Any = layer.get_submodule(name)
            experts.num_experts //= parts
            for weight, parameter in list(experts.named_parameters(recurse=False)):
                setattr(experts, weight, _first(parameter, 0, experts.num_experts))
        for name in (*entry.vectors, *(f"{norm}.weight" for norm in entry.across_heads)):
            owner, _, attribute = name.rpartition(".")
            vector = layer.get_submodule(owner)._parameters[attribute]
            setattr(layer.get_submodule(owner), attribute, _first(vector, 0, len(vector) // parts))
        for name in entry.counts:
            owner, _, count = name.rpartition(".")
            module = layer.get_submodule(owner)
            setattr(module, count, getattr(module, count) // parts)
    embedding, head = getattr(decoder, entry.embedding), model.transformer.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    _shrink(embedding, True, parts)
    if head is not None:
        _shrink(head, True, parts)
    if tied:
        head.weight = embedding.weight


def leave_out_other_stages(model: BaseModel, first: bool, last: bool):
    """Marks the ends of the model that other pipeline stages have; tied ends are on both."""
    embedding, head = model.transformer.get_input_embeddings(), model.transformer.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return
    for module, on_this_stage in ((embedding, first), (head, last)):
        if module is not None and not on_this_stage:
            module.requires_grad_(False)
            module.weight.on_other_stage = True


def _shrink_adapted(module: Any, outputs: bool, parts: int):
    """`_shrink`, with an adapter the layer and what gives the same outputs, or reads the same inputs."""
    if not is_adapted(module):
        _shrink(module, outputs, parts)
        return
    _shrink(module.base_layer, outputs, parts)
    for half in (module.lora_B if outputs else module.lora_A).values():
        _shrink(half, outputs, parts)


def _shrink(module: nn.Module, outputs: bool, parts: int):
    """Leaves one rank's part of a linear layer's outputs, or of its inputs."""
    swapped = not isinstance(module, nn.Linear | nn.Embedding)  # transformers' Conv1D
    dim = 0 if outputs != swapped else 1
    size = -(-module.weight.shape[dim] // parts)
    module.weight = _first(module.weight, dim, size)
    if outputs and getattr(module, "bias", None) is not None:
        module.bias = _first(module.bias, 0, size)
    if swapped:
        module.nf = module.weight.shape[1]


def _first(parameter: nn.Parameter, dim: int, size: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().narrow(dim, 0, size).clone(), parameter.requires_grad)
