"""PPO's two losses and the KL against the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import adapt_kl_coefficient, bounded_values, kl_divergence, policy_loss, value_loss
from tests.losses.draw import assert_close, assert_metrics, dtypes, masks, numbers, poison, quick
from tests.oracles import losses as oracle

clips = st.fixed_dictionaries(
    {
        "clip_low": st.sampled_from([0.2, 0.05, 1.0]),
        "clip_high": st.sampled_from([0.2, 0.28, 3.0]),
        "dual_clip": st.sampled_from([None, 3.0, 1.5]),
        "kind": st.sampled_from(["clip", "gspo", "cispo", "sapo", "dppo", "vespo", "dis", "none"]),
        "gates": st.sampled_from([(1.0, 1.05), (3.0, 0.5)]),
        "powers": st.sampled_from([(2.0, 3.0), (1.0, 0.5)]),
        "decays": st.sampled_from([(3.0, 2.0), (0.5, 1.5)]),
    }
)


def size_of_terms(function, mask, *rest):
    """The sum of the absolute values of every token's own metrics: what rounding errors are measured against."""
    tokens = [(b, t) for b, row in enumerate(mask) for t, counts in enumerate(row) if counts]
    alone = [[[(b, t) == token for t in range(len(row))] for b, row in enumerate(mask)] for token in tokens]
    return math.fsum(abs(v) for m in alone for v in function(m, *rest)[1].values())


def policy_case(data, mask, dtype):
    """Old log-probs, new ones up to 50 nats away, advantages up to 100."""
    old = -data.draw(numbers(mask.shape, 50.0, dtype)).abs()
    log_probs = old + data.draw(numbers(mask.shape, 50.0, dtype))
    return log_probs, old, data.draw(numbers(mask.shape, 100.0, dtype))


@quick
@given(masks(), st.data(), dtypes, clips, st.booleans())
def test_policy_loss_equals_the_oracle(mask, data, dtype, options, weighted):
    """PITFALL 7: masked entries are NaN and infinities in every argument."""
    case = policy_case(data, mask, dtype)
    weights = data.draw(numbers(mask.shape, 2.0, dtype)).abs()
    log_probs, old, advantages = (poison(x, mask) for x in case)
    log_probs.requires_grad_()
    centering = data.draw(numbers(mask.shape, 2.0, dtype))
    given_weights = dict(weights=poison(weights, mask), centering=poison(centering, mask)) if weighted else {}
    loss, metrics = policy_loss(log_probs, old, advantages, mask, 5.0, **options, **given_weights)
    lists = [x.tolist() for x in case]
    whole = dict(weights=weights.tolist(), centering=centering.tolist()) if weighted else {}
    expected, expected_metrics = oracle.policy_loss(*lists, mask.tolist(), 5.0, **options, **whole)
    # a difference of log-probs near 50 is itself rounded, which the exponential magnifies by the difference
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    scale = size_of_terms(lambda m: oracle.policy_loss(*lists, m, 5.0, **options, **whole), mask.tolist())
    if options["kind"] == "gspo" and mask.any():  # a token alone has another ratio; a response's is at most its largest
        scale += 200 * mask.sum().item() * math.exp(min((case[0] - case[1])[mask].max().item(), 60.0))
    assert_close(loss, expected, scale, rtol)
    assert_metrics(metrics, expected_metrics, scale, rtol)
    loss.backward()
    assert log_probs.grad.isfinite().all()
    assert (log_probs.grad[~mask] == 0).all()


@pytest.mark.parametrize(
    ("kind", "dual_clip"), [("clip", None), ("clip", 3.0), ("gspo", None), ("none", None), ("sapo", None)]
)
def test_policy_gradient_is_that_of_finite_differences_away_from_the_corners(kind, dual_clip):
    torch.manual_seed(0)
    mask = torch.rand(3, 8) < 0.7
    old, advantages = -torch.rand(3, 8, dtype=torch.float64) * 5, torch.randn(3, 8, dtype=torch.float64)
    shifts = torch.tensor([0.0, 0.1, -0.1, 0.6, -0.6, 2.0, 0.05, -2.0], dtype=torch.float64)
    log_probs = (old + shifts).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, mask, 9, kind=kind, dual_clip=dual_clip)[0], log_probs
    )


