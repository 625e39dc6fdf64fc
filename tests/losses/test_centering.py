"""Score centering against the oracle, against sums over a whole vocabulary, and what it is for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import expected_scores, policy_loss
from tests.losses.draw import assert_close, dtypes, masks, numbers, quick
from tests.oracles import centering as oracle

BOUNDS = [(0.0, 0.0), (1.0, 1.0), (1.0, 4.0), (0.5, 0.2)]
bounds = st.sampled_from(BOUNDS)


def distributions(seed: int, tokens: int):
    """Logits in training and log-probs in sampling, float64 `[1, tokens, 6]`."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, 1, tokens, 6, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), other.log_softmax(-1)


def mean_score(logits, log_q, clip_low: float, clip_high: float):
    """E_q[w grad log p] in the logits, by a sum over the vocabulary: grad log p(v) is 1 at v, minus p."""
    p, q = logits.detach().softmax(-1), log_q.exp()
    weighted = q * (p / q).clamp(1 - clip_low, 1 + clip_high)
    return weighted - weighted.sum(-1, keepdim=True) * p


@quick
@given(masks(), st.data(), dtypes, bounds, st.integers(1, 5))
def test_it_equals_the_oracle_whatever_stands_under_the_mask(mask, data, dtype, clip, head):
    """PITFALL 7."""
    shape = (*mask.shape, 7)
    p, q = (data.draw(numbers(shape, 20.0, torch.float64)).log_softmax(-1)[..., :head].to(dtype) for _ in range(2))
    poisoned = [torch.where(mask[..., None], x, torch.nan) for x in (p, q)]
    poisoned[0].requires_grad_()
    how = dict(clip_low=clip[0], clip_high=clip[1])
    found = expected_scores(*poisoned, mask, **how)
    expected = oracle.expected_scores(p.tolist(), q.tolist(), mask.tolist(), **how)
    # of what is left in the tail as little as 1e-6 counts, and in float32 rounding is as large
    largest = 1.0 if dtype == torch.float64 else 1e5
    assert_close(found, expected, scale=largest)
    found.sum().backward()
    gradient = poisoned[0].grad
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    for b, t in mask.nonzero().tolist():
        constants = oracle.coefficients(p[b, t].tolist(), q[b, t].tolist(), *clip)
        assert_close(gradient[b, t], constants, scale=largest)


@pytest.mark.parametrize("clip", BOUNDS)
def test_over_the_whole_vocabulary_its_gradient_is_the_mean_score(clip):
    logits, log_q = distributions(0, 5)
    mask = torch.ones(1, 5, dtype=torch.bool)
    expected_scores(logits.log_softmax(-1), log_q, mask, clip_low=clip[0], clip_high=clip[1]).sum().backward()
    torch.testing.assert_close(logits.grad, mean_score(logits, log_q, *clip))


@pytest.mark.parametrize("clip", BOUNDS)
def test_a_head_is_enough_where_the_tails_have_the_same_form(clip):
    """The paper's model of the tail: the probabilities in training, times a factor."""
    logits, log_q = distributions(1, 5)
    log_p, tail = logits.log_softmax(-1), slice(3, None)
    rest = (1 - log_q[..., :3].exp().sum(-1, keepdim=True)) / log_p[..., tail].exp().sum(-1, keepdim=True)
    log_q = torch.cat([log_q[..., :3], (log_p[..., tail] + rest.log()).detach()], -1)
    mask = torch.ones(1, 5, dtype=torch.bool)
    found = expected_scores(log_p[..., :3], log_q[..., :3], mask, clip_low=clip[0], clip_high=clip[1])
    found.sum().backward()
    torch.testing.assert_close(logits.grad, mean_score(logits, log_q, *clip))


def test_where_sampling_is_training_there_is_nothing_to_take_off():
    logits, _ = distributions(2, 5)
    log_p, mask = logits.log_softmax(-1)[..., :3], torch.ones(1, 5, dtype=torch.bool)
    expected_scores(log_p, log_p.detach(), mask, clip_low=0.0, clip_high=0.0).sum().backward()
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("clip", BOUNDS)
@pytest.mark.parametrize("informative", [False, True])
def test_the_mean_gradient_is_the_covariance_of_advantage_and_score(clip, informative):
    """Over all tokens that the sampler may draw, by their probabilities. An advantage that all have alike teaches
    nothing, while without centering it draws the policy toward the sampler."""
    logits, log_q = distributions(3, 1)
    size = logits.shape[-1]
    advantages = torch.linspace(-1, 2, size, dtype=torch.float64) if informative else torch.full((size,), 0.7).double()
    mask = torch.ones(size, 1, dtype=torch.bool)

    def gradient(centered: bool):
        """Each row is a token that is drawn; it weighs as much as it is likely."""
        logits.grad = None
        log_p = logits.log_softmax(-1).expand(size, 1, size)
        how = dict(clip_low=clip[0], clip_high=clip[1])
        scores = expected_scores(log_p, log_q.expand_as(log_p), mask, **how) if centered else None
        drawn, q = torch.diagonal(log_p[:, 0])[:, None], log_q.reshape(-1, 1)
        how |= dict(kind="cispo", weights=q.exp(), centering=scores)
        policy_loss(drawn, q, advantages[:, None], mask, 1.0, **how)[0].backward()
        return -logits.grad[0, 0]

    p, q = logits.detach()[0, 0].softmax(-1), log_q[0, 0].exp()
    scores = (p / q).clamp(1 - clip[0], 1 + clip[1])[:, None] * (torch.eye(size, dtype=torch.float64) - p)
    mean_advantage, drift = (q * advantages).sum(), q @ scores
    covariance = (q * (advantages - mean_advantage)) @ (scores - drift)
    torch.testing.assert_close(gradient(centered=True), covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(centered=False), covariance + mean_advantage * drift, rtol=1e-9, atol=1e-12)
    assert informative or gradient(centered=True).abs().max() < 1e-12 < gradient(centered=False).abs().max()


def test_tokens_that_cannot_be_have_finite_gradients():
    """PITFALL 10."""
    logits, log_q = distributions(4, 3)
    banned = torch.zeros(1, 3, 6, dtype=torch.bool)
    banned[..., 1] = True
    log_p = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for of_sampler in (log_q, log_q.masked_fill(banned, -torch.inf).log_softmax(-1)):
        expected_scores(log_p, of_sampler, mask, clip_low=1.0, clip_high=1.0).sum().backward(retain_graph=True)
        assert logits.grad.isfinite().all() and (logits.grad[banned] == 0).all()
