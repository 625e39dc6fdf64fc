"""Tensor parallelism: the weights of linear layers and embeddings split over a group of ranks (Megatron-LM,
1909.08053, section 3; vocabulary-parallel losses: its section 3, "output embedding").

Colossal-AI's own layers are not used: in 0.5.0 the fused ones gather through `.cuda()`, which a CPU lacks, and an
embedding that is replaced loses the factor that gemma multiplies it by. Here a module keeps its class and its name;
only its weight is split and its forward gets a collective call.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coati.losses.distillation import Divergence, vocabulary_divergence
from coati.losses.language import at_temperature
from coati.models.layout import Layout


@dataclass(frozen=True)
class Shard:
    """How a parameter is split: along `dim`, each of `parts` equal blocks into equal slices, one per rank.

    Attributes:
        size: of the unsharded parameter along `dim`; zeros pad what doesn't divide evenly.
    """

    dim: int
    size: int
    parts: int
    group: Any

    def local_shard(self, full: Tensor) -> Tensor:
        """This rank's slice."""
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        missing = -full.shape[self.dim] % (self.parts * ranks)
        if missing:
            filler = list(full.shape)
            filler[self.dim] = missing
            full = torch.cat([full, full.new_zeros(filler)], self.dim)
        blocks = full.chunk(self.parts, self.dim)
        return torch.cat([block.chunk(ranks, self.dim)[rank] for block in blocks], self.dim).clone()

    def gather(self, local: Tensor) -> Tensor:
        """The gathered parameter (or what is sharded like it) on every rank of the group."""
        by_rank = [piece.chunk(self.parts, self.dim) for piece in gather(local, self.group)]
        blocks = [torch.cat([chunks[i] for chunks in by_rank], self.dim) for i in range(self.parts)]
        full = torch.cat(blocks, self.dim)
        return full.narrow(self.dim, 0, self.size)


def shard_of(parameter: Tensor) -> Shard | None:
    """How a parameter is split; None if it is replicated."""
    return getattr(parameter, "dist_layout", None)


class MegatronSequence:
    """Megatron's sequence parallelism between layers; `on` is False for generation, which goes token by token."""

    def __init__(self, group):
        self.group, self.on = group, True

    def total(self, x: Tensor, group) -> Tensor:
        """The sum over ranks: this rank's stretch of it, or all."""
        return _SumAndScatter.apply(x, group) if self.on else sum_over_ranks(x, group)

    def whole(self, states: Tensor) -> Tensor:
        """The whole sequence that these states are a stretch of."""
        return _GatherSequence.apply(states, self.group) if self.on else states

    def local_stretch(self, module, inputs, output: Tensor) -> Tensor:
        """A hook: of what every rank computes for the whole sequence (position embeddings), this rank's stretch."""
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        return output.chunk(ranks, dim=-2)[rank] if self.on else output


