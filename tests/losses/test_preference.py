"""The preference losses against the oracle and TRL's own values, and what must not change them."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import kto_loss, preference_loss
from coati.losses.preference import PREFERENCE_LOSSES, Options, Responses
from tests.losses.draw import assert_close, assert_metrics, dtypes, numbers, quick
from tests.losses.test_invariance import added, assert_same
from tests.oracles import preference as oracle

names = st.sampled_from(sorted(PREFERENCE_LOSSES))
TRL = json.loads(Path(__file__).with_name("trl_preference.json").read_text())
NORMALIZABLE = ("dpo", "robust-dpo", "hinge", "cpo")


@st.composite
def responses(draw, count, dtype, limit=60.0):
    """Log-probs down to -limit, some of them 0, responses without a token among them."""
    log_probs, reference = (-draw(numbers((count,), limit, dtype)).abs() for _ in range(2))
    lengths = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    return Responses(log_probs, lengths, reference)


def rows(responses: Responses) -> list[tuple[float, int, float]]:
    columns = (responses.log_probs, responses.lengths, responses.reference)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def drawn(count: int, seed: int = 0, dtype=torch.float64) -> Responses:
    generator = torch.Generator().manual_seed(seed)
    log_probs, reference = -3 * torch.rand(2, count, dtype=torch.float64, generator=generator).to(dtype)
    return Responses(log_probs, torch.randint(1, 9, (count,), generator=generator), reference)


def part(responses: Responses, which) -> Responses:
    return Responses(*(x[which] for x in (responses.log_probs, responses.lengths, responses.reference)))


# --- the oracle


@quick
@given(names, st.data(), dtypes, st.sampled_from([0.05, 1.0, 2.5]), st.sampled_from([0.0, 0.1]), st.booleans())
def test_every_loss_equals_the_oracle(name, data, dtype, beta, smoothing, normalized):
    """PITFALL 10: log-ratios of 60 give finite losses and gradients."""
    count = data.draw(st.integers(1, 5))
    chosen, rejected = (data.draw(responses(count, dtype)) for _ in range(2))
    normalized, gamma, nll = normalized and name in NORMALIZABLE, 0.5, data.draw(st.sampled_from([0.0, 0.7]))
    leaf = chosen.log_probs.clone().requires_grad_()
    how = dict(options=Options(beta, smoothing, gamma), nll_coefficient=nll, length_normalized=normalized)
    loss, metrics = preference_loss(name, Responses(leaf, chosen.lengths, chosen.reference), rejected, 3.0, **how)
    expected, expected_metrics = oracle.preference_loss(
        name, rows(chosen), rows(rejected), 3.0, beta, smoothing, gamma, nll, normalized, str(dtype).split(".")[1]
    )
    size = 1 + sum(sum(x.abs().sum().item() for x in (a.log_probs, a.reference)) for a in (chosen, rejected))
    # IPO squares differences, and its target is 1 / (2 beta)
    scale = size + (size + 1 / beta) ** 2 if name == "ipo" else size * (1 + beta)
    if name == "orpo" and dtype == torch.float32:
        scale *= 100  # the odds of a probability near 1 have few digits
    assert_close(loss, expected, scale)
    rewards_differ = abs(expected_metrics["margin"]) > 1e-4 * scale
    if not rewards_differ:  # which of two equal rewards is larger is rounding
        expected_metrics["accuracy"] = metrics["accuracy"]
    assert_metrics(metrics, expected_metrics, scale)
    loss.backward()
    assert leaf.grad.isfinite().all()


@quick
@given(st.data(), dtypes, st.sampled_from([0.05, 1.0]), st.floats(-5, 5), st.sampled_from([(1.0, 1.0), (1.5, 0.5)]))
def test_kto_equals_the_oracle(data, dtype, beta, kl, weights):
    count = data.draw(st.integers(1, 6))
    drawn = data.draw(responses(count, dtype))
    good = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    how = dict(desirable_weight=weights[0], undesirable_weight=weights[1])
    loss, metrics = kto_loss(drawn, torch.tensor(good), torch.tensor(kl, dtype=dtype), 3.0, beta=beta, **how)
    expected, expected_metrics = oracle.kto_loss(
        rows(drawn), good, torch.tensor(kl, dtype=dtype).item(), 3.0, beta, *weights
    )
    scale = 1 + sum(x.abs().sum().item() for x in (drawn.log_probs, drawn.reference)) * (1 + beta)
    assert_close(loss, expected, scale)
    assert_metrics(metrics, expected_metrics, scale)


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_gradients_of_all_answers_are_those_of_finite_differences(name):
    fixed = [drawn(5, seed) for seed in (1, 2)]
    leaves = [a.log_probs.clone().requires_grad_() for a in fixed]

    def loss(*log_probs):
        sides = [Responses(x, a.lengths, a.reference) for x, a in zip(log_probs, fixed, strict=True)]
        return preference_loss(name, *sides, 5, options=Options(0.7, 0.1, 0.3), nll_coefficient=0.5)[0]

    assert torch.autograd.gradcheck(loss, leaves)


# --- TRL's own values


def of_case(case: dict) -> list[Responses]:
    tensors = [torch.tensor(case[name], dtype=torch.float64) for name in ("log_probs", "lengths", "reference")]
    return [Responses(*halves) for halves in zip(*(x.chunk(2) for x in tensors), strict=True)]


@pytest.mark.parametrize("number", range(len(TRL["cases"])))
def test_each_loss_is_trls_on_the_same_answers(number):
    """The values were made by TRL 1.16's own methods: make_trl_preference.py."""
    case = TRL["cases"][number]
    options = Options(case["beta"], case["label_smoothing"], case["gamma"])
    plain, sides, count = Options(case["beta"]), of_case(case), len(case["lengths"]) // 2
    assert {*PREFERENCE_LOSSES, "kto"} - case["losses"].keys() <= {"dpo"}
    for name, theirs in case["losses"].items():
        match name:
            case "kto":
                whole = [torch.cat([getattr(a, n) for a in sides]) for n in ("log_probs", "lengths", "reference")]
                kl = torch.tensor(case["mixed_log_ratios"], dtype=torch.float64).mean()
                assert max(kl.item(), 0.0) == pytest.approx(case["kl"], abs=1e-9)
                good = torch.tensor(case["desirable"])
                how = dict(beta=case["beta"], undesirable_weight=1.5)
                ours, _ = kto_loss(Responses(*whole), good, kl, 2 * count, **how)
            case "rpo":
                ours, _ = preference_loss("dpo", *sides, count, options=plain, nll_coefficient=0.7)
            case "dpo, length_normalized":
                ours, _ = preference_loss("dpo", *sides, count, options=plain, length_normalized=True)
            case "orpo":  # TRL computes it in float32
                ours, _ = preference_loss(name, *sides, count, options=options)
            case _:
                ours, _ = preference_loss(name, *sides, count, options=options)
        assert ours.item() == pytest.approx(theirs, rel=1e-6, abs=1e-6), name


