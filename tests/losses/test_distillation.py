"""Divergences of a student from a teacher against the oracle, TRL and each other."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import distillation_loss, vocabulary_divergence, without_first
from coati.losses.distillation import Divergence
from tests.losses.draw import assert_close, assert_metrics, dtypes, masks, numbers, poison, quick
from tests.oracles import distillation as oracle

KINDS = ("forward", "reverse", "jsd")
TRL = json.loads(Path(__file__).with_name("trl_distillation.json").read_text())
divergences = st.builds(
    Divergence,
    st.sampled_from(KINDS),
    beta=st.sampled_from([0.01, 0.3, 0.5, 0.9]),
    temperature=st.sampled_from([1.0, 0.5, 2.0]),
)


@st.composite
def both(draw):
    """Logits of student and teacher, `[positions, vocab]`, some of them -inf in both."""
    dtype, shape = draw(dtypes), (draw(st.integers(1, 5)), draw(st.integers(2, 7)))
    limit = draw(st.sampled_from([1.0, 50.0, 1000.0]))
    student, teacher = draw(numbers(shape, limit, dtype)), draw(numbers(shape, limit, dtype))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    banned = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    banned[:, 0] = False
    return student.masked_fill(banned, -torch.inf), teacher.masked_fill(banned, -torch.inf)


@quick
@given(both(), divergences)
def test_divergences_equal_the_oracle(logits, how):
    found = vocabulary_divergence(*logits, how)
    expected = oracle.vocabulary_divergence(
        *(x.tolist() for x in logits), how.kind, beta=how.beta, temperature=how.temperature
    )
    largest = max(x[x.isfinite()].abs().max().item() for x in logits)
    assert_close(found, expected, scale=1 + largest / how.temperature)


@quick
@given(both(), divergences)
def test_the_gradient_is_that_of_autograd(logits, how):
    """Ours is written by hand; a chain of torch's own operations has the same, wherever its own is no NaN."""
    student, teacher = (x.double().nan_to_num(neginf=-800.0).requires_grad_() for x in logits)
    vocabulary_divergence(student, teacher, how).sum().backward()
    found, student.grad = student.grad, None
    s, t = ((x / how.temperature).log_softmax(-1) for x in (student, teacher.detach()))
    mixture = (how.beta * t.exp() + (1 - how.beta) * s.exp()).clamp(min=1e-300).log()
    kl = lambda p, q: (p.exp() * (p - q)).sum()  # noqa: E731
    plain = {"forward": lambda: kl(t, s), "reverse": lambda: kl(s, t)}
    plain["jsd"] = lambda: how.beta * kl(t, mixture) + (1 - how.beta) * kl(s, mixture)
    plain[how.kind]().backward()
    torch.testing.assert_close(found, student.grad, rtol=1e-6, atol=1e-9 * (1 + student.detach().abs().max().item()))
    assert teacher.grad is None


@quick
@given(masks(), st.data(), dtypes)
def test_the_loss_equals_the_oracle_whatever_stands_under_the_mask(mask, data, dtype):
    """PITFALL 7."""
    x = poison(data.draw(numbers(mask.shape, 100.0, dtype)), mask).requires_grad_()
    loss, metrics = distillation_loss(x, mask, 7)
    size = x.detach()[mask].abs().sum().item()
    assert_close(loss, oracle.distillation_loss(x.tolist(), mask.tolist(), 7), scale=size)
    assert_metrics(metrics, {"loss": loss.item()}, size)
    loss.backward()
    assert (x.grad[~mask] == 0).all() and x.grad.isfinite().all()


@quick
@given(masks(), st.integers(0, 6))
def test_the_first_tokens_of_each_row_are_left_out(mask, count):
    assert without_first(mask, count).tolist() == oracle.without_first(mask.tolist(), count)


@quick
@given(both(), divergences)
def test_divergences_are_0_of_equal_models_and_never_negative(logits, how):
    student, teacher = (x.double() for x in logits)
    size = 1 + student[student.isfinite()].abs().max().item() / how.temperature
    assert vocabulary_divergence(student, student + 3.0, how).abs().max() < 1e-12 * size
    assert (vocabulary_divergence(student, teacher, how) > -1e-12 * size).all()


def test_jsd_goes_to_either_kl():
    """GKD, section 3: the limits of JSD / beta and of JSD / (1 - beta)."""
    logits = torch.randn(2, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind, beta, weight in (("forward", 1e-6, 1e-6), ("reverse", 1 - 1e-6, 1e-6)):
        found = vocabulary_divergence(*logits, Divergence("jsd", beta)) / weight
        torch.testing.assert_close(found, vocabulary_divergence(*logits, Divergence(kind)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", range(len(TRL["cases"])))
def test_divergences_are_trls(case):
    """The values were made by TRL 1.16's GKDTrainer: make_trl_distillation.py. Its beta of 0 and 1 are our two KLs."""
    case = TRL["cases"][case]
    student, teacher = (torch.tensor(case[name], dtype=torch.float64) for name in ("student", "teacher"))
    for trl in case["losses"]:
        kind = {0.0: "forward", 1.0: "reverse"}.get(trl["beta"], "jsd")
        beta = trl["beta"] if kind == "jsd" else 0.5
        found = vocabulary_divergence(student, teacher, Divergence(kind, beta, trl["temperature"])).sum()
        assert found.item() == pytest.approx(trl["loss"], rel=1e-6, abs=1e-9)
