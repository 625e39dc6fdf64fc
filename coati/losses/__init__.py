"""Pure tensor functions: no modules, no I/O, no communication.

Conventions, the same everywhere:

* Per-token tensors are `[batch, seq]` and aligned with the tokens: entry `t` belongs to token `t`. A log-prob at `t`
  is log p(token t | tokens < t); a value at `t` is the critic's estimate before token `t` was chosen. Entry 0 never
  counts, as nothing predicts the first token.
* `mask` is bool, True where an entry counts. Masked entries may hold anything, NaN included: they are replaced before
  any arithmetic, so they reach neither the result nor a gradient.
* `denominator` is the GLOBAL count (all ranks, all micro-batches of the step). Each call returns a partial
  loss; their sum is the loss. A mean of micro-batch means is another number, and the wrong one: with 1 target token in
  one micro-batch and 3 in another, a mean of means gives that one token the weight of three.

* Losses return `(loss, metrics)`; metrics are detached and partial too, so that sums over micro-batches and ranks are
  the global values.

Examples:
    >>> import torch
    >>> from coati.losses import cross_entropy
    >>> first, second = torch.tensor([[0.0, -4.0, 0.0, 0.0]]), torch.tensor([[0.0, -1.0, -1.0, -1.0]])
    >>> mask = lambda *tokens: torch.tensor([[t in tokens for t in range(4)]])
    >>> partial_loss = lambda x, m: cross_entropy(x, m, denominator=4)[0]
    >>> float(partial_loss(first, mask(1)) + partial_loss(second, mask(1, 2, 3)))  # a mean of means says 2.5
    1.75
"""

from coati.losses.advantages import gae, length_adaptive_lambda, masked_sums, moments, returns_to_go, whiten
from coati.losses.centering import expected_scores
from coati.losses.correction import (
    importance_weights,
    is_accepted,
    is_near_policy,
    mismatch_metrics,
    mismatch_sums,
)
from coati.losses.distillation import distillation_loss, vocabulary_divergence, without_first
from coati.losses.group import aggregation_weights, decoupled_advantages, group_advantages
from coati.losses.kl import adapt_kl_coefficient, kl_divergence
from coati.losses.language import (
    cross_entropy,
    observation_loss,
    response_targets,
    token_entropy,
    token_log_probs,
    z_loss,
)
from coati.losses.policy import policy_loss
from coati.losses.preference import kto_loss, preference_loss
from coati.losses.reward import (
    confidence_gaps,
    first_wrong,
    objective_loss,
    pairwise_reward_loss,
    step_reward_loss,
)
from coati.losses.shaping import clip_scores, penalize_missing_eos, punish_overlong, shape_rewards
from coati.losses.turns import turn_advantages, turn_gae
from coati.losses.value import bounded_values, value_loss

__all__ = [
    "adapt_kl_coefficient",
    "aggregation_weights",
    "bounded_values",
    "clip_scores",
    "confidence_gaps",
    "cross_entropy",
    "decoupled_advantages",
    "distillation_loss",
    "expected_scores",
    "first_wrong",
    "gae",
    "group_advantages",
    "importance_weights",
    "is_accepted",
    "is_near_policy",
    "kl_divergence",
    "kto_loss",
    "length_adaptive_lambda",
    "masked_sums",
    "mismatch_metrics",
    "mismatch_sums",
    "moments",
    "objective_loss",
    "observation_loss",
    "pairwise_reward_loss",
    "penalize_missing_eos",
    "policy_loss",
    "preference_loss",
    "punish_overlong",
    "response_targets",
    "returns_to_go",
    "shape_rewards",
    "step_reward_loss",
    "token_entropy",
    "token_log_probs",
    "turn_advantages",
    "turn_gae",
    "value_loss",
    "vocabulary_divergence",
    "whiten",
    "without_first",
    "z_loss",
]
