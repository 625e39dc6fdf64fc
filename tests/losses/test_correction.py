"""Corrections of rollouts against the oracle, and what must hold of each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from coati.losses import importance_weights, is_accepted, is_near_policy, mismatch_metrics, mismatch_sums
from tests.losses.draw import assert_close, dtypes, masks, numbers, poison, quick
from tests.oracles import correction as oracle

LEVELS = ("none", "token", "sequence", "geometric")
levels = st.sampled_from(LEVELS)


def drawn(data, mask, dtype, apart=100.0):
    """Log-probs in training and in sampling."""
    sampling = -data.draw(numbers(mask.shape, 50.0, dtype)).abs()
    return sampling + data.draw(numbers(mask.shape, apart, dtype)), sampling


def is_at(ratios, bound):
    """Where rounding decides on which side of a bound a ratio is."""
    return torch.tensor([[r is not None and abs(r - bound) <= 1e-3 * bound for r in row] for row in ratios])


@quick
@given(masks(), st.data(), dtypes, levels, st.sampled_from([1.0, 2.0, 8.0]))
def test_weights_equal_the_oracle(mask, data, dtype, level, cap):
    """PITFALL 7, PITFALL 32: masked NaN stays away, ratios beyond any exponential are bounded."""
    log_probs, sampling = drawn(data, mask, dtype)
    found = importance_weights(poison(log_probs, mask), poison(sampling, mask), mask, level, cap)
    expected = oracle.importance_weights(log_probs.tolist(), sampling.tolist(), mask.tolist(), level, cap)
    # log-probs near 100 are themselves rounded, and a response has up to seven of them
    assert_close(found, expected, 0.0, 1e-9 if dtype == torch.float64 else 1e-3)


@quick
@given(masks(), st.data(), dtypes, levels, st.sampled_from([(0.5, 2.0), (0.0, 5.0), (1.0, 1.0)]))
def test_what_is_accepted_equals_the_oracle(mask, data, dtype, level, bounds):
    log_probs, sampling = drawn(data, mask, dtype, apart=data.draw(st.sampled_from([2.0, 100.0])))
    found = is_accepted(poison(log_probs, mask), poison(sampling, mask), mask, level, *bounds)
    case = (log_probs.tolist(), sampling.tolist(), mask.tolist(), level)
    ratios = oracle.ratios(*case)
    clear = ~(is_at(ratios, bounds[0]) | is_at(ratios, bounds[1]))
    assert torch.equal(found[clear], torch.tensor(oracle.is_accepted(*case, *bounds))[clear])
    assert not found[~mask].any()


@quick
@given(masks(), st.data(), dtypes, st.sampled_from([0.0, 0.1, 3.0]))
def test_what_is_near_the_policy_equals_the_oracle(mask, data, dtype, bound):
    log_probs, sampling = drawn(data, mask, dtype, apart=data.draw(st.sampled_from([1.0, 100.0])))
    advantages = data.draw(numbers(mask.shape, 3.0, dtype))
    found = is_near_policy(*(poison(x, mask) for x in (log_probs, sampling, advantages)), mask, bound)
    case = [x.tolist() for x in (log_probs, sampling, advantages, mask)]
    expected = torch.tensor(oracle.is_near_policy(*case, bound))
    moved = torch.where(mask, (sampling - log_probs).clamp(-60, 60), 0.0).sum(1) / mask.sum(1).clamp(min=1)
    clear = ((moved - bound).abs() > 1e-4)[:, None].expand_as(mask)
    assert torch.equal(found[clear], expected[clear])


@quick
@given(masks(), st.data(), dtypes, levels)
def test_sums_of_a_mismatch_equal_the_oracle(mask, data, dtype, level):
    log_probs, sampling = drawn(data, mask, dtype, apart=data.draw(st.sampled_from([1.0, 20.0])))
    case = (log_probs.tolist(), sampling.tolist(), mask.tolist())
    weights = importance_weights(log_probs, sampling, mask, level)
    accepted = is_accepted(log_probs, sampling, mask, level)
    poisoned = (poison(log_probs, mask), poison(sampling, mask))
    found = mismatch_sums(*poisoned, mask, weights, accepted)
    expected = oracle.mismatch_sums(*case, weights.tolist(), accepted.tolist())
    assert_close(found, expected, 1.0, 1e-9 if dtype == torch.float64 else 1e-3)
    measured = mismatch_metrics(found)
    assert measured == pytest.approx(oracle.mismatch_metrics(found.tolist()), rel=1e-9, abs=1e-9)
    assert 0 <= measured["effective_sample_size"] <= 1 + 1e-9 and 0 <= measured["rejected"] <= 1


@quick
@given(masks(), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), levels)
def test_corrections_are_unchanged_by_padding_and_by_the_split_into_micro_batches(mask, left, right, parts, level):
    """PITFALL 2, PITFALL 9: padding may hold NaN, and sums of parts are the sums of the whole."""
    generator = torch.Generator().manual_seed(mask.numel())
    x = torch.randn(3, *mask.shape, generator=generator, dtype=torch.float64)

    def corrected(x, mask):
        weights = importance_weights(x[0], x[1], mask, level)
        accepted = is_accepted(x[0], x[1], mask, level)
        near = is_near_policy(*x, mask, 0.1)
        return torch.stack([weights.double(), accepted.double(), near.double()]), mismatch_sums(
            x[0], x[1], mask, weights, accepted
        )

    whole, sums = corrected(x, mask)
    padded, padded_sums = corrected(pad(x, (left, right), value=torch.nan), pad(mask, (left, right)))
    assert torch.equal(padded[..., left : left + mask.shape[1]], whole)
    splits = [corrected(*part) for part in zip(x.tensor_split(parts, 1), mask.tensor_split(parts), strict=True)]
    assert torch.equal(torch.cat([part for part, _ in splits], 1), whole)
    for other in (padded_sums, sum(part for _, part in splits)):
        torch.testing.assert_close(other, sums, rtol=1e-12, atol=1e-12)


def test_levels_are_the_ratios_that_they_are_called():
    """Two tokens, twice and four times as likely in training as in sampling."""
    log_probs, mask = torch.tensor([[0.0, 2.0, 4.0]]).log(), torch.tensor([[False, True, True]])
    sampling = torch.zeros(1, 3)
    found = {level: importance_weights(log_probs, sampling, mask, level, 100.0)[0].tolist() for level in LEVELS}
    assert found["none"] == [1, 1, 1] and found["token"] == pytest.approx([1, 2, 4])
    assert found["sequence"] == pytest.approx([1, 8, 8]) and found["geometric"] == pytest.approx([1, 8**0.5, 8**0.5])
    accepted = {level: is_accepted(log_probs, sampling, mask, level, 0.5, 3.0)[0].tolist() for level in LEVELS}
    assert accepted["none"] == [False, True, True] and accepted["token"] == [False, True, False]
    assert accepted["sequence"] == [False] * 3 and accepted["geometric"] == [False, True, True]


def test_bounds_of_rejection_are_two():
    """Below and above are looked at separately, at every level."""
    mask = torch.ones(2, 2, dtype=torch.bool)
    log_probs, sampling = torch.tensor([[-0.3, -0.3], [0.3, 0.3]]), torch.zeros(2, 2)
    for level in ("token", "sequence", "geometric"):
        assert is_accepted(log_probs, sampling, mask, level, 0.9, 9.0).all(1).tolist() == [False, True]
        assert is_accepted(log_probs, sampling, mask, level, 0.1, 1.1).all(1).tolist() == [True, False]


def test_the_mean_of_sequence_weights_is_an_expectation_under_the_policy():
    """Exactly, over all responses of two tokens: weights that no cap reaches turn a mean over the sampler's responses
    into one over the policy's; those by token and by geometric mean don't."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(
        2, 2, 3, 3, generator=generator, dtype=torch.float64
    )  # policy or sampler, place, before, token

    def log_probs(which):
        first, second = logits[which, 0, 0].log_softmax(-1), logits[which, 1].log_softmax(-1)
        return torch.stack([first.repeat_interleave(3), second.flatten()], 1)

    policy, sampler = log_probs(0), log_probs(1)
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    expected = (policy.sum(1).exp() * rewards).sum().item()
    mask = torch.ones(9, 2, dtype=torch.bool)
    means = {
        level: (sampler.sum(1).exp() * importance_weights(policy, sampler, mask, level, 1e9)[:, 1] * rewards).sum()
        for level in LEVELS
    }
    assert means["sequence"].item() == pytest.approx(expected, rel=1e-12)
    assert all(abs(means[level].item() - expected) > 0.01 for level in ("none", "token", "geometric"))


def test_metrics_of_equal_distributions_are_those_of_no_mismatch():
    log_probs, mask = -torch.rand(3, 4), torch.ones(3, 4, dtype=torch.bool)
    found = mismatch_metrics(mismatch_sums(log_probs, log_probs, mask, torch.ones(3, 4), mask))
    assert found == pytest.approx(dict.fromkeys(found, 0.0) | {"weight": 1.0, "effective_sample_size": 1.0})
    assert set(mismatch_metrics(torch.zeros(9)).values()) == {0.0}


@pytest.mark.parametrize("function", [importance_weights, is_accepted])
def test_an_unknown_level_is_named(function):
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match="none, token, sequence or geometric"):
        function(one, one, one.bool(), "clipped")