def split_layers(layers, entry, group, sequence: MegatronSequence | None = None):
    """Splits every layer's projections over the group, in place; with `sequence` also what lies between them
    (Megatron's sequence parallelism, 2205.05198, section 4.2.2): norms and residuals hold a stretch of each sequence,
    which is gathered before a block (attention, feed-forward) and scattered with the sum after it."""
    ranks, parts = dist.get_world_size(group), dict(entry.fused)
    enter = sequence.whole if sequence else partial(copy_to_ranks, group=group)
    total = sequence.total if sequence else sum_over_ranks
    for layer in layers:
        block_of_experts = entry.block_of_experts if present(layer, (entry.experts,)) else None
        column, row = present(layer, entry.column), present(layer, entry.row)
        # replicated, but used for this rank's heads, columns or experts only
        used_in_part = [layer.get_submodule(name) for name in present(layer, entry.per_head)]
        used_in_part += [layer.get_submodule(name).lora_A for name in column if is_adapted(layer.get_submodule(name))]
        for name in column:
            split_column(layer.get_submodule(name), group, parts.get(name, 1))
        for name in row:  # what the experts' block adds up is summed over ranks once, at its end
            split_row(layer.get_submodule(name), group, _leave if _is_in(name, block_of_experts) else total)
        for name in entry.across_heads:
            split_norm(layer.get_submodule(name), group)
        for name in entry.vectors:
            owner, _, attribute = name.rpartition(".")
            _split(layer.get_submodule(owner), attribute, 0, 1, group)
        for name in entry.counts:
            owner, _, attribute = name.rpartition(".")
            module = layer.get_submodule(owner)
            setattr(module, attribute, getattr(module, attribute) // ranks)
        blocks = [name.rpartition(".")[0] or name for name in column if not _is_in(name, block_of_experts)]
        if block_of_experts is not None:
            block = layer.get_submodule(block_of_experts)
            split_experts(layer.get_submodule(entry.experts), group)
            block.register_forward_hook(partial(_total_output, total=total, group=group))
            blocks.append(block_of_experts)
            used_in_part.append(block)
        for name in dict.fromkeys(blocks):
            layer.get_submodule(name).register_forward_pre_hook(partial(_enter_block, enter=enter), with_kwargs=True)
        if not sequence:  # with it the gradients of all replicated weights are summed
            for parameter in dict.fromkeys(p for module in used_in_part for p in module.parameters()):
                if shard_of(parameter) is None:
                    sum_gradient(parameter, group)


def _enter_block(module, inputs, keywords, enter: Callable):
    """A hook that gives a module its hidden states through `enter`."""
    if inputs:
        return (enter(inputs[0]), *inputs[1:]), keywords
    return inputs, keywords | {"hidden_states": enter(keywords["hidden_states"])}


def _total_output(module, inputs, output, total: Callable, group):
    """A hook that sums hidden states over ranks; some blocks give what their router chose too."""
    if isinstance(output, tuple):
        return total(output[0], group), *output[1:]
    return total(output, group)


def _leave(x: Tensor, group) -> Tensor:
    return x


def split_experts(experts: Any, group):
    """Each rank computes its range of the experts for all tokens. A token's experts that are elsewhere get the number
    that transformers skips, one past the last, and the weight 0."""
    for name, _ in list(experts.named_parameters(recurse=False)):
        _split(experts, name, 0, 1, group)
    experts.num_experts //= dist.get_world_size(group)
    count = experts.num_experts
    first = dist.get_rank(group) * count

    def choose_local(module, inputs):
        states, chosen, weights = inputs
        elsewhere = (chosen < first) | (chosen >= first + count)
        return states, (chosen - first).masked_fill(elsewhere, count), weights.masked_fill(elsewhere, 0.0)

    experts.register_forward_pre_hook(choose_local)


def split_column(linear: Any, group, parts: int = 1):
    """Each rank computes a slice of the outputs. The input's gradient is then a sum over ranks, and so is that of a
    LoRA adapter's A, which reads all of it; each rank's B gives its slice."""
    if is_adapted(linear):
        split_column(linear.base_layer, group, parts)
        for half in linear.lora_B.values():
            _split(half, "weight", 0, parts, group)
        return
    _split(linear, "weight", _dims(linear)[0], parts, group)
    if linear.bias is not None:
        _split(linear, "bias", 0, parts, group)
    if hasattr(linear, "nf"):  # transformers' Conv1D shapes its output by this
        linear.nf = linear.weight.shape[1]


def split_row(linear: Any, group, total: Callable):
    """Each rank computes with a slice of the inputs; the outputs are summed, and the bias added once. Of a LoRA adapter
    each rank's A reads its slice: what is summed are the few numbers per token between A and B."""
    if is_adapted(linear):
        split_row(linear.base_layer, group, total)
        for half in linear.lora_A.values():
            _split(half, "weight", 1, 1, group)
            half.register_forward_hook(lambda module, inputs, output: total(output, group))
        return
    out, into = _dims(linear)
    _split(linear, "weight", into, 1, group)

    def forward(x: Tensor) -> Tensor:
        y = total(x @ (linear.weight.T if out == 0 else linear.weight), group)
        return y if linear.bias is None else y + linear.bias

    linear.forward = forward


def split_norm(norm: Any, group):
    """An RMS norm of which each rank has a slice of the columns: the mean of squares is that of all ranks' columns."""
    width = norm.weight.shape[0]
    _split(norm, "weight", 0, 1, group)

    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        local = wide.pow(2).sum(-1, keepdim=True)
        # every rank's outputs depend on every rank's columns: the sum's gradient is a sum too
        mean = copy_to_ranks(sum_over_ranks(local, group), group) / width
        return (norm.weight * (wide * torch.rsqrt(mean + norm.variance_epsilon))).to(x.dtype)

    norm.forward = forward


def split_embedding(embedding: Any, group, total: Callable):
    """Each rank holds a range of the vocabulary; the others' tokens give zeros, and the sum is right."""
    _split(embedding, "weight", 0, 1, group)
    rows, rank, lookup = embedding.weight.shape[0], dist.get_rank(group), embedding.forward
    if embedding.padding_idx is not None:
        local = embedding.padding_idx - rank * rows
        embedding.padding_idx = local if 0 <= local < rows else None

    def forward(input_ids: Tensor) -> Tensor:
        local = input_ids - rank * rows
        elsewhere = (local < 0) | (local >= rows)
        embedded = lookup(local.masked_fill(elsewhere, 0)).masked_fill(elsewhere[..., None], 0)
        return total(embedded, group)

    embedding.forward = forward


def split_head(head: Any, group, sequence: MegatronSequence | None = None):
    """Each rank gives the logits of a range of the vocabulary; all of them where `head.gathers_logits` is set.

    Columns that only pad the vocabulary get -inf.
    """
    tied = shard_of(head.weight)
    size = tied.size if tied else head.weight.shape[0]
    split_column(head, group)
    enter = sequence.whole if sequence else partial(copy_to_ranks, group=group)
    head.register_forward_pre_hook(partial(_enter_block, enter=enter), with_kwargs=True)
    columns, rank, project = head.weight.shape[0], dist.get_rank(group), head.forward

    def forward(states: Tensor) -> Tensor:
        logits = project(states)
        if size < (rank + 1) * columns:
            filler = torch.arange(rank * columns, (rank + 1) * columns, device=logits.device) >= size
            logits = logits.masked_fill(filler, -torch.inf)
        return logits

    def gather_logits(module, inputs, logits: Tensor) -> Tensor:
        return torch.cat(gather(logits, group), -1)[..., :size] if head.gathers_logits else logits

    head.forward, head.gathers_logits = forward, False
    head.register_forward_hook(gather_logits)


def sum_gradient(parameter: nn.Parameter, group):
    """For a replicated weight that each rank uses on its own heads or stretches: its gradient is the sum over ranks,
    if it trains."""
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: _summed(gradient, group))