def test_every_token_keeps_a_gradient_in_cispo():
    """Of its own log-prob times a constant: the advantage and the clipped ratio."""
    log_probs = torch.tensor([[0.5, -0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 3, dtype=torch.float64)
    policy_loss(log_probs, 0 * one, -2 * one, one.bool(), 3, kind="cispo")[0].backward()
    expected = torch.tensor([[1.2, 0.8, math.exp(0.1)]], dtype=torch.float64) * 2 / 3
    torch.testing.assert_close(log_probs.grad, expected)


def test_an_unknown_policy_loss_is_named():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"'ppo9'.*clip, gspo, cispo, sapo, dppo, vespo, dis or none"):
        policy_loss(one, one, one, one.bool(), 1, kind="ppo9")


@pytest.mark.parametrize("kind", ["clip", "cispo", "sapo", "dppo", "dis", "none"])
def test_policy_gradient_at_ratio_one_is_the_policy_gradient(kind):
    """On fresh data the gradient is REINFORCE's: -A / N for each token's log-prob."""
    old = torch.tensor([[-1.0, -2.0, -3.0]])
    advantages, mask = torch.tensor([[2.0, -1.0, 9.0]]), torch.tensor([[True, True, False]])
    log_probs = old.clone().requires_grad_()
    loss, metrics = policy_loss(log_probs, old, advantages, mask, 2, kind=kind)
    loss.backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-1.0, 0.5, 0.0])
    value = {"cispo": 0.0, "sapo": -(2 * 2.0 - 2 / 1.05) / 2}.get(kind, -0.5)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {"policy_loss": value, "clip_fraction": 0.0, "ratio": 1.0, "approximate_kl": 0.0}
    )


@pytest.mark.parametrize(
    ("old", "new", "advantage", "learns"),
    [
        (0.2, 0.5, 1.0, False),  # good, and its probability rose by more than 0.15
        (0.01, 0.05, 1.0, True),  # five times as likely, and yet a small step
        (0.4, 0.1, -1.0, False),
        (0.4, 0.3, -1.0, True),
        (0.9, 0.2, 1.0, True),  # on its way back
        (0.2, 0.9, -1.0, True),
    ],
)
def test_dppo_bounds_probabilities_and_not_ratios(old, new, advantage, learns):
    log_probs = torch.tensor([[new]]).log().requires_grad_()
    one = torch.ones(1, 1)
    old_log_probs = torch.tensor([[old]]).log()
    bounds = dict(kind="dppo", clip_low=0.15, clip_high=0.15)
    loss, metrics = policy_loss(log_probs, old_log_probs, advantage * one, one.bool(), 1, **bounds)
    loss.backward()
    assert bool(log_probs.grad != 0) == learns == (metrics["clip_fraction"] == 0)


@pytest.mark.parametrize(("ratio", "learns"), [(0.69, False), (0.71, True), (1.0, True), (5.9, True), (6.1, False)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_dis_leaves_tokens_out_whichever_way_they_have_moved(ratio, learns, advantage):
    """Also those on their way back, which PPO's clipping keeps."""
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    how = dict(kind="dis", clip_low=0.3, clip_high=5.0)
    loss, metrics = policy_loss(log_probs, 0 * one, advantage * one, one.bool(), 1, **how)
    loss.backward()
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if learns else 0.0)
    assert metrics["clip_fraction"] == (not learns)


def test_the_gate_of_sapo_closes_on_both_sides():
    """Its slope is 1 where nothing has changed, and everywhere less elsewhere: sooner for a larger tau."""
    ratios = torch.tensor([0.2, 0.8, 1.0, 1.5, 4.0], dtype=torch.float64)[:, None].requires_grad_()
    zeros, one = torch.zeros(5, 1, dtype=torch.float64), torch.ones(5, 1, dtype=torch.float64)

    def slopes(*gates):
        loss, _ = policy_loss(ratios.log(), zeros, one, one.bool(), 1, kind="sapo", gates=gates)
        return -torch.autograd.grad(loss, ratios)[0][:, 0]

    soft, sharp = slopes(1.0, 9.0), slopes(3.0, 9.0)
    assert soft[2] == sharp[2] == pytest.approx(1.0)
    assert all(sharp[i] < soft[i] < 1 for i in (0, 1, 3, 4))
    assert soft[1] > soft[0] and soft[3] > soft[4]


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "dual_clip", "learns"),
    [
        (0.5, 1.0, None, False),  # good and already likelier: clipped
        (-0.5, 1.0, None, True),
        (-0.5, -1.0, None, False),  # bad and already less likely: clipped
        (0.5, -1.0, None, True),
        (2.0, -1.0, 3.0, False),  # bad and far likelier: the dual clip bounds it
        (1.0, -1.0, 3.0, True),
    ],
)
def test_which_tokens_learn(log_ratio, advantage, dual_clip, learns):
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    one = torch.ones(1, 1)
    policy_loss(log_probs, 0 * one, advantage * one, one.bool(), 1, dual_clip=dual_clip)[0].backward()
    assert bool(log_probs.grad != 0) == learns


@pytest.mark.parametrize("distance", [50.0, 500.0, 1e6])
def test_policies_far_apart_stay_finite(distance):
    """Log-ratios beyond float32's exponential are bounded, in the loss, its metrics and its gradient."""
    old = torch.tensor([[-distance, 0.0]])
    log_probs = torch.tensor([[0.0, -distance]], requires_grad=True)
    loss, metrics = policy_loss(log_probs, old, torch.tensor([[-1.0, -1.0]]), torch.ones(1, 2).bool(), 2)
    loss.backward()
    assert all(x.isfinite() for x in [loss, *metrics.values()])
    assert log_probs.grad.isfinite().all()
    for estimator in ("k1", "k2", "k3"):
        assert kl_divergence(log_probs, old, torch.ones(1, 2).bool(), estimator).isfinite().all()