def test_the_values_are_of_the_version_that_is_named():
    assert TRL["trl"] == "1.16.0" and TRL["trl"] in TRL["origin"] and len(TRL["cases"]) == 3


# --- what must not change a loss, and its edges


@quick
@given(names, st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False))
def test_micro_batches_in_any_order_add_up_to_the_whole(name, count, parts, random):
    """PITFALL 9."""
    chosen, rejected = drawn(count, 1), drawn(count, 2)
    order = list(range(count))
    random.shuffle(order)
    pieces = [x for x in torch.tensor(order).tensor_split(parts) if len(x)]
    how = dict(options=Options(0.5, 0.1, 0.3), nll_coefficient=0.2)
    shares = [preference_loss(name, part(chosen, i), part(rejected, i), count, **how) for i in pieces]
    assert_same(added(shares), preference_loss(name, chosen, rejected, count, **how))


@quick
@given(st.integers(1, 7), st.integers(1, 4))
def test_micro_batches_of_single_answers_add_up_to_the_whole(count, parts):
    """PITFALL 9: the KL is the global batch's, whatever the cut."""
    whole, good, kl = drawn(count), torch.arange(count) % 3 != 0, torch.tensor(0.7, dtype=torch.float64)
    pieces = [x for x in torch.arange(count).tensor_split(parts) if len(x)]
    shares = [kto_loss(part(whole, i), good[i], kl, count, desirable_weight=1.3) for i in pieces]
    assert_same(added(shares), kto_loss(whole, good, kl, count, desirable_weight=1.3))


