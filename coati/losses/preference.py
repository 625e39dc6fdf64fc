"""Losses of preference optimization: a policy learns from responses that people prefer to others.

They read sums of log-probs over whole responses. With `r` what a response is scored with, each loss compares
`m = r(chosen) - r(rejected)`: by the log-ratio to a reference (DPO and its kin), by the policy's own log-probs (SimPO,
ORPO, CPO), or one response at a time with the batch's KL (KTO).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Responses:
    """What a loss reads of responses, each `[responses]`.

    Attributes:
        log_probs: the sum of the log-probs of a response's tokens.
        lengths: how many tokens that are.
        reference: the same sums under the reference policy; None where a loss needs none.
    """

    log_probs: Tensor
    lengths: Tensor
    reference: Tensor | None = None

    def in_float(self) -> "Responses":
        """The same in float32 at least, so that sums of half-precision numbers keep their digits."""
        dtype = torch.float64 if self.log_probs.dtype == torch.float64 else torch.float32
        reference = None if self.reference is None else self.reference.to(dtype)
        return Responses(self.log_probs.to(dtype), self.lengths.to(dtype), reference)

    def rows(self, index: Tensor) -> "Responses":
        """Some of them."""
        reference = None if self.reference is None else self.reference[index]
        return Responses(self.log_probs[index], self.lengths[index], reference)

    @property
    def log_ratios(self) -> Tensor:
        """log pi / pi_ref of whole responses."""
        if self.reference is None:
            raise ValueError("this loss compares with a reference policy: give its log-probs")
        return self.log_probs - self.reference

    def per_token(self) -> "Responses":
        """Averages over a response's tokens in place of sums."""
        n = self.lengths.clamp(min=1)
        reference = None if self.reference is None else self.reference / n
        return replace(self, log_probs=self.log_probs / n, reference=reference)


