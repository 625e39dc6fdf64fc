"""Score centering (Marek and Ryabinin, 2609.20807): what a policy learns from the rewards alone, where another
distribution has sampled.

With the distribution q that a token is drawn from, p that is trained, an advantage A and a constant weight w of the
token, the mean gradient of w A log p is E_q[A] E_q[w grad log p] + Cov_q(A, w grad log p). The first part knows nothing
of what is good: it draws p toward w q, by the advantage that is expected there. Taking E_q[w grad log p] off each
token's own w grad log p leaves the second one.
"""

import torch
from torch import Tensor

from coati.losses.masking import masked

LEAST_TAIL = 1e-6  # of a probability that rounding may have made 0 or less (appendix A.3)


def expected_scores(
    head_log_probs: Tensor, sampling_head_log_probs: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """For each token a sum, `[batch, seq]`, whose gradient is E_q[w grad log p] there; 0 where masked.

    q is known for its most likely tokens, the head; in the tail it is taken to be p times rho, the ratio of the two
    tails. With w(r) = r within [1 - clip_low, 1 + clip_high] for r = p / q, the sum is that of c log p over the head,
    with the constants c = q w(p / q) - alpha p and alpha = rho w(1 / rho): the tail's w q grad log p is alpha times the
    p grad log p of its tokens, and over all tokens that adds up to 0 (eq. 12 and 14). The gradient is exact where the
    head is the whole vocabulary, and 0 where p is q.

    Args:
        head_log_probs: of the head in training, `[batch, seq, head]`.
        sampling_head_log_probs: the same in sampling; not those of a truncated distribution (top-k, top-p).
        mask: `[batch, seq]` bool, True on response tokens.
        clip_low, clip_high: bounds of w; both 0 for no weights, 1 and c - 1 for those of truncated importance sampling,
            min(r, c).
    """
    entries = mask[..., None]
    log_probs = masked(head_log_probs, entries)
    constants = centering_coefficients(log_probs, masked(sampling_head_log_probs, entries), 1 - clip_low, 1 + clip_high)
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min / 4)  # of a token that can't be
    return masked((constants * finite).sum(-1), mask)


@torch.no_grad()
def centering_coefficients(log_p: Tensor, log_q: Tensor, low: float, high: float) -> Tensor:
    """The constants c of `expected_scores`, `[..., head]`, for weights within [low, high].

    Args:
        log_p, log_q: log-probs of the head in training and in sampling, `[..., head]`.
    """
    p, q = log_p.exp(), log_q.exp()
    tails = [(1 - x.sum(-1, keepdim=True)).clamp(min=LEAST_TAIL) for x in (p, q)]
    rho = tails[1] / tails[0]
    # q w(p / q) and rho w(1 / rho), without a division by 0
    alpha = torch.ones_like(rho).clamp(low * rho, high * rho)
    return p.clamp(low * q, high * q) - alpha * p
