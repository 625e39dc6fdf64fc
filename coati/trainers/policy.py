"""What an iteration asks of its policy and of the reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coati.errors import UserError
from coati.losses import kl_divergence
from coati.models.routing import routers_of
from coati.parallel import Engine, resolve_precision
from coati.rollout import RolloutBatch, padded_routing
from coati.trainers.batching import in_batch_order, model_inputs
from coati.trainers.config import RolloutConfig
from coati.transfer import upload


class LanguageModel:
    """An `Actor` that tells how likely responses are.

    Args:
        adapter: False for the model without its LoRA adapter: the reference of a LoRA policy.
        group: so many rows of a micro-batch share what they begin with, which is read once, see `PackedGroups`.
        replays_routing: tokens go to the experts that they went to at sampling, where a batch has these.
    """

    def __init__(self, engine: Engine, *, adapter: bool = True, group: int = 1, replays_routing: bool = False):
        self.engine, self.options, self.replays_routing = engine, {}, replays_routing
        if not adapter:
            self.options["adapter"] = False
        if group > 1:
            self.options["shared_prefix_group"] = group

    def inputs(self, batch, targets: Tensor | None = None, **options):
        """What the model is called with for responses, at the temperature that they were sampled at.

        Args:
            targets: the tokens whose log-probs are wanted, bool `[batch, seq]`; None for the responses'.
        """
        targets = batch.response_mask if targets is None else targets
        if self.replays_routing and batch.routing is not None:
            options["routing"] = padded_routing(batch.routing, batch.input_ids.shape, batch.input_ids.device)
        return model_inputs(batch, targets, temperature=batch.temperature, **self.options, **options)

    def log_probs(self, batch: RolloutBatch, parts: Sequence[Sequence[int]]) -> Tensor:
        """Of the response tokens, float32 `[batch, seq]`; 0 elsewhere, and in rows that no part has.

        Args:
            parts: rows of the micro-batches.
        """
        outputs = self.engine.forward_all([self.inputs(batch.rows(part)) for part in parts])
        # an `ActorCritic` tells its values too
        log_probs = [output[0] if isinstance(output, tuple) else output for output in outputs]
        return in_batch_order(parts, log_probs, batch.input_ids.shape)


class Policy:
    """The policy that sampled a batch and learns from it.

    Args:
        group: as `LanguageModel`.
        ranks: those that see different data.
        recomputes: log-probs are those that training computes, always: a correction compares them with sampling's.
        bypass: they are those noted at sampling, always.

    Raises:
        UserError: experts are to be replayed that the policy doesn't have.
    """

    def __init__(
        self,
        engine: Engine,
        config: RolloutConfig,
        ranks,
        *,
        group: int = 1,
        recomputes: bool = False,
        bypass: bool = False,
    ):
        if config.router_replay and not routers_of(engine.module):
            raise UserError("router_replay is for mixtures of experts, which the policy is none of: leave it out")
        self.engine, self.config, self.ranks, self.group = engine, config, ranks, group
        self.recomputes, self.bypass = recomputes, bypass
        self.model = LanguageModel(engine, group=group, replays_routing=True)

    @property
    def is_stale(self) -> bool:
        """Whether responses may be sampled with older weights."""
        return self.config.generators.max_staleness > 0

    def log_probs(self, batch: RolloutBatch, parts: Sequence[Sequence[int]], k: int) -> tuple[Tensor, float]:
        """Those of training, `[batch, seq]`, and the KL of sampling from them, nats per token.

        In fp32 they are those noted at sampling, up to rounding: a few rows are computed again to show it. In lower
        precision, on a sharded model and in vLLM they round differently, and all are, unless `bypass` says not to.

        Args:
            k: iteration; different rows are looked at in each.

        Raises:
            UserError: they disagree by more than `max_rollout_kl`, although the weights are the same.
        """
        mask = batch.response_mask
        if self.bypass or (self.rounds_as_sampling() and not self.recomputes):
            return batch.sampling_log_probs, self.rollout_kl_of_some(batch, parts, k)
        log_probs = self.model.log_probs(batch, parts)
        return log_probs, self.rollout_kl(batch, log_probs, mask)

    def rounds_as_sampling(self) -> bool:
        """Whether training computes what the generator does."""
        c = self.config
        return (
            not self.is_stale
            and resolve_precision(c.parallel) == "fp32"
            and not c.parallel.splits_models
            and c.generation.rollout_engine == "coati"
        )

    def rollout_kl_of_some(self, batch: RolloutBatch, parts: Sequence[Sequence[int]], k: int) -> float:
        """`rollout_kl` of an eighth of a micro-batch, for which log-probs are computed; arguments as `log_probs`."""
        checked, mask = an_eighth(parts, k, self.group), batch.response_mask
        again = self.model.log_probs(batch, checked)
        looked_at = torch.zeros_like(batch.finished)
        looked_at[upload([row for part in checked for row in part], mask.device)] = True
        return self.rollout_kl(batch, again, mask & looked_at[:, None])

    def rollout_kl(self, batch: RolloutBatch, log_probs: Tensor, mask: Tensor) -> float:
        """The KL of sampling from training, nats per token; stops a run where they disagree.

        Args:
            log_probs: as training computes them, `[batch, seq]`.
            mask: the tokens that are compared, bool `[batch, seq]`.
        """
        difference = kl_divergence(batch.sampling_log_probs, log_probs, mask, "k3").sum()
        total, tokens = self.ranks.sum(torch.stack([difference, mask.sum()])).tolist()
        kl = total / max(tokens, 1)
        limit = self.config.algorithm.max_rollout_kl
        if kl > limit and not self.is_stale:
            raise UserError(
                f"trainer/sampler log-prob mismatch: {kl:.3g} nats per token (limit {limit}, --max_rollout_kl): "
                "weights not synced, another temperature, or a precision too low"
            )
        return kl


def an_eighth(parts: Sequence[Sequence[int]], k: int, group: int = 1) -> list[list[int]]:
    """An eighth of one micro-batch, of whole groups; of all in turn, as `k` goes on."""
    turn, which = divmod(k, len(parts))
    rows, groups = parts[which], len(parts[which]) // group
    chosen = range(turn % min(8, groups), groups, 8)
    return [[rows[start + i] for start in range(0, len(rows), groups) for i in chosen]]
