"""Credit for turns against the oracle, and what it has in common with that for responses and tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from coati.losses import gae, group_advantages, turn_advantages, turn_gae
from tests.losses.draw import assert_close, dtypes, masks, numbers, poison, quick
from tests.oracles import turns as oracle

discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@quick
@given(masks(), st.data(), dtypes, discounts)
def test_turn_advantages_equal_the_oracle(mask, data, dtype, discount):
    mask = torch.cat([mask, mask.flip(1)])  # groups of two at least
    size = data.draw(st.sampled_from([2, len(mask)]))
    # spreads of 1e-6 are rounding of single precision
    rewards = data.draw(numbers(mask.shape, 100.0, dtype)).round(decimals=2)
    found = turn_advantages(poison(rewards, mask), mask, size, discount)
    expected = oracle.turn_advantages(rewards.tolist(), mask.tolist(), size, discount)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(
        found.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


@quick
@given(masks(), st.data(), dtypes, discounts, discounts)
def test_turn_gae_equals_the_oracle(mask, data, dtype, gamma, lam):
    values, rewards = (data.draw(numbers(mask.shape, 100.0, dtype)) for _ in range(2))
    found = turn_gae(poison(values, mask), poison(rewards, mask), mask, gamma, lam)
    expected = oracle.turn_gae(values.tolist(), rewards.tolist(), mask.tolist(), gamma, lam)
    scale = (values.abs() + rewards.abs()).sum().item()
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, scale)


def test_one_turn_an_episode_is_grpo_and_turns_of_one_token_are_gae():
    torch.manual_seed(0)
    rewards = torch.randn(6, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]] * 2).bool()
    of_responses = group_advantages((rewards * mask).sum(1), 3, "grpo")
    torch.testing.assert_close(turn_advantages(rewards, mask, 3, 0.5), of_responses[:, None] * mask)
    values, alone = torch.randn(6, 5, dtype=torch.float64), torch.tensor([[1, 0, 1, 0, 1]] * 6).bool()
    for ours, theirs in zip(*(f(values, rewards, alone, 0.9, 0.8) for f in (turn_gae, gae)), strict=True):
        torch.testing.assert_close(ours, theirs)


@quick
@given(masks(), st.integers(0, 3), st.integers(0, 3), discounts)
def test_padding_and_other_groups_change_nothing(mask, left, right, discount):
    generator = torch.Generator().manual_seed(mask.numel())
    rewards, values = torch.randn(2, *mask.shape, generator=generator, dtype=torch.float64)
    size = len(mask)
    expected = turn_advantages(rewards, mask, size, discount)
    padded = [pad(x, (left, right), value=torch.nan) for x in (rewards, values)]
    wide = pad(mask, (left, right))
    inside = slice(left, left + mask.shape[1])
    assert torch.equal(turn_advantages(padded[0], wide, size, discount)[:, inside], expected)
    both = turn_advantages(torch.cat([rewards, values]), torch.cat([mask, ~mask]), size, discount)
    assert torch.equal(both[:size], expected)
    for ours, theirs in zip(
        turn_gae(padded[1], padded[0], wide, 0.9, 0.8), turn_gae(values, rewards, mask, 0.9, 0.8), strict=True
    ):
        assert torch.equal(ours[:, inside], theirs)


def test_each_turn_is_credited_with_what_came_of_it():
    """Two episodes that differ in their second turn: the first ones differ by what followed, if that counts."""
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0]]).bool()
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert turn_advantages(rewards, mask, 2, 0.0)[:, 0].tolist() == [0.0, 0.0]
    assert turn_advantages(rewards, mask, 2, 1.0)[0, 0] == pytest.approx(0.7071, abs=1e-3)
    assert turn_advantages(rewards, mask, 2, 0.0)[:, 2].tolist() == pytest.approx([0.7071, -0.7071], abs=1e-3)
