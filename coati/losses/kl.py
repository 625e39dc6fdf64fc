"""Estimates of KL(policy || reference) from tokens drawn from the policy (Schulman 2020, "Approximating KL")."""

from typing import Literal

from torch import Tensor

from coati.losses.masking import log_ratio

KLEstimator = Literal["k1", "k2", "k3"]


def kl_divergence(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, estimator: KLEstimator = "k1"):
    """Per-token estimate `[batch, seq]`, 0 where masked. With x = log p - log q:

    * k1 = x: unbiased, can be negative
    * k2 = x^2 / 2: biased, low variance
    * k3 = exp(-x) - 1 + x: unbiased, never negative

    Raises:
        ValueError: unknown estimator.
    """
    x = log_ratio(log_probs, reference_log_probs, mask)
    match estimator:
        case "k1":
            return x
        case "k2":
            return x.square() / 2
        case "k3":
            return (-x).expm1() + x
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def adapt_kl_coefficient(coefficient: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """The adaptive controller of Ziegler et al. (1909.08593, section 2.2), one update.

    Args:
        kl: measured KL of a response to the reference, in nats, over the global batch.
        target: the KL to stay near.
        horizon: samples over which the coefficient may move by the factor e^0.2 or so.
        samples: responses in the global batch.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)
