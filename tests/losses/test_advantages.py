"""Advantages, whitening and running statistics against the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import gae, length_adaptive_lambda, masked_sums, moments, returns_to_go, whiten
from coati.rewards import RunningMoments
from tests.losses.draw import assert_close, dtypes, masks, numbers, poison, quick
from tests.oracles import advantages as oracle

discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@quick
@given(masks(), st.data(), dtypes, discounts, discounts)
def test_gae_equals_the_oracle(mask, data, dtype, gamma, lam):
    """PITFALL 2, PITFALL 7: what stands on padding or in a hole of the mask, NaN included, changes nothing."""
    values, rewards = (data.draw(numbers(mask.shape, 100.0, dtype)) for _ in range(2))
    advantages, returns = gae(poison(values, mask), poison(rewards, mask), mask, gamma, lam)
    expected = oracle.gae(values.tolist(), rewards.tolist(), mask.tolist(), gamma, lam)
    scale = (values.abs() + rewards.abs()).sum().item()
    assert_close(advantages, expected[0], scale)
    assert_close(returns, expected[1], scale)


@quick
@given(masks(), st.data(), st.sampled_from([0.05, 0.4, 1.5, 100.0]))
def test_length_adaptive_lambda_equals_the_oracle(mask, data, alpha):
    lam = length_adaptive_lambda(mask, alpha)
    expected = oracle.length_adaptive_lambda(mask.tolist(), alpha)
    assert_close(lam, expected, scale=1.0)
    values, rewards = (data.draw(numbers(mask.shape, 100.0, torch.float64)) for _ in range(2))
    advantages, returns = gae(values, rewards, mask, 0.9, lam.double())
    scale = (values.abs() + rewards.abs()).sum().item()
    lists = (values.tolist(), rewards.tolist(), mask.tolist())
    expected_advantages, expected_returns = oracle.gae(*lists, 0.9, lam.tolist())
    assert_close(advantages, expected_advantages, scale)
    assert_close(returns, expected_returns, scale)


@pytest.mark.parametrize("length", [40, 400, 4000])
def test_the_last_reward_reaches_the_first_token_of_any_response_alike(length):
    mask = torch.ones(1, length, dtype=torch.bool)
    rewards = torch.zeros(1, length, dtype=torch.float64)
    rewards[0, -1] = 1.0
    advantages, _ = gae(torch.zeros_like(rewards), rewards, mask, 1.0, length_adaptive_lambda(mask, 0.4).double())
    assert advantages[0, 0].item() == pytest.approx(math.exp(-1 / 0.4), rel=0.05)


@quick
@given(masks(), st.data(), dtypes, discounts)
def test_returns_to_go_equal_the_oracle(mask, data, dtype, gamma):
    rewards = data.draw(numbers(mask.shape, 100.0, dtype))
    result = returns_to_go(poison(rewards, mask), mask, gamma)
    expected = oracle.returns_to_go(rewards.tolist(), mask.tolist(), gamma)
    assert_close(result, expected, scale=rewards.abs().sum().item())


@quick
@given(masks(), st.data(), dtypes, st.booleans())
def test_whitening_equals_the_oracle(mask, data, dtype, shift):
    """PITFALL 7, PITFALL 8: NaN under the mask and spreads of 1e-6 give finite numbers."""
    x = data.draw(numbers(mask.shape, 100.0, dtype))
    result = whiten(poison(x, mask), mask, *moments(masked_sums(poison(x, mask), mask)), shift=shift)
    expected = oracle.whiten(x.tolist(), mask.tolist(), shift)
    # the standard deviation comes from sums of squares, whose rounding is relative to the largest entry
    _, std = oracle.moments(oracle.unmasked(x.tolist(), mask.tolist()))
    assert_close(result, expected, scale=x.abs().max().item() * (1 + 1 / max(std, 1e-3)))


@quick
@given(masks(), st.data(), dtypes)
def test_masked_sums_equal_the_oracle(mask, data, dtype):
    """PITFALL 7, PITFALL 11: masked NaN stays away, and float32 entries are added up in float64."""
    x = data.draw(numbers(mask.shape, 100.0, dtype))
    sums = masked_sums(poison(x, mask), mask)
    assert sums.dtype == torch.float64
    size = x.double().abs().sum().item()
    assert_close(sums, oracle.masked_sums(x.tolist(), mask.tolist()), scale=1e-3 * (size + size**2))


@quick
@given(masks(), st.data(), st.integers(1, 3))
def test_moments_from_any_split_are_those_of_the_whole(mask, data, parts):
    """PITFALL 9: ranks add their sums; statistics are of all tokens, not means of the ranks' statistics."""
    x = data.draw(numbers(mask.shape, 100.0, torch.float64))
    pieces = zip(x.tensor_split(parts), mask.tensor_split(parts), strict=True)
    result = moments(torch.stack([masked_sums(a, m) for a, m in pieces]).sum(0))
    expected = oracle.moments(oracle.unmasked(x.tolist(), mask.tolist()))
    # the square root magnifies the rounding of a difference of squares, 1e-16 of the largest square
    assert result == pytest.approx(expected, rel=1e-9, abs=1e-7 * x.abs().max().item() + 1e-300)


def test_nearly_equal_advantages_are_not_blown_up():
    """PITFALL 8: a spread of 1e-9 is noise; whitening keeps it below 1e-5."""
    x = 0.5 + 1e-9 * torch.arange(8, dtype=torch.float64).reshape(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert whiten(x, mask, *moments(masked_sums(x, mask))).abs().max() < 1e-5


def test_no_response_token_at_all_is_no_error():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), torch.nan)
    assert moments(masked_sums(x, nothing)) == (0.0, 0.0)
    assert (whiten(x, nothing, 0.0, 0.0) == 0).all()
    assert all((y == 0).all() for y in gae(x, x, nothing, 1.0, 0.95))


@quick
@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=6))
def test_running_moments_are_those_of_the_concatenation(batches):
    running = RunningMoments()
    for batch in batches:
        x = torch.tensor(batch, dtype=torch.float64)
        running.update(masked_sums(x, torch.ones_like(x, dtype=torch.bool)))
    everything = [x for batch in batches for x in batch]
    mean, std = oracle.moments(everything)
    size = max([abs(x) for x in everything], default=0.0)
    assert running.count == len(everything)
    assert running.mean == pytest.approx(mean, rel=1e-9, abs=1e-12 * size)
    if std > 1e-6 * size:
        assert running.std == pytest.approx(std, rel=1e-4 if std < 1e-3 * size else 1e-9)


def test_running_normalization_of_equal_scores_is_finite():
    """PITFALL 8: all scores equal so far: normalized to 0, not to NaN or 1e8."""
    running, scores = RunningMoments(), torch.full((4,), 0.7)
    running.update(masked_sums(scores, torch.ones(4, dtype=torch.bool)))
    assert running.normalize(scores).abs().max() < 1e-3
    assert RunningMoments().normalize(scores).tolist() == scores.tolist()