class VocabularyLayout(Layout):
    """The layout of logits `[batch, seq, vocab / ranks]`: log-probs and entropy without gathering them."""

    def __init__(self, group):
        self.group = group

    def logits(self, head: nn.Module, states: Tensor) -> Tensor:
        return head.forward(states)  # without its hooks: they have distributed the states

    def log_probs(self, logits: Tensor, next_ids: Tensor, temperature: float) -> Tensor:
        return _LogProbs.apply(at_temperature(logits, temperature), next_ids, self.group)

    def head_log_probs(self, logits: Tensor, head_ids: Tensor, temperature: float) -> Tensor:
        return torch.stack([self.log_probs(logits, ids, temperature) for ids in head_ids.unbind(-1)], -1)

    def entropy(self, logits: Tensor, temperature: float) -> Tensor:
        logits = at_temperature(logits, temperature)
        log_probs = logits - _log_partition(logits, self.group)[..., None]
        finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # where a logit is -inf, 0 * log 0 is 0
        return -_summed(torch.linalg.vecdot(log_probs.exp(), finite), self.group)

    def log_partition(self, logits: Tensor, temperature: float) -> Tensor:
        return _LogPartition.apply(at_temperature(logits, temperature), self.group)

    def divergence(self, logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
        over_ranks = dict(log_partition=partial(_log_partition, group=self.group))
        over_ranks["total"] = partial(_summed, group=self.group)
        return vocabulary_divergence(logits, teacher_logits, divergence, **over_ranks)


class _LogProbs(torch.autograd.Function):
    """Log-prob of the chosen token where every rank holds a range of the vocabulary."""

    @staticmethod
    def forward(ctx, logits, next_ids, group):
        partition = _log_partition(logits, group)
        local = next_ids - dist.get_rank(group) * logits.shape[-1]
        here = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)[..., None]
        chosen = logits.gather(-1, local).squeeze(-1).masked_fill(~here, 0.0)
        ctx.save_for_backward(logits, partition, local, here)
        return _summed(chosen, group) - partition

    @staticmethod
    def backward(ctx, gradient):
        logits, partition, local, here = ctx.saved_tensors
        result = (logits - partition[..., None]).exp_().mul_(-gradient[..., None])
        result.scatter_add_(-1, local, (gradient * here)[..., None])
        return result, None, None


