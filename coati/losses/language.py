"""Log-probs of tokens and the language-modeling loss."""

from typing import Literal

import torch
from torch import Tensor

from coati.losses.masking import masked

CrossEntropy = Literal["nll", "dft"]


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the distribution that sampling at this temperature draws from: float32, or float64 if they were."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def next_log_probs(logits: Tensor, next_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of a given token at every position.

    Args:
        logits: `[batch, seq, vocab]`, any float dtype.
        next_ids: `[batch, seq]` int64, the token whose log-prob is wanted at position `t`.
        temperature: logits are divided by it: the distribution that sampling at this temperature draws from.

    Returns:
        `[batch, seq]`, float32 (float64 for float64 logits).
    """
    return _SelectedLogProbs.apply(at_temperature(logits, temperature), next_ids)


class _SelectedLogProbs(torch.autograd.Function):
    """log softmax at one entry of each row. Its backward pass makes one tensor of the logits' size where autograd's own
    makes four: with a large vocabulary that is most of a step's memory."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:
        partition = logits.logsumexp(-1)
        ctx.save_for_backward(logits, ids, partition)
        return logits.gather(-1, ids[..., None]).squeeze(-1) - partition

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        logits, ids, partition = ctx.saved_tensors
        return _gradient_in_place(logits - partition[..., None], ids[..., None], grad, grad), None


def _gradient_in_place(log_probs: Tensor, places: Tensor, grad: Tensor, own_grad: Tensor) -> Tensor:
    """The gradient of logits, or of some of each row, from that of the ids' log-probs; overwrites all log-probs.

    Args:
        log_probs: `[..., vocab]`; places: the ids' columns, `[..., 1]`.
        grad: `[...]`; own_grad: the same, but 0 where the id is not among these logits.
    """
    return log_probs.exp_().mul_(-grad[..., None]).scatter_add_(-1, places, own_grad[..., None])


class ProjectedLogProbs(torch.autograd.Function):
    """Log-probs of tokens from the states that predict them, and entropies if asked for, without a gradient. Logits
    exist for a tile of tokens and vocabulary at a time, and unless all are kept they are recomputed in the backward
    pass, which accumulates one gradient of the weight.

    Args of `apply`:
        states: `[tokens, hidden]`.
        weight, bias: of the output layer, `[vocab, hidden]` and `[vocab]` (or None), in the dtype of the states.
        ids: `[tokens]` int64.
        temperature: logits are divided by it.
        with_entropy: give `(log_probs, entropies)`, else `(log_probs,)`: `[tokens]`, float32 (float64 for such states).
        tile: how many tokens, and how much of the vocabulary.
        keeps: whether logits are kept.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, temperature, with_entropy, tile, keeps=False):
        rows, columns = tile
        parts, kept = [], []
        for tokens in _slices(len(ids), rows):
            blocks = _blocks_of_logits(states[tokens], weight, bias, temperature, columns)
            if keeps:  # in one piece: memory of many small ones would not go back to the system
                dtype = torch.promote_types(states.dtype, torch.float32)
                kept.append(states.new_empty(len(ids[tokens]) * len(weight), dtype=dtype))
                blocks = _copied(blocks, kept[-1])
            parts.append(_measure_blocks(blocks, ids[tokens], with_entropy))
        chosen, partition, *entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(states, weight, bias, ids, partition, *kept)
        ctx.temperature, ctx.tile = temperature, tile
        ctx.mark_non_differentiable(*entropies)
        return chosen, *entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        states, weight, bias, ids, partition, *kept = ctx.saved_tensors
        rows, columns = ctx.tile
        of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight)
        of_bias = None if bias is None else torch.zeros_like(bias)
        for i, tokens in enumerate(_slices(len(ids), rows)):
            of_tokens = torch.zeros_like(states[tokens], dtype=partition.dtype)  # a sum over blocks, which bf16 rounds
            if kept:
                blocks = ((block, _part(kept[i], block, len(of_tokens))) for block in _slices(len(weight), columns))
            else:
                blocks = _blocks_of_logits(states[tokens], weight, bias, ctx.temperature, columns)
            for block, logits in blocks:
                inside, places = _within(block, ids[tokens])
                own_grad = torch.where(inside, grad[tokens], 0)
                below = partition[tokens, None]
                log_probs = logits - below if kept else logits.sub_(below)
                gradient = _gradient_in_place(log_probs, places, grad[tokens], own_grad)
                gradient = (gradient if ctx.temperature == 1.0 else gradient.div_(ctx.temperature)).to(weight.dtype)
                of_tokens += gradient @ weight[block]
                of_weight[block].addmm_(gradient.T, states[tokens])
                if of_bias is not None:
                    of_bias[block] += gradient.sum(0)
            of_states[tokens] = of_tokens
        return of_states, of_weight, of_bias, *[None] * 5


class FrozenProjectedLogProbs(torch.autograd.Function):
    """As `ProjectedLogProbs`, of an output layer that isn't trained. The forward pass adds up what the gradient of the
    states is made of, so that the backward pass has no products of tokens and vocabulary, and the two together half as
    many:

        d log p(id) / d state = ((1 - p(id)) W[id] - sum over v != id of p(v) W[v]) / temperature

    The id stands apart in the sum, or a gradient near 0 would be the difference of two rounded numbers.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, temperature, with_entropy, tile):
        rows, columns = tile
        parts = []
        for tokens in _slices(len(ids), rows):
            blocks = _blocks_of_logits(states[tokens], weight, bias, temperature, columns)
            parts.append(_measure_blocks(blocks, ids[tokens], with_entropy, weight))
        chosen, _, *entropies, others = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(weight, ids, chosen, others)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(*entropies)
        return chosen, *entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        weight, ids, chosen, others = ctx.saved_tensors
        pull = -torch.expm1(chosen)[:, None] * weight[ids] - others
        of_states = (pull * (grad / ctx.temperature)[:, None]).to(weight.dtype)
        return of_states, None, None, None, None, None, None


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _blocks_of_logits(states: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, columns: int):
    """Parts of the vocabulary, each with its logits at the temperature, `[tokens, columns]`."""
    for block in _slices(len(weight), columns):
        logits = torch.nn.functional.linear(states, weight[block], None if bias is None else bias[block])
        yield block, at_temperature(logits, temperature)