@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_tied_pairs_are_half_right_and_have_the_loss_of_no_margin(name):
    same = drawn(4)
    loss, metrics = preference_loss(name, same, same, 4, options=Options(beta=0.5, gamma=0.3))
    assert (metrics["accuracy"].item(), metrics["margin"].item()) == (0.5, 0.0)
    expected = {"hinge": 1.0, "ipo": 1.0, "simpo": math.log1p(math.exp(0.3)), "orpo": 0.5 * math.log(2)}
    assert loss.item() == pytest.approx(expected.get(name, math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [0.0, -1e-9, 1e-7])
def test_orpo_is_finite_where_the_model_is_sure(chosen, dtype):
    """Odds of a probability of 1 are infinite. TRL's gradient is NaN from -1e-8 on in float32, its loss above 0."""
    sure = torch.tensor([chosen, -30.0], dtype=dtype, requires_grad=True)
    other = torch.tensor([-30.0, chosen], dtype=dtype, requires_grad=True)
    lengths = torch.tensor([3, 3])
    loss, metrics = preference_loss("orpo", Responses(sure, lengths), Responses(other, lengths), 2)
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, sure.grad, other.grad, *metrics.values()))
    assert metrics["accuracy"] == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(PREFERENCE_LOSSES))
def test_half_precision_sums_are_computed_in_float32(name, dtype):
    """PITFALL 11."""
    sides = [drawn(4, seed, dtype) for seed in (1, 2)]
    loss, metrics = preference_loss(name, *sides, 4, nll_coefficient=1.0)
    expected, _ = preference_loss(name, *(a.in_float() for a in sides), 4, nll_coefficient=1.0)
    assert {x.dtype for x in (loss, *metrics.values())} == {torch.float32} and torch.equal(loss, expected)


def test_robust_is_unbiased_when_labels_are_flipped():
    """Chowdhury et al.: its mean over labels flipped with probability e is the clean loss."""
    chosen, rejected, e = drawn(5, 1), drawn(5, 2), 0.3
    clean, _ = preference_loss("dpo", chosen, rejected, 5)
    right, wrong = (
        preference_loss("robust-dpo", *sides, 5, options=Options(label_smoothing=e))[0]
        for sides in ((chosen, rejected), (rejected, chosen))
    )
    assert ((1 - e) * right + e * wrong).item() == pytest.approx(clean.item())


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_losses_without_a_reference_read_none(name):
    """PITFALL 29."""
    chosen, rejected = drawn(3, 1), drawn(3, 2)
    without = [Responses(a.log_probs, a.lengths) for a in (chosen, rejected)]
    assert_same(preference_loss(name, *without, 3), preference_loss(name, chosen, rejected, 3))


@pytest.mark.parametrize("name", ["dpo", "robust-dpo", "hinge", "ipo"])
def test_losses_with_a_reference_miss_it(name):
    alone = Responses(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="reference"):
        preference_loss(name, alone, alone, 2)


def test_a_negative_kl_counts_as_none_and_has_no_gradient():
    responses, good = drawn(4), torch.tensor([True, False, True, False])
    for kl, same in ((-3.0, 0.0), (2.0, 2.0)):
        leaf = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
        assert_same(kto_loss(responses, good, leaf, 4), kto_loss(responses, good, torch.tensor(same), 4))
    assert not kto_loss(responses, good, leaf, 4)[0].requires_grad
