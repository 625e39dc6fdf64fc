"""What the iterations of PPO and of GRPO have in common."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from coati.losses import kl_divergence, masked_sums, moments
from coati.rollout import Experience, RolloutBatch
from coati.trainers.batching import Batching
from coati.trainers.config import RolloutConfig


class Clock:
    """Seconds that an iteration's phases take on this rank.

    Attributes:
        seconds: `seconds/PHASE`, as metrics.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times what is done inside."""
        started = time.monotonic()
        yield
        self.seconds[f"seconds/{phase}"] = time.monotonic() - started


def learn(
    experience: Experience,
    batching: Batching,
    config: RolloutConfig,
    k: int,
    update: Callable[[list[Experience]], dict[str, float]],
    group: int = 1,
) -> dict[str, float]:
    """`ppo_epochs` passes of `minibatches` optimizer steps each, in an order of their own; they end early when the
    policy has moved `kl_stop` nats per token. Returns the means of the steps' metrics, and how many there were.

    Args:
        k: iteration.
        update: one step, on this rank's micro-batches of a minibatch.
        group: rows that stay together, see `Batching.split`.
    """
    a, updates = config.algorithm, []
    size = len(experience) // a.minibatches
    for epoch in range(a.ppo_epochs):
        for m in np.random.default_rng([config.seed, k, epoch]).permutation(a.minibatches):
            minibatch = experience.rows(range(m * size, (m + 1) * size))
            updates.append(update([minibatch.rows(part) for part in batching.split(minibatch.lengths, group)]))
        if a.kl_stop is not None and updates[-1].get("approximate_kl", 0.0) > a.kl_stop:
            break
    names = updates[-1].keys()
    return {name: finite_mean([of[name] for of in updates]) for name in names} | {"updates": len(updates)}


def kl_metrics(
    batch: RolloutBatch, log_probs: Tensor, reference: Tensor, config: RolloutConfig, ranks
) -> dict[str, float]:
    """Estimates of the KL to the reference: nats per response (`kl`, `kl/k1`, `kl/k3`) and a token.

    Args:
        log_probs, reference: `[batch, seq]`.
    """
    mask, responses = batch.response_mask, config.responses
    tokens = ranks.sum(mask.sum()).item()
    estimate = kl_divergence(log_probs, reference, mask, config.algorithm.kl_estimator).sum()
    shares = {"kl": estimate / responses, "kl_per_token": estimate / tokens}
    for name in ("k1", "k3"):
        shares[f"kl/{name}"] = kl_divergence(log_probs, reference, mask, name).sum() / responses
    return ranks.sum_metrics([shares])


def global_moments(x: Tensor, mask: Tensor, ranks) -> tuple[float, float]:
    """Mean and standard deviation over all ranks' unmasked entries."""
    return moments(ranks.sum(masked_sums(x, mask)))


def response_tokens(batch: Experience) -> Tensor:
    """How many a batch has."""
    return batch.response_mask.sum()


def count_responses(micro_batches: Sequence[Experience], ranks) -> float:
    """Responses of a step with tokens that are learned, over all ranks; at least 1.

    Args:
        micro_batches: this rank's.
    """
    counted = float(sum(batch.response_mask.any(1).sum() for batch in micro_batches))
    return max(ranks.sum(counted).item(), 1.0)


def finite_mean(values: list[float]) -> float:
    """The mean of what is finite, so that a skipped update leaves the figures of the others; NaN if nothing is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