def _copied(blocks, kept: Tensor):
    """The same blocks of logits, which are copied to `kept`, `[tokens * vocabulary]`, as they are read."""
    for block, logits in blocks:
        _part(kept, block, len(logits)).copy_(logits)
        yield block, logits


def _part(kept: Tensor, block: slice, tokens: int) -> Tensor:
    """The logits of a block, `[tokens, columns]`, where they are kept block after block."""
    return kept[tokens * block.start : tokens * block.stop].view(tokens, -1)


def _within(block: slice, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which ids are in a block, bool `[tokens]`, and the ids' columns there, `[tokens, 1]`, any for the others."""
    inside = (ids >= block.start) & (ids < block.stop)
    return inside, (ids - block.start).clamp(0, block.stop - block.start - 1)[:, None]


def _measure_blocks(blocks, ids: Tensor, with_entropy: bool, weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Log-probs of the ids, the log-partition, and the entropy if wanted, each `[tokens]`, from blocks of logits.

    Args:
        weight: of the layer; then the sum of its rows, each times its token's probability, but for the id's, comes
            last, `[tokens, hidden]`.
    """
    chosen, so_far = torch.zeros(ids.shape, device=ids.device), torch.zeros(ids.shape, device=ids.device)
    partition = torch.full(ids.shape, -torch.inf, device=ids.device)  # of no logits
    others = None
    for block, logits in blocks:
        inside, places = _within(block, ids)
        chosen = torch.where(inside, logits.gather(-1, places).squeeze(-1), chosen)
        of_block = logits.logsumexp(-1)
        total = torch.logaddexp(partition.to(of_block.dtype), of_block)
        if with_entropy:
            so_far = _joint_entropy((partition - total, so_far), (of_block - total, entropy(logits)))
        if weight is not None:
            shares = logits.sub_(total[:, None]).exp_()
            shares.scatter_(-1, places, shares.gather(-1, places).masked_fill(inside[:, None], 0))
            of_others = (shares.to(weight.dtype) @ weight[block]).to(shares.dtype)
            others = of_others if others is None else others * (partition - total).exp()[:, None] + of_others
        partition = total
    found = [chosen - partition, partition]
    found += [so_far] if with_entropy else []
    return (*found, others) if others is not None else tuple(found)


def _joint_entropy(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """Of a distribution in parts, each given by the log of its share and the entropy inside."""
    joint = torch.zeros_like(parts[0][0])
    for log_share, inside in parts:
        finite = log_share.clamp(min=torch.finfo(log_share.dtype).min)  # a share of 0 contributes 0
        joint = joint + log_share.exp() * (inside - finite)
    return joint


def log_partition(logits: Tensor, temperature: float) -> Tensor:
    """Log of the sum of the exponentials of the logits at every position, `[batch, seq]`."""
    return at_temperature(logits, temperature).logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution at every position, in nats, `[batch, seq]`."""
    log_probs = at_temperature(logits, temperature).log_softmax(-1)
    # xlogy's convention: a token of probability 0 (logit -inf) contributes 0, not 0 * inf.
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -torch.linalg.vecdot(log_probs.exp(), finite)


def align(x: Tensor) -> Tensor:
    """Shifts predictions of the next token to the tokens themselves: `[batch, seq, ...]`, column 0 is 0, and the last
    position's prediction is dropped."""
    return torch.nn.functional.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0))