class _LogPartition(torch.autograd.Function):
    """Log of the sum of the exponentials over all ranks' ranges."""

    @staticmethod
    def forward(ctx, logits, group):
        partition = _log_partition(logits, group)
        ctx.save_for_backward(logits, partition)
        return partition

    @staticmethod
    def backward(ctx, gradient):
        logits, partition = ctx.saved_tensors
        return (logits - partition[..., None]).exp_().mul_(gradient[..., None]), None


def _log_partition(logits: Tensor, group) -> Tensor:
    local = logits.logsumexp(-1)
    top = local.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    return top + _summed((local - top).exp(), group).log()


class _Copy(torch.autograd.Function):
    """Megatron's f: the same input for all ranks; their gradients are summed."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    """Megatron's g: the sum of all ranks' outputs; each gets the full gradient."""

    @staticmethod
    def forward(ctx, x, group):
        return _summed(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def copy_to_ranks(x: Tensor, group) -> Tensor:
    """`x`, with gradients summed over ranks."""
    return _Copy.apply(x, group)


def sum_over_ranks(x: Tensor, group) -> Tensor:
    return _Sum.apply(x, group)


class _GatherSequence(torch.autograd.Function):
    """All ranks' stretches `[..., seq / ranks, width]`; the gradient's sum is scattered."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return torch.cat(gather(x, group), dim=-2)

    @staticmethod
    def backward(ctx, gradient):
        return _scattered_sum(gradient, ctx.group), None


class _SumAndScatter(torch.autograd.Function):
    """This rank's stretch of the sum of all ranks' outputs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _scattered_sum(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return torch.cat(gather(gradient, ctx.group), dim=-2), None


def _scattered_sum(x: Tensor, group) -> Tensor:
    pieces = [piece.contiguous() for piece in x.chunk(dist.get_world_size(group), dim=-2)]
    local = torch.empty_like(pieces[0])
    dist.reduce_scatter(local, pieces, group=group)
    return local


def gather(x: Tensor, group) -> list[Tensor]:
    """Every rank's tensor, in the order of ranks; no gradient."""
    x = x.detach().contiguous()
    pieces = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, x, group=group)
    return pieces


def _summed(x: Tensor, group) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _split(module: nn.Module, name: str, dim: int, parts: int, group):
    """Splits a parameter in place; one that is tied to another may have been split already.

    The name `dist_layout` is what Colossal-AI's optimizers know a split parameter by, when they add up norms.
    """
    parameter = getattr(module, name)
    if shard_of(parameter) is None:
        shard = Shard(dim, parameter.shape[dim], parts, group)
        parameter.data = shard.local_shard(parameter.data)
        parameter.dist_layout = shard


def is_adapted(module: nn.Module) -> bool:
    """Whether a layer carries an adapter of peft."""
    return hasattr(module, "base_layer")


def _dims(linear: nn.Module) -> tuple[int, int]:
    """The dimensions of a weight that its outputs and inputs lie along; transformers' Conv1D has them swapped."""
    return (0, 1) if isinstance(linear, nn.Linear) else (1, 0)


def present(layer: nn.Module, names: Iterable[str]) -> list[str]:
    """Those modules that a layer has: layers with and without experts are of different parts."""
    modules = dict(layer.named_modules())
    return [name for name in names if name in modules and name]


def _is_in(name: str, block: str | None) -> bool:
    return block is not None and name.startswith(f"{block}.")
