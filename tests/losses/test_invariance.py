"""What must not change a loss: padding, the order of rows, the split into micro-batches, the input's precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

from coati.losses import (
    aggregation_weights,
    cross_entropy,
    distillation_loss,
    expected_scores,
    gae,
    observation_loss,
    pairwise_reward_loss,
    policy_loss,
    shape_rewards,
    step_reward_loss,
    value_loss,
)
from tests.losses.draw import masks, quick

# name: number of per-token arguments, and the loss as a function of them
LOSSES = {
    "cross_entropy": (1, lambda x, mask, n: cross_entropy(x[0], mask, n)),
    "distillation": (1, lambda x, mask, n: distillation_loss(x[0], mask, n)),
    "policy": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, dual_clip=3.0)),
    "gspo": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, kind="gspo")),
    "cispo": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, kind="cispo", weights=lengths(mask, n))),
    "sapo": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, kind="sapo", weights=lengths(mask, n))),
    "score centering": (3, lambda x, mask, n: policy_loss(*x, mask, n, kind="cispo", centering=centering(x, mask))),
    "dppo": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, kind="dppo", weights=lengths(mask, n))),
    "vespo": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, kind="vespo", weights=lengths(mask, n))),
    "dis": (3, lambda x, mask, n: policy_loss(x[0], x[1], x[2], mask, n, kind="dis", weights=lengths(mask, n))),
    "dft": (1, lambda x, mask, n: cross_entropy(x[0], mask, n, kind="dft")),
    "observation": (1, lambda x, mask, n: observation_loss(x[0], mask, n)),
    "steps": (2, lambda x, mask, n: step_reward_loss(x[0], x[1] > 0, mask, n)),
    "value": (3, lambda x, mask, n: value_loss(x[0], x[1], x[2], mask, n)),
}
names = st.sampled_from(sorted(LOSSES))


def centering(x, mask):
    """With heads of two tokens."""
    heads = [torch.stack([-2 * a.abs(), -4 * a.abs()], -1) for a in x[:2]]
    return expected_scores(*heads, mask, clip_low=0.2, clip_high=0.2)


def lengths(mask, tokens):
    """Each response weighs the same, as in GRPO."""
    return aggregation_weights(mask, "sequence", tokens, 3, 9)


def arguments(name, mask, dtype=torch.float64):
    generator = torch.Generator().manual_seed(mask.numel())
    return [torch.randn(mask.shape, generator=generator, dtype=dtype) for _ in range(LOSSES[name][0])]


def assert_same(result, expected):
    """Loss and every metric."""
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def added(results):
    """Shares of micro-batches or ranks added up."""
    losses, metrics = zip(*results, strict=True)
    return sum(losses), {name: sum(m[name] for m in metrics) for name in metrics[0]}


@quick
@given(names, masks(), st.integers(0, 3), st.integers(0, 3))
def test_losses_are_unchanged_by_padding_on_either_side(name, mask, left, right):
    """PITFALL 2, PITFALL 7: padding may hold NaN."""
    loss, x = LOSSES[name][1], arguments(name, mask)
    padded = [pad(a, (left, right), value=torch.nan) for a in x]
    assert_same(loss(padded, pad(mask, (left, right)), 7), loss(x, mask, 7))


@quick
@given(names, masks(), st.randoms(use_true_random=False))
def test_losses_are_unchanged_by_the_order_of_rows(name, mask, random):
    loss, x = LOSSES[name][1], arguments(name, mask)
    order = list(range(len(mask)))
    random.shuffle(order)
    assert_same(loss([a[order] for a in x], mask[order], 7), loss(x, mask, 7))


@quick
@given(names, masks(), st.integers(1, 4))
def test_micro_batches_add_up_to_the_whole(name, mask, parts):
    """PITFALL 9: with a global denominator, shares sum to the loss however the rows are split."""
    loss, x = LOSSES[name][1], arguments(name, mask)
    n = mask.sum().clamp(min=1)
    splits = [[a.tensor_split(parts)[i] for a in x] for i in range(parts)]
    shares = [loss(s, m, n) for s, m in zip(splits, mask.tensor_split(parts), strict=True)]
    assert_same(added(shares), loss(x, mask, n))


@quick
@given(st.integers(1, 7), st.integers(1, 4))
def test_micro_batches_of_pairs_add_up_to_the_whole(pairs, parts):
    """PITFALL 9, for the reward model."""
    chosen, rejected = torch.randn(2, pairs, generator=torch.Generator().manual_seed(pairs), dtype=torch.float64)
    tie, options = torch.arange(pairs) % 3 == 1, dict(centering=0.01, tie_theta=2.0)
    splits = zip(*(x.tensor_split(parts) for x in (chosen, rejected, tie)), strict=True)
    shares = [pairwise_reward_loss(a, b, pairs, tie=c, **options) for a, b, c in splits]
    assert_same(added(shares), pairwise_reward_loss(chosen, rejected, pairs, tie=tie, **options))


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch():
    """PITFALL 9: the gradient too, with one target token in one micro-batch and five in the other."""
    mask = torch.tensor([[False] * 5 + [True], [False] + [True] * 5])
    whole = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cross_entropy(whole, mask, 6)[0].backward()
    split = whole.detach().clone().requires_grad_()
    for row in range(2):
        cross_entropy(split[row : row + 1], mask[row : row + 1], 6)[0].backward()
    assert torch.equal(split.grad, whole.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_half_precision_arguments_are_computed_in_float32(name, dtype):
    """PITFALL 11: metrics in float32 whatever the model's precision."""
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.7
    x = arguments(name, mask, dtype)
    loss, metrics = LOSSES[name][1](x, mask, 7)
    assert {a.dtype for a in [loss, *metrics.values()]} == {torch.float32}
    expected, expected_metrics = LOSSES[name][1]([a.float() for a in x], mask, 7)
    assert torch.equal(loss, expected)
    assert all(torch.equal(metrics[key], expected_metrics[key]) for key in expected_metrics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_rewards_survive_half_precision(dtype):
    """PITFALL 11: 70000 is inf in float16; sums of 16-bit rewards go beyond it."""
    rewards = torch.full((2, 3), 60000.0, dtype=dtype)
    mask = torch.ones(2, 3, dtype=torch.bool)
    advantages, returns = gae(torch.zeros_like(rewards), rewards, mask, 1.0, 1.0)
    assert advantages.dtype == returns.dtype == torch.float32
    assert returns[0].tolist() == [3 * rewards[0, 0].item(), 2 * rewards[0, 0].item(), rewards[0, 0].item()]
    _, metrics = pairwise_reward_loss(rewards[:, 0], -rewards[:, 0], 1)
    assert metrics["margin"].item() == 4 * rewards[0, 0].item()
    assert shape_rewards(rewards[:, 0], rewards, mask, 1.0).dtype == torch.float32
