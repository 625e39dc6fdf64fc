"""How far a student's distributions over the vocabulary are from a teacher's.

On-policy distillation and its generalized Jensen-Shannon divergence: GKD (Agarwal et al., 2306.13649, section 3). There
is no factor of the squared temperature, which Hinton et al. (1503.02531) have.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coati.losses.language import at_temperature
from coati.losses.masking import masked

DivergenceKind = Literal["forward", "reverse", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """Which divergence of a student S from a teacher T, both at a temperature.

    Attributes:
        kind: `forward`, KL(T || S); `reverse`, KL(S || T); `jsd`, beta KL(T || M) + (1 - beta) KL(S || M) with the
            mixture M = beta T + (1 - beta) S (GKD, equation 1). Divided by beta it goes to the forward KL as beta goes
            to 0; divided by 1 - beta, to the reverse KL as beta goes to 1.
        beta: of `jsd`, above 0 and below 1.
        temperature: both models' logits are divided by it.
    """

    kind: DivergenceKind = "reverse"
    beta: float = 0.5
    temperature: float = 1.0


def vocabulary_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    *,
    log_partition: Callable[[Tensor], Tensor] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Divergence of the distributions at every position, in nats.

    Args:
        student_logits: `[..., vocab]`, any float dtype; -inf for tokens that can't be.
        teacher_logits: the same; they get no gradient.
        log_partition, total: where each process has a range of the vocabulary: what gives the log of the sum of the
            exponentials of all processes' logits, `[...]`, and what sums `[...]` over them.

    Returns:
        `[...]`, float32 (float64 for float64 logits).
    """
    log_partition, total = log_partition or _log_sum_exp, total or _unchanged
    return _VocabularyDivergence.apply(student_logits, teacher_logits, divergence, log_partition, total)


def _log_sum_exp(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1)


def _unchanged(x: Tensor) -> Tensor:
    return x


class _VocabularyDivergence(torch.autograd.Function):
    """With S = softmax(z / temperature), the gradient of a divergence D in z is S (h - sum S h) / temperature, where h
    is D's derivative in S up to a constant: -T / S (forward), log S - log T (reverse) or (1 - beta) (log S - log M)
    (jsd). Autograd's own keeps more tensors of the logits' size."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, divergence, log_partition, total):
        student, teacher = (
            _log_probs(logits, divergence.temperature, log_partition) for logits in (student_logits, teacher_logits)
        )
        ctx.save_for_backward(student, teacher)
        ctx.divergence, ctx.total, ctx.dtype = divergence, total, student_logits.dtype
        vecdot, beta = torch.linalg.vecdot, divergence.beta
        if divergence.kind == "forward":
            return total(vecdot(teacher.exp(), teacher - student))
        if divergence.kind == "reverse":
            return total(vecdot(student.exp(), student - teacher))
        mixture = _log_mixture(student, teacher, beta)
        of_teacher = vecdot(teacher.exp(), teacher - mixture)
        of_student = vecdot(student.exp(), student - mixture)
        return total(beta * of_teacher + (1 - beta) * of_student)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        student, teacher = ctx.saved_tensors
        divergence, probabilities = ctx.divergence, student.exp()
        if divergence.kind == "forward":
            gradient = probabilities.sub_(teacher.exp())
        else:
            if divergence.kind == "reverse":
                derivative = student - teacher
            else:
                derivative = (1 - divergence.beta) * (student - _log_mixture(student, teacher, divergence.beta))
            mean = ctx.total(torch.linalg.vecdot(probabilities, derivative))
            gradient = probabilities.mul_(derivative.sub_(mean[..., None]))
        gradient = gradient.mul_(grad[..., None] / divergence.temperature)
        return gradient.to(ctx.dtype), None, None, None, None


def _log_probs(logits: Tensor, temperature: float, log_partition: Callable[[Tensor], Tensor]) -> Tensor:
    """`[..., vocab]`; finite, so that a token of no probability (logit -inf) adds 0 and not NaN."""
    logits = at_temperature(logits, temperature)
    lowest = torch.finfo(logits.dtype).min / 4  # differences of such numbers are finite too
    return (logits - log_partition(logits)[..., None]).clamp_(min=lowest)


def _log_mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """log (beta T + (1 - beta) S) from log-probs, `[..., vocab]`."""
    return torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))


def without_first(mask: Tensor, count: int) -> Tensor:
    """The tokens that are learned where each row's first `count` of them are not, bool `[batch, seq]`.

    Args:
        mask: bool `[batch, seq]`, the response's tokens.
    """
    return mask & (mask.cumsum(1) > count)


def distillation_loss(divergences: Tensor, mask: Tensor, denominator: Tensor | float) -> tuple[Tensor, dict]:
    """The mean divergence of the tokens.

    Args:
        divergences: of the distributions that each token was drawn from, `[batch, seq]`.
        mask: bool `[batch, seq]`, the tokens that the student learns from.
        denominator: such tokens of the whole step, over all ranks and micro-batches.
    """
    loss = masked(divergences, mask).sum() / denominator
    return loss, {"loss": loss.detach()}
