"""Sequence parallelism (DeepSpeed-Ulysses, 2309.14509): every rank holds a stretch of each sequence; for attention,
two all-to-all exchanges turn stretches of all heads into all of the sequence for some heads, and back.

It enters transformers through its registry of attention functions, so that no model's code is touched.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from coati.errors import UserError
from coati.losses.distillation import Divergence
from coati.models.attention import soft_cap
from coati.models.layout import Layout
from coati.parallel.decoders import remedy_for_splits

ATTENTION = "coati_ulysses"


class UlyssesLayout(Layout):
    """The layout of `[batch, seq / ranks]`."""

    def __init__(self, group):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def split(self, x: Tensor) -> Tensor:
        return self.pad(x).chunk(self.ranks, dim=1)[self.rank].contiguous()

    def pad(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % self.ranks))

    def gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.group)


class MegatronSequenceLayout(UlyssesLayout):
    """The layout where the model itself splits the sequence after the embedding, and its head, if it has one, gathers
    it again (Megatron's sequence parallelism)."""

    def __init__(self, sequence, vocabulary: Layout | None):
        super().__init__(sequence.group)
        self.sequence, self.has_head = sequence, vocabulary is not None
        self.vocabulary = vocabulary or Layout()

    def split(self, x: Tensor) -> Tensor:
        return self.pad(x)

    def gather(self, x: Tensor) -> Tensor:
        return x if self.has_head else super().gather(x)

    def logits(self, head, states: Tensor) -> Tensor:
        return self.vocabulary.logits(head, states)

    def log_probs(self, logits: Tensor, next_ids: Tensor, temperature: float) -> Tensor:
        return self.vocabulary.log_probs(logits, next_ids, temperature)

    def head_log_probs(self, logits: Tensor, head_ids: Tensor, temperature: float) -> Tensor:
        return self.vocabulary.head_log_probs(logits, head_ids, temperature)

    def entropy(self, logits: Tensor, temperature: float) -> Tensor:
        return self.vocabulary.entropy(logits, temperature)

    def log_partition(self, logits: Tensor, temperature: float) -> Tensor:
        return self.vocabulary.log_partition(logits, temperature)

    def divergence(self, logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
        return self.vocabulary.divergence(logits, teacher_logits, divergence)


class _Gather(torch.autograd.Function):
    """All ranks' columns; each gets the gradient of its own (every rank has the same full loss)."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        pieces = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, x.contiguous(), group=group)
        return torch.cat(pieces, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size(ctx.group), dim=1)[dist.get_rank(ctx.group)], None


class _Exchange(torch.autograd.Function):
    """All-to-all: splits along one dimension, concatenates along another."""

    @staticmethod
    def forward(ctx, x, split_dim, join_dim, group):
        ctx.split_dim, ctx.join_dim, ctx.group = split_dim, join_dim, group
        sent = [piece.contiguous() for piece in x.chunk(dist.get_world_size(group), split_dim)]
        received = [torch.empty_like(piece) for piece in sent]
        dist.all_to_all(received, sent, group=group)
        return torch.cat(received, join_dim)

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, ctx.join_dim, ctx.split_dim, ctx.group), None, None, None


def use_sequence_parallel_attention(transformer, group):
    """Makes a transformers model attend over the stretches of all ranks; without a group, over the whole sequence that
    it is given, whatever length the model assumes.

    Raises:
        UserError: its heads don't divide evenly, or its attention is unsupported by sdpa.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config, ranks = transformer.config.get_text_config(), 1 if group is None else dist.get_world_size(group)
    if soft_cap(config) or not transformer._supports_sdpa:
        raise UserError(f"sequences of {config.model_type} can't be split: sdpa doesn't support its attention")
    if config.num_attention_heads % ranks:
        raise UserError(
            f"the model has {config.num_attention_heads} attention heads: not divisible by sequence_parallel {ranks}; "
            + remedy_for_splits("sequence_parallel", config.num_attention_heads)
        )

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **_):
        """Queries, keys and values: `[batch, heads, seq / ranks, head_dim]`; the mask is of padding, `[batch, seq]`."""
        if key.shape[1] % ranks:  # fewer key-value heads than ranks: each is needed on several
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if group is not None:
            query, key, value = (_Exchange.apply(x, 1, 2, group) for x in (query, key, value))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        mask = causal_mask(attention_mask, query.shape[2], sliding_window, query.device)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
        )
        out = out if group is None else _Exchange.apply(out, 2, 1, group)
        return out.transpose(1, 2).contiguous(), None

    name = f"{ATTENTION}_{ranks}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, attention_mask=None, **kwargs: attention_mask)
    transformer.config._attn_implementation = name


def causal_mask(real: Tensor | None, seq: int, window: int | None, device) -> Tensor | None:
    """Who may attend to whom, bool `[batch or 1, 1, seq, seq]`; None for plain causal attention.

    Args:
        real: bool `[batch, seq]`, False on padding.
        window: how far back a token sees.
    """
    if window is None and (real is None or bool(real.all())):
        return None
    positions = torch.arange(seq, device=device)
    distance = positions[:, None] - positions[None, :]
    allowed = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    allowed = allowed[None, None]
    if real is not None:
        # padding attends to itself: a row that attends to nothing would be NaN
        allowed = allowed & (real.bool()[:, None, None, :] | (distance == 0))
    return allowed
