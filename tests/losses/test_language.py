"""Log-probs, entropy and cross-entropy against the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import (
    cross_entropy,
    observation_loss,
    response_targets,
    token_entropy,
    token_log_probs,
    z_loss,
)
from coati.losses.language import (
    FrozenProjectedLogProbs,
    ProjectedLogProbs,
    entropy,
    log_partition,
    next_log_probs,
)
from tests.losses.draw import assert_close, dtypes, masks, numbers, poison, quick
from tests.oracles import losses as oracle


@st.composite
def language(draw):
    """Logits `[batch, seq, vocab]`, some of them -inf, and token ids that have a probability above 0."""
    dtype = draw(dtypes)
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(2, 7)))
    logits = draw(numbers(shape, draw(st.sampled_from([1.0, 50.0, 1000.0])), dtype))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(shape[-1], shape[:2], generator=generator)
    if draw(st.booleans()):
        banned = torch.rand(shape, generator=generator) < 0.4
        banned[:, :-1].scatter_(-1, ids[:, 1:, None], False)
        banned[:, -1] = False
        logits = logits.masked_fill(banned, -torch.inf)
    return logits, ids, draw(st.sampled_from([1.0, 0.5, 2.0, 0.1]))


@quick
@given(language())
def test_log_probs_and_entropy_equal_the_oracle(case):
    logits, ids, temperature = case
    finite = logits[logits.isfinite()].abs().max().item() / temperature
    log_probs, entropy = token_log_probs(logits, ids, temperature), token_entropy(logits, temperature)
    assert log_probs.dtype == entropy.dtype == logits.dtype
    assert_close(log_probs, oracle.token_log_probs(logits.tolist(), ids.tolist(), temperature), scale=finite)
    assert_close(entropy, oracle.token_entropy(logits.tolist(), temperature), scale=1.0 + finite)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_of_log_probs_is_that_of_finite_differences(temperature):
    """The backward pass is our own."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(5, (2, 4), generator=generator)
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, ids, temperature), logits.requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tile", [(1, 5), (3, 2), (99, 99), (99, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_log_probs_through_the_output_layer_are_those_of_its_logits(keeps, with_bias, tile, temperature):
    """Values, entropies, and the gradients of states, weight and bias: finite differences and autograd's own. Where the
    layer isn't trained, the gradient of the states."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    states, weight, ids = draw(7, 3), draw(5, 3), torch.randint(5, (7,), generator=generator)
    bias = draw(5) if with_bias else None
    tensors = [x for x in (states, weight, bias) if x is not None]

    def ours(states, weight, bias=None):
        return ProjectedLogProbs.apply(states, weight, bias, ids, temperature, False, tile, keeps)

    assert torch.autograd.gradcheck(ours, tensors)
    logits = torch.nn.functional.linear(states, weight, bias)
    log_probs, entropies = ProjectedLogProbs.apply(states, weight, bias, ids, temperature, True, tile, keeps)
    plain = next_log_probs(logits[None], ids[None], temperature)[0]
    torch.testing.assert_close(log_probs, plain)
    torch.testing.assert_close(entropies, entropy(logits[None], temperature)[0])
    assert log_probs.requires_grad and not entropies.requires_grad
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    expected = torch.autograd.grad(plain, tensors, upstream)
    torch.testing.assert_close(torch.autograd.grad(log_probs, tensors, upstream), expected)
    frozen = [x.detach() if x is not None else None for x in (weight, bias)]
    log_probs, entropies = FrozenProjectedLogProbs.apply(states, *frozen, ids, temperature, True, tile)
    torch.testing.assert_close((log_probs, entropies), (plain, entropy(logits[None], temperature)[0]))
    torch.testing.assert_close(torch.autograd.grad(log_probs, states, upstream), expected[:1])


@quick
@given(masks(), st.data(), dtypes)
def test_cross_entropy_equals_the_oracle_whatever_stands_under_the_mask(mask, data, dtype):
    """PITFALL 7: a masked NaN or infinity reaches neither the loss nor a gradient."""
    log_probs = poison(-data.draw(numbers(mask.shape, 100.0, dtype)).abs(), mask).requires_grad_()
    loss, metrics = cross_entropy(log_probs, mask, 7)
    assert_close(loss, oracle.cross_entropy(log_probs.tolist(), mask.tolist(), 7))
    assert torch.equal(metrics["loss"], loss.detach())
    assert not metrics["loss"].requires_grad
    loss.backward()
    assert_close(log_probs.grad, torch.where(mask, torch.tensor(-1 / 7, dtype=torch.float64), 0.0))
    assert (log_probs.grad[~mask] == 0).all()


@quick
@given(masks(), st.data(), dtypes)
def test_dynamic_fine_tuning_equals_the_oracle_and_its_factor_is_a_constant(mask, data, dtype):
    log_probs = poison(-data.draw(numbers(mask.shape, 20.0, dtype)).abs(), mask).requires_grad_()
    loss, _ = cross_entropy(log_probs, mask, 7, kind="dft")
    assert_close(loss, oracle.cross_entropy(log_probs.tolist(), mask.tolist(), 7, "dft"), scale=1e-3)
    loss.backward()
    assert_close(log_probs.grad, torch.where(mask, -log_probs.detach().double().exp() / 7, 0.0))


@quick
@given(masks(), st.data(), dtypes)
def test_observation_loss_equals_the_oracle(mask, data, dtype):
    log_probs = -data.draw(numbers(mask.shape, 100.0, dtype)).abs()
    loss, metrics = observation_loss(poison(log_probs, mask), mask, 3)
    assert_close(loss, oracle.observation_loss(log_probs.tolist(), mask.tolist(), 3), scale=1e-6)
    assert torch.equal(metrics["observation_loss"], loss)


@quick
@given(language())
def test_the_log_partition_is_what_log_probs_lack(case):
    """Of the logits that predict a token: what is left of its logit is its log-prob."""
    logits, ids, temperature = case
    found = log_partition(logits, temperature)
    expected = oracle.token_log_probs(logits.tolist(), ids.tolist(), temperature)
    assert found.shape == logits.shape[:2] and found.dtype == logits.dtype
    finite = logits[logits.isfinite()].abs().max().item() / temperature
    chosen = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) / temperature
    assert_close(chosen - found[:, :-1], [row[1:] for row in expected], scale=finite)


@quick
@given(masks(), st.data(), dtypes)
def test_z_loss_equals_the_oracle_whatever_stands_under_the_mask(mask, data, dtype):
    log_partition = poison(data.draw(numbers(mask.shape, 100.0, dtype)), mask)
    loss, metrics = z_loss(log_partition, mask, 7)
    assert_close(loss, oracle.z_loss(log_partition.tolist(), mask.tolist(), 7))
    assert torch.equal(metrics["z_loss"], loss.detach())


@pytest.mark.parametrize("function", ["log_probs", pytest.param("entropy")])
def test_a_forbidden_token_gives_no_nan_gradient(function):
    """A logit of -inf is how generation forbids a token: its probability is 0, and so is its gradient."""
    logits = torch.tensor([[[0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    result = token_log_probs(logits, torch.tensor([[0, 1]])) if function == "log_probs" else token_entropy(logits)
    result.sum().backward()
    assert logits.grad.isfinite().all(), logits.grad
    assert logits.grad[0, 0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    """PITFALL 11: nothing is lost, or becomes infinite, by way of a 16-bit intermediate."""
    torch.manual_seed(0)
    logits, ids = (torch.randn(2, 5, 300) * 20).to(dtype), torch.randint(300, (2, 5))
    assert token_log_probs(logits, ids).dtype == torch.float32
    assert torch.equal(token_log_probs(logits, ids, 0.7), token_log_probs(logits.float(), ids, 0.7))
    assert torch.equal(token_entropy(logits, 0.7), token_entropy(logits.float(), 0.7))
    log_probs = torch.full((1, 2000), -70.0, dtype=dtype)
    loss, _ = cross_entropy(log_probs, torch.ones(1, 2000, dtype=torch.bool), 1)
    assert loss.dtype == torch.float32
    assert loss == 140_000


@quick
@given(masks())
def test_targets_equal_the_oracle(mask):
    before = mask.clone()
    assert response_targets(mask).tolist() == oracle.response_targets(mask.tolist())
    assert torch.equal(mask, before), "the argument itself stays as it was"


def test_the_first_token_is_never_a_target():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert response_targets(mask).tolist() == [[False, True, False], [False, False, True]]
