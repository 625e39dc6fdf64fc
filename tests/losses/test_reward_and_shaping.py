"""The reward-model loss, and from scores to token rewards, against the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import (
    clip_scores,
    confidence_gaps,
    first_wrong,
    objective_loss,
    pairwise_reward_loss,
    penalize_missing_eos,
    shape_rewards,
    step_reward_loss,
)
from tests.losses.draw import assert_close, assert_metrics, dtypes, masks, numbers, poison, quick
from tests.oracles import losses as oracle


@quick
@given(st.integers(1, 6), st.data(), dtypes, st.booleans(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.01]))
def test_pairwise_loss_equals_the_oracle(batch, data, dtype, with_margin, smoothing, centering):
    """PITFALL 10: rewards of +-100 give a finite loss and gradient."""
    chosen, rejected = (data.draw(numbers((batch,), 100.0, dtype)) for _ in range(2))
    margin = data.draw(numbers((batch,), 3.0, dtype)).abs() if with_margin else None
    leaf = chosen.clone().requires_grad_()
    options = dict(label_smoothing=smoothing, centering=centering)
    loss, metrics = pairwise_reward_loss(leaf, rejected, 3.0, margin=margin, **options)
    margins = None if margin is None else margin.tolist()
    expected, expected_metrics = oracle.pairwise_reward_loss(
        chosen.tolist(), rejected.tolist(), 3.0, margin=margins, **options
    )
    # rewards are subtracted: errors are relative to their size, not to that of the difference
    scale = (chosen.abs() + rejected.abs()).sum().item() * (1 + (0 if margin is None else margin.sum().item()))
    assert_close(loss, expected, scale)
    assert_metrics(metrics, expected_metrics, scale)
    loss.backward()
    assert leaf.grad.isfinite().all()


@quick
@given(st.integers(1, 6), st.data(), dtypes, st.floats(1.01, 20.0), st.sampled_from([0.0, 0.1]))
def test_pairwise_loss_with_ties_equals_the_oracle(batch, data, dtype, theta, smoothing):
    chosen, rejected = (data.draw(numbers((batch,), 100.0, dtype)) for _ in range(2))
    margin = data.draw(numbers((batch,), 3.0, dtype)).abs()
    tie = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    leaf, options = chosen.clone().requires_grad_(), dict(label_smoothing=smoothing, tie_theta=theta)
    loss, metrics = pairwise_reward_loss(leaf, rejected, 3.0, margin=margin, tie=tie, **options)
    given = [x.tolist() for x in (chosen, rejected)]
    expected, expected_metrics = oracle.pairwise_reward_loss(
        *given, 3.0, margin=margin.tolist(), tie=tie.tolist(), **options
    )
    scale = (chosen.abs() + rejected.abs() + 10).sum().item() * (1 + margin.sum().item())
    assert_close(loss, expected, scale)
    assert_metrics(metrics, expected_metrics, scale)
    loss.backward()
    assert leaf.grad.isfinite().all()


@given(st.floats(-30, 30), st.floats(1.01, 20.0))
def test_a_win_a_loss_and_a_tie_have_all_the_probability(difference, theta):
    """Rao and Kupper (1967); between equal rewards a tie has (theta - 1) / (theta + 1)."""
    good, bad = torch.tensor([difference, 0.0, difference]).double(), torch.tensor([0.0, difference, 0.0]).double()
    tie = torch.tensor([False, False, True])
    parts = [slice(i, i + 1) for i in range(3)]
    losses = [pairwise_reward_loss(good[i], bad[i], 1, tie=tie[i], tie_theta=theta)[0].item() for i in parts]
    assert math.fsum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, abs=1e-12)
    equal = pairwise_reward_loss(torch.zeros(1).double(), torch.zeros(1), 1, tie=tie[2:], tie_theta=theta)[0].item()
    assert math.exp(-equal) == pytest.approx((theta - 1) / (theta + 1))


def test_the_best_difference_of_a_tie_is_none():
    chosen = torch.tensor([2.0, -0.5], requires_grad=True)
    loss, metrics = pairwise_reward_loss(chosen, torch.zeros(2), 2, tie=torch.tensor([True, True]), tie_theta=3.0)
    loss.backward()
    assert chosen.grad[0] > 0 > chosen.grad[1] and float(metrics["accuracy"]) == 0.5


def test_a_hopeless_pair_costs_its_margin_and_not_infinity():
    """PITFALL 10: log(1 + exp(-x)) written out is inf at x = -100."""
    rejected = torch.tensor([200.0], requires_grad=True)
    loss, _ = pairwise_reward_loss(torch.tensor([-200.0]), rejected, 1)
    loss.backward()
    assert (loss.item(), rejected.grad.item()) == (400.0, 1.0)


OPTIONS = [{}, {"label_smoothing": 0.2}, {"centering": 0.1}]
OPTIONS += [{"tie": torch.tensor([True, False, True, False, False]), "tie_theta": 3.0, "label_smoothing": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pairwise_gradient_is_that_of_finite_differences(options):
    torch.manual_seed(0)
    chosen, rejected, margin = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda a, b: pairwise_reward_loss(a, b, 5, margin=margin.detach(), **options)[0], (chosen, rejected)
    )


def test_equal_rewards_are_half_right():
    one = torch.ones(4)
    loss, metrics = pairwise_reward_loss(one, one, 4)
    assert float(metrics["accuracy"]) == 0.5
    assert float(loss) == pytest.approx(math.log(2))


@quick
@given(masks(), st.data(), dtypes, st.sampled_from([0.0, 0.05, 2.0]))
def test_shaped_rewards_equal_the_oracle(mask, data, dtype, coefficient):
    """PITFALL 1: the score falls on the last response token only. PITFALL 7: masked NaN stays away."""
    kl = data.draw(numbers(mask.shape, 50.0, dtype))
    scores = data.draw(numbers(mask.shape[:1], 100.0, dtype))
    result = shape_rewards(scores, poison(kl, mask), mask, coefficient)
    expected = oracle.shape_rewards(scores.tolist(), kl.tolist(), mask.tolist(), coefficient)
    assert_close(result, expected, scale=(scores.abs().max() + kl.abs().max()).item())


def test_the_score_falls_on_the_last_response_token_of_short_and_empty_responses():
    """PITFALL 1, PITFALL 5: never on every token, never on padding, and a row without a response gets nothing."""
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    rewards = shape_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 4), mask, 0.1)
    assert (rewards + 0.0).tolist() == [[0, 0, 0, 1], [0, 0, 2, 0], [0, 3, 0, 0], [0, 0, 0, 0]]


@quick
@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=6), st.sampled_from([None, 1.5]))
def test_missing_eos_penalty_equals_the_oracle(rows, penalty):
    scores, finished = map(list, zip(*rows, strict=True))
    result = penalize_missing_eos(torch.tensor(scores, dtype=torch.float64), torch.tensor(finished), penalty)
    assert result.tolist() == oracle.penalize_missing_eos(scores, finished, penalty)


@quick
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.sampled_from([None, 0.0, 1.5, 1e-6]))
def test_clipped_scores_equal_the_oracle(scores, limit):
    result = clip_scores(torch.tensor(scores, dtype=torch.float64), limit)
    assert result.tolist() == oracle.clip_scores(scores, limit)


def test_scores_are_clipped_on_both_sides():
    scores = torch.tensor([-100.0, -0.5, 0.0, 100.0])
    assert clip_scores(scores, 2.0).tolist() == [-2.0, -0.5, 0.0, 2.0]
    assert clip_scores(scores, None) is scores


@quick
@given(masks(), st.data(), dtypes, st.booleans())
def test_step_loss_equals_the_oracle(mask, data, dtype, hard):
    """PITFALL 10: logits of +-100 give a finite loss and gradient; what stands at other tokens counts for nothing."""
    logits, labels = data.draw(numbers(mask.shape, 100.0, dtype)), data.draw(numbers(mask.shape, 1.0, dtype)).abs()
    labels = labels.round() if hard else labels
    leaf = poison(logits, mask).requires_grad_()
    loss, metrics = step_reward_loss(leaf, poison(labels, mask), mask, 3.0)
    expected, expected_metrics = oracle.step_reward_loss(logits.tolist(), labels.tolist(), mask.tolist(), 3.0)
    scale = 100.0 * float(mask.sum())
    assert_close(loss, expected, scale)
    assert_metrics(metrics, expected_metrics, scale)
    loss.backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[~mask] == 0).all()


def test_the_gradient_of_a_step_is_the_probability_less_the_label():
    logits = torch.tensor([[0.3, -2.0, 4.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, 0.25, 0.0]], dtype=torch.float64)
    step_reward_loss(logits, labels, torch.tensor([[True, True, False]]), 2)[0].backward()
    expected = (logits.detach().sigmoid() - labels) / 2
    torch.testing.assert_close(logits.grad[0, :2], expected[0, :2])


@quick
@given(masks(), st.data())
def test_the_first_wrong_step_is_the_oracles(mask, data):
    is_right = data.draw(numbers(mask.shape, 1.0, torch.float64)) > 0
    assert first_wrong(is_right, mask).tolist() == oracle.first_wrong(is_right.tolist(), mask.tolist())


@quick
@given(st.lists(st.floats(-30, 30), max_size=12), st.sampled_from([1.0, 1.5, 4.0]))
def test_confidence_gaps_are_the_oracles(differences, tie_theta):
    found = confidence_gaps(torch.tensor(differences, dtype=torch.float64), tie_theta)
    expected = oracle.confidence_gaps(differences, tie_theta)
    # a confidence on the edge of two bins may fall into either
    at_edges = any(abs(20 * (c - 0.5) - round(20 * (c - 0.5))) < 1e-9 for c in confidences(differences, tie_theta))
    if not at_edges:
        assert [gap.item() for gap in found.values()] == pytest.approx(expected, abs=1e-9)
    assert sum(gap.item() for gap in found.values()) == pytest.approx(sum(expected), abs=1e-9)


def confidences(differences, tie_theta) -> list[float]:
    """Of each difference but 0, whose confidence is one half in both."""
    ends = [abs(difference) for difference in differences if difference]
    wins = [1 / (1 + tie_theta * math.exp(-end)) for end in ends]
    loses = [math.exp(-end) / (math.exp(-end) + tie_theta) for end in ends]
    return [w / (w + lost) for w, lost in zip(wins, loses, strict=True)]


def test_rewards_that_are_right_as_often_as_they_say_have_no_gap():
    """sigmoid(log 3) is 0.75; three of four such pairs are right."""
    differences = torch.tensor([3.0, 3.0, 3.0, 1 / 3], dtype=torch.float64).log()
    assert sum(gap.abs().item() for gap in confidence_gaps(differences).values()) == pytest.approx(0, abs=1e-12)
    overconfident = torch.full((4,), 9.0) * torch.tensor([1, -1, 1, -1])
    assert sum(gap.abs().item() for gap in confidence_gaps(overconfident).values()) / 4 == pytest.approx(0.5, abs=1e-3)


@quick
@given(masks(), st.data(), dtypes)
def test_the_loss_of_objectives_equals_the_oracle(mask, data, dtype):
    """Scores that a response lacks count for nothing, whatever stands in their place."""
    predictions, scores = (data.draw(numbers(mask.shape, 100.0, dtype)) for _ in range(2))
    leaf = poison(predictions, mask).requires_grad_()
    loss, metrics = objective_loss(leaf, poison(scores, mask), mask, 3.0)
    expected, expected_metrics = oracle.objective_loss(predictions.tolist(), scores.tolist(), mask.tolist(), 3.0)
    scale = 4e4 * float(mask.sum())
    assert_close(loss, expected, scale)
    assert_metrics(metrics, expected_metrics, scale)
    loss.backward()
    assert leaf.grad.isfinite().all() and (leaf.grad[~mask] == 0).all()


def test_the_gradient_of_an_objective_is_twice_the_error():
    predictions = torch.tensor([[0.3, -2.0], [4.0, 1.0]], dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[1.0, torch.nan], [0.0, 3.5]], dtype=torch.float64)
    objective_loss(predictions, scores, ~scores.isnan(), 3)[0].backward()
    expected = torch.tensor([[-0.7, 0.0], [4.0, -2.5]], dtype=torch.float64) * 2 / 3
    torch.testing.assert_close(predictions.grad, expected)