def token_log_probs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of every token under the model that saw the tokens before it.

    Args:
        logits: `[batch, seq, vocab]`; position `t` predicts token `t + 1`.
        input_ids: `[batch, seq]` int64.

    Returns:
        `[batch, seq]`, aligned with the tokens; column 0 is 0.
    """
    return align(next_log_probs(logits, input_ids.roll(-1, dims=1), temperature))


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy, in nats, of the distribution each token was drawn from: `[batch, seq]`, column 0 is 0."""
    return align(entropy(logits, temperature))


def response_targets(loss_mask: Tensor) -> Tensor:
    """The entries of `loss_mask` (`[batch, seq]` bool) that something predicts: all but column 0."""
    targets = loss_mask.clone()
    targets[:, 0] = False
    return targets


def cross_entropy(
    log_probs: Tensor, loss_mask: Tensor, denominator: Tensor | float, *, kind: CrossEntropy = "nll"
) -> tuple[Tensor, dict]:
    """Loss of the target tokens, divided by their global number. With the probability p of a token, a token's is

    * nll: -log p
    * dft: -p log p, where the factor is a constant: the gradient of -log p has a factor 1 / p, with which unlikely
      tokens outweigh all others, and this takes it away (Dynamic Fine-Tuning, Wu et al., 2508.05629)

    Args:
        log_probs: `[batch, seq]` from `token_log_probs`.
        loss_mask: `[batch, seq]` bool, True on target tokens.
        denominator: target tokens of the whole step, over all ranks and micro-batches.
    """
    log_probs = masked(log_probs, loss_mask)
    if kind == "dft":
        log_probs = log_probs.detach().exp() * log_probs
    loss = -log_probs.sum() / denominator
    return loss, {"loss": loss.detach()}


def observation_loss(log_probs: Tensor, observed: Tensor, denominator: Tensor | float) -> tuple[Tensor, dict]:
    """How well a policy foretells what its environment says: each episode's mean negative log-likelihood of the tokens
    that it read, averaged over episodes (ECHO, Shrivastava et al., 2605.24517, eq. 3).

    Args:
        log_probs: `[batch, seq]` from `token_log_probs`.
        observed: `[batch, seq]` bool, True on the tokens that an environment wrote; rows without any count as 0.
        denominator: episodes of the whole step, over all ranks and micro-batches.
    """
    per_episode = masked(log_probs, observed).sum(1) / observed.sum(1).clamp(min=1)
    loss = -per_episode.sum() / denominator
    return loss, {"observation_loss": loss.detach()}


def z_loss(log_partition: Tensor, loss_mask: Tensor, denominator: Tensor | float) -> tuple[Tensor, dict]:
    """Mean of log(Z)^2 over the target tokens, which keeps the logits' scale near 0 (PaLM, 2204.02311, section 5).

    Args:
        log_partition: log Z of the logits that predict each token, `[batch, seq]`.
        loss_mask: `[batch, seq]` bool, True on target tokens.
        denominator: target tokens of the whole step, over all ranks and micro-batches.
    """
    loss = masked(log_partition, loss_mask).square().sum() / denominator
    return loss, {"z_loss": loss.detach()}
