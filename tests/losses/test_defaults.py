"""What a loss does when it isn't told: the defaults are part of what users rely on."""

import torch

from coati.losses import kl_divergence, value_loss
from coati.losses.language import entropy, next_log_probs, token_entropy, token_log_probs

torch.manual_seed(0)
A, B, RETURNS = torch.randn(3, 2, 5, dtype=torch.float64)
MASK = torch.ones(2, 5, dtype=torch.bool)
LOGITS, IDS = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))


def test_the_kl_estimator_is_k1():
    assert torch.equal(kl_divergence(A, B, MASK), kl_divergence(A, B, MASK, "k1"))


def test_the_temperature_is_one():
    for function in (entropy, token_entropy):
        assert torch.equal(function(LOGITS), function(LOGITS, 1.0))
    for function in (next_log_probs, token_log_probs):
        assert torch.equal(function(LOGITS, IDS), function(LOGITS, IDS, 1.0))


def test_values_are_clipped_at_a_fifth_and_without_a_limit_none_are():
    loss, metrics = value_loss(A, B, RETURNS, MASK, 10.0)
    expected, same = value_loss(A, B, RETURNS, MASK, 10.0, clip=0.2)
    assert loss == expected and metrics == same and metrics["value_clip_fraction"] > 0
    _, metrics = value_loss(A, B, RETURNS, MASK, 10.0, clip=None)
    share = metrics["value_clip_fraction"]
    assert share == 0 and (share.dtype, share.device) == (A.dtype, A.device)