@quick
@given(masks(), st.data(), dtypes, st.sampled_from([None, 0.2, 5.0]))
def test_value_loss_equals_the_oracle(mask, data, dtype, clip):
    """PITFALL 7: masked entries are NaN and infinities in every argument."""
    case = [data.draw(numbers(mask.shape, 100.0, dtype)) for _ in range(3)]
    values, old, returns = (poison(x, mask) for x in case)
    values.requires_grad_()
    loss, metrics = value_loss(values, old, returns, mask, 3.0, clip=clip)
    lists = [x.tolist() for x in case]
    expected, _ = oracle.value_loss(*lists, mask.tolist(), 3.0, clip)
    # values of a size are subtracted, so a square near 0 is known to some 1e-8 of that size squared
    largest = max(x.abs().max().item() for x in case) + (clip or 0.0)
    assert_close(loss, expected, scale=1e-3 * largest**2)
    assert torch.equal(metrics["value_loss"], loss.detach())
    loss.backward()
    assert values.grad.isfinite().all()
    assert (values.grad[~mask] == 0).all()


def test_value_clip_fraction_counts_the_clipped_tokens_only():
    """A value that moved less than `clip` is not clipped, though old + (new - old) may be new up to a rounding."""
    torch.manual_seed(0)
    old, values, returns = 0.05 * torch.randn(50, 20), 0.05 * torch.randn(50, 20), torch.randn(50, 20)
    mask = torch.rand(50, 20) < 0.8
    _, metrics = value_loss(values, old, returns, mask, mask.sum(), clip=0.2)
    _, expected = oracle.value_loss(values.tolist(), old.tolist(), returns.tolist(), mask.tolist(), int(mask.sum()))
    assert_metrics(metrics, expected, 1.0)


def test_value_gradient_is_that_of_finite_differences_away_from_the_corners():
    torch.manual_seed(0)
    old, returns = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    values = (old + torch.tensor([0.1, -0.1, 0.4, -0.4, 1.0, 0.0])).requires_grad_()
    mask = torch.rand(2, 6) < 0.8
    for clip in (None, 0.2):
        assert torch.autograd.gradcheck(lambda x, c=clip: value_loss(x, old, returns, mask, 5, clip=c)[0], values)


@quick
@given(masks(), st.data(), dtypes, st.sampled_from([(0.0, 1.0), (-1.0, 3.0), (-100.0, -99.0)]))
def test_bounded_values_equal_the_oracle_and_stay_in_range(mask, data, dtype, bounds):
    outputs = data.draw(numbers(mask.shape, 1e4, dtype)).requires_grad_()
    values = bounded_values(outputs, *bounds)
    assert_close(values, oracle.bounded_values(outputs.tolist(), *bounds), scale=max(map(abs, bounds)))
    assert (values >= bounds[0]).all() and (values <= bounds[1]).all()
    values.sum().backward()
    assert (outputs.grad > 0).all(), "a critic at the edge of its range must be able to come back"


@quick
@given(masks(), st.data(), dtypes, st.sampled_from(["k1", "k2", "k3"]))
def test_kl_equals_the_oracle(mask, data, dtype, estimator):
    """PITFALL 3: the sign is that of log p - log q, and padding counts as 0. PITFALL 7: masked NaN stays away."""
    log_probs, reference, _ = policy_case(data, mask, dtype)
    poisoned = poison(log_probs, mask).requires_grad_()
    result = kl_divergence(poisoned, poison(reference, mask), mask, estimator)
    expected = torch.tensor(
        oracle.kl_divergence(log_probs.tolist(), reference.tolist(), mask.tolist(), estimator), dtype=torch.float64
    )
    # k3 near 0 is the difference of nearly equal numbers, each of the size of the log-ratio
    x = torch.where(mask, (log_probs - reference).double(), 0.0).abs()
    error = (result.double() - expected).abs()
    assert (error <= (1e-9 if dtype == torch.float64 else 1e-5) * (expected.abs() + x)).all(), error
    result.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~mask] == 0).all()


def test_kl_estimates_have_the_right_expectation():
    """k1 and k3 are unbiased under the sampling policy, and k3 is never negative."""
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    mask, exact = torch.ones(1, 3, dtype=torch.bool), float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):
        estimate = kl_divergence(p.log()[None], q.log()[None], mask, estimator)
        assert float((p * estimate[0]).sum()) == pytest.approx(exact, rel=1e-12)
    assert (kl_divergence(p.log()[None], q.log()[None], mask, "k3") >= 0).all()


def test_an_unknown_kl_estimator_is_named():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"k9.*k1, k2 or k3"):
        kl_divergence(one, one, one.bool(), "k9")


@quick
@given(st.floats(1e-6, 10), st.floats(-100, 100), st.floats(1e-3, 100), st.floats(100, 1e6), st.integers(1, 100))
def test_adaptive_kl_coefficient_equals_the_oracle(coefficient, kl, target, horizon, samples):
    case = (coefficient, kl, target, horizon, samples)
    assert adapt_kl_coefficient(*case) == pytest.approx(oracle.adapt_kl_coefficient(*case), rel=1e-9)