@dataclass(frozen=True)
class Options:
    """Constants of the losses.

    Attributes:
        beta: scale of the rewards; with a reference, how strongly it holds the policy.
        label_smoothing: the fraction of pairs whose preference is taken to be flipped.
        gamma: the margin that SimPO demands.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5


Compared = tuple[Tensor, Tensor, Tensor]  # rewards of the chosen, of the rejected, loss of each pair: `[pairs]`


def dpo(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """DPO (Rafailov et al., 2305.18290, eq. 7); with label smoothing e cDPO (Mitchell 2023).

    r = beta log pi / pi_ref and loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)
    """
    good, bad = o.beta * chosen.log_ratios, o.beta * rejected.log_ratios
    return good, bad, _smoothed(good - bad, o.label_smoothing)


def robust(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """Robust DPO (Chowdhury et al., 2403.00409): unbiased if a fraction e < 1/2 of the labels is flipped.

    loss = (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e)
    """
    good, bad, e = o.beta * chosen.log_ratios, o.beta * rejected.log_ratios, o.label_smoothing
    return good, bad, (e * logsigmoid(bad - good) - (1 - e) * logsigmoid(good - bad)) / (1 - 2 * e)


def hinge(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """SLiC's hinge (Zhao et al., 2305.10425, eq. 1) on DPO's rewards, as in RSO (Liu et al., 2309.06657).

    loss = max(0, 1 - m)
    """
    good, bad = o.beta * chosen.log_ratios, o.beta * rejected.log_ratios
    return good, bad, torch.relu(1 - (good - bad))


def ipo(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """IPO (Azar et al., 2310.12036, eq. 17), on log-ratios averaged over a response's tokens.

    loss = (m / beta - 1 / (2 beta))^2

    The paper writes sums. With those the target 1 / (2 beta) means less the longer the responses are; its authors
    average, and so does TRL.
    """
    good, bad = chosen.per_token().log_ratios, rejected.per_token().log_ratios
    return o.beta * good, o.beta * bad, (good - bad - 1 / (2 * o.beta)).square()


def simpo(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """SimPO (Meng et al., 2405.14734, eq. 6): no reference, log-probs averaged over a response's tokens, a margin.

    r = beta / |y| log pi and loss = -log sigmoid(m - gamma), with label smoothing as DPO
    """
    good, bad = (o.beta * responses.per_token().log_probs for responses in (chosen, rejected))
    return good, bad, _smoothed(good - bad - o.gamma, o.label_smoothing)


def orpo(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """ORPO's odds-ratio term (Hong et al., 2403.07691, eq. 7), beta being the paper's lambda; its other term is the
    log-likelihood of the chosen response.

    loss = -beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(y) = p / (1 - p), p = exp(log pi / |y|)
    """
    good, bad = (responses.per_token().log_probs for responses in (chosen, rejected))
    return o.beta * good, o.beta * bad, -o.beta * logsigmoid(_log_odds(good) - _log_odds(bad))


def cpo(chosen: Responses, rejected: Responses, o: Options) -> Compared:
    """CPO's preference term (Xu et al., 2401.08417, eq. 3): DPO with a uniform reference. Its other term is the
    log-likelihood of the chosen response.

    r = beta log pi and loss as DPO's
    """
    good, bad = o.beta * chosen.log_probs, o.beta * rejected.log_probs
    return good, bad, _smoothed(good - bad, o.label_smoothing)


PREFERENCE_LOSSES: dict[str, Callable[[Responses, Responses, Options], Compared]] = {
    "dpo": dpo,
    "robust-dpo": robust,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
}


def preference_loss(
    name: str,
    chosen: Responses,
    rejected: Responses,
    denominator: Tensor | float,
    *,
    options: Options | None = None,
    nll_coefficient: float = 0.0,
    length_normalized: bool = False,
) -> tuple[Tensor, dict]:
    """One of `PREFERENCE_LOSSES`, and the negative log-likelihood of the chosen responses.

    Args:
        chosen, rejected: the two responses of each pair.
        denominator: pairs of the whole step, over all ranks and micro-batches.
        nll_coefficient: weight of -log pi(chosen) / |chosen| (RPO: Pang et al., 2404.19733).
        length_normalized: averages over a response's tokens in place of sums.

    Metrics: loss, rewards of both, their margin, accuracy (a tie counts one half), log-probs and lengths of both, nll.
    """
    chosen, rejected = chosen.in_float(), rejected.in_float()
    options = options or Options()
    if length_normalized:
        good, bad, per_pair = PREFERENCE_LOSSES[name](chosen.per_token(), rejected.per_token(), options)
    else:
        good, bad, per_pair = PREFERENCE_LOSSES[name](chosen, rejected, options)
    metrics = {"accuracy": (good > bad).to(good.dtype) + 0.5 * (good == bad).to(good.dtype), "margin": good - bad}
    for side, rewards, responses in (("chosen", good, chosen), ("rejected", bad, rejected)):
        metrics[f"reward_{side}"] = rewards
        metrics[f"log_probs_{side}"] = responses.log_probs
        metrics[f"length_{side}"] = responses.lengths
    if nll_coefficient:
        metrics["nll"] = -chosen.per_token().log_probs
        per_pair = per_pair + nll_coefficient * metrics["nll"]
    metrics["loss"] = per_pair
    partial = {name: value.sum() / denominator for name, value in metrics.items()}
    return partial["loss"], {name: value.detach() for name, value in partial.items()}


def kto_loss(
    responses: Responses,
    desirable: Tensor,
    kl: Tensor,
    denominator: Tensor | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict]:
    """KTO (Ethayarajh et al., 2402.01306, eq. 7): responses that are good or bad by themselves.

    w (1 - sigmoid(r - beta z)) for a good response, w (1 - sigmoid(beta z - r)) for a bad one, r = beta log pi / pi_ref

    Args:
        desirable: bool `[responses]`, True for a good response.
        kl: the estimate of KL(pi || pi_ref) over the GLOBAL batch, a number: the mean log-ratio of responses to prompts
            that they do not belong to. z is the larger of it and 0; no gradient goes through it.
        denominator: responses of the whole step, over all ranks and micro-batches.
        desirable_weight, undesirable_weight: w of either sort; their ratio makes up for unequal numbers.

    Metrics: loss, kl (z), the fraction of desirable responses, and the sums of the rewards and log-probs of either sort
    over the number of ALL responses: divide by the sort's fraction for its mean.
    """
    responses = responses.in_float()
    rewards = beta * responses.log_ratios
    z = kl.detach().to(rewards.dtype).clamp(min=0)
    sign = 2 * desirable.to(rewards.dtype) - 1
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(rewards.dtype)
    per_response = weights * torch.sigmoid(-sign * (rewards - beta * z))
    metrics = {"loss": per_response, "kl": z.expand_as(rewards), "desirable": desirable.to(rewards.dtype)}
    for side, of_side in (("desirable", desirable), ("undesirable", ~desirable)):
        metrics[f"reward_{side}"] = rewards * of_side
        metrics[f"log_probs_{side}"] = responses.log_probs * of_side
    partial = {name: value.sum() / denominator for name, value in metrics.items()}
    return partial["loss"], {name: value.detach() for name, value in partial.items()}


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _log_odds(log_p: Tensor) -> Tensor:
    """log p / (1 - p). A probability that rounds to 1 counts as 1 - eps: its odds are large and not infinite."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))
