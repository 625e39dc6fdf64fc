"""Every public function has an oracle, the right gradient, and finite results from finite arguments."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coati.losses
from coati.losses import (
    bounded_values,
    clip_scores,
    cross_entropy,
    distillation_loss,
    gae,
    kl_divergence,
    kto_loss,
    masked_sums,
    moments,
    objective_loss,
    observation_loss,
    pairwise_reward_loss,
    penalize_missing_eos,
    policy_loss,
    preference_loss,
    punish_overlong,
    returns_to_go,
    shape_rewards,
    step_reward_loss,
    token_entropy,
    token_log_probs,
    turn_gae,
    value_loss,
    vocabulary_divergence,
    whiten,
    z_loss,
)
from coati.losses.distillation import Divergence
from coati.losses.preference import PREFERENCE_LOSSES, Responses
from tests.losses.draw import dtypes, masks, numbers, poison, quick
from tests.oracles import advantages, centering, correction, distillation, group, losses, preference, turns

FOLDER = Path(__file__).parent
ORACLES = (advantages, centering, correction, distillation, group, losses, preference, turns)

# Each differentiable function of tensors `[batch, seq]`: what it is called with, and how many of them it takes. Scores
# of responses are a column. `mask` is bool `[batch, seq]`.
PER_TOKEN = {
    "bounded_values": (1, lambda x, mask: bounded_values(x[0], -1.0, 2.0)),
    "clip_scores": (1, lambda x, mask: clip_scores(x[0][:, 0], 1.5)),
    "cross_entropy": (1, lambda x, mask: cross_entropy(x[0], mask, 7)[0]),
    "distillation_loss": (1, lambda x, mask: distillation_loss(x[0], mask, 7)[0]),
    "gae": (2, lambda x, mask: torch.stack(gae(*x, mask, 0.9, 0.95))),
    "kl_divergence": (2, lambda x, mask: torch.stack([kl_divergence(*x, mask, k) for k in ("k1", "k2", "k3")])),
    "kto_loss": (2, lambda x, mask: kto_loss(responses(x), mask[:, 0], torch.tensor(0.3), 7)[0]),
    "masked_sums": (1, lambda x, mask: masked_sums(x[0], mask)),
    "objective_loss": (2, lambda x, mask: objective_loss(*x, mask, 7)[0]),
    "observation_loss": (1, lambda x, mask: observation_loss(x[0], mask, 7)[0]),
    "pairwise_reward_loss": (
        3,
        lambda x, mask: pair(x, label_smoothing=0.1, centering=0.01, tie=x[2][:, 0] > 0, tie_theta=2.0),
    ),
    "penalize_missing_eos": (1, lambda x, mask: penalize_missing_eos(x[0][:, 0], mask[:, 0], 1.5)),
    "policy_loss": (3, lambda x, mask: policy_loss(*x, mask, 7, dual_clip=3.0)[0]),
    "punish_overlong": (1, lambda x, mask: punish_overlong(x[0][:, 0], mask.sum(1), mask.shape[1], 3)),
    "preference_loss": (4, lambda x, mask: torch.stack([of_pairs(name, x) for name in sorted(PREFERENCE_LOSSES)])),
    "returns_to_go": (1, lambda x, mask: returns_to_go(x[0], mask, 0.9)),
    "shape_rewards": (2, lambda x, mask: shape_rewards(x[0][:, 0], x[1], mask, 0.1)),
    "step_reward_loss": (2, lambda x, mask: step_reward_loss(*x, mask, 7)[0]),
    "turn_gae": (2, lambda x, mask: torch.stack(turn_gae(*x, mask, 0.9, 0.95))),
    "value_loss": (3, lambda x, mask: value_loss(*x, mask, 7)[0]),
    "whiten": (1, lambda x, mask: whitened(x[0], mask)),
    "z_loss": (1, lambda x, mask: z_loss(x[0], mask, 7)[0]),
}
# And each of logits `[batch, seq, vocab]`.
OF_LOGITS = {
    "token_entropy": lambda logits, ids: token_entropy(logits, 0.7),
    "token_log_probs": lambda logits, ids: token_log_probs(logits, ids, 0.7),
    "vocabulary_divergence": lambda logits, ids: divergences(logits),
}
# From floats to floats, from bool to bool, or what a loss takes for a constant: see test_group.py, test_correction.py
# and, of a function with constants in it, test_centering.py.
NO_GRADIENT = {"adapt_kl_coefficient", "length_adaptive_lambda", "moments", "response_targets", "without_first"}
NO_GRADIENT |= {"aggregation_weights", "decoupled_advantages", "group_advantages", "turn_advantages"}
NO_GRADIENT |= {"importance_weights", "is_accepted", "is_near_policy", "mismatch_metrics", "mismatch_sums"}
NO_GRADIENT |= {"confidence_gaps", "expected_scores", "first_wrong"}
# The scores of whole responses have no mask, nor have a critic's outputs: what stands in them counts.
UNMASKED = {
    "bounded_values",
    "clip_scores",
    "kto_loss",
    "preference_loss",
    "pairwise_reward_loss",
    "penalize_missing_eos",
    "punish_overlong",
    "shape_rewards",
}


def pair(x, **options):
    return pairwise_reward_loss(x[0][:, 0], x[1][:, 0], 7, margin=x[2][:, 0], **options)[0]


def responses(x):
    return Responses(x[0][:, 0], torch.full_like(x[0][:, 0], 3.0), x[1][:, 0])


def of_pairs(name, x):
    return preference_loss(name, responses(x[:2]), responses(x[2:]), 7, nll_coefficient=0.5)[0]


def divergences(logits):
    """Of every kind, from a teacher that forbids the same tokens."""
    teacher = torch.linspace(-2, 2, logits.shape[-1], dtype=logits.dtype).where(logits.isfinite(), -torch.inf)
    kinds = ("forward", "reverse", "jsd")
    return sum(vocabulary_divergence(logits, teacher, Divergence(kind, 0.3, 0.7)) for kind in kinds)


def whitened(x, mask):
    """With the statistics of the entries themselves, which are numbers and have no gradient."""
    return whiten(x, mask, *moments(masked_sums(x.detach(), mask)))


def compared_with_an_oracle() -> set[str]:
    """Functions F for which a test in this folder calls both F and an oracle of that name."""
    found = set()
    for path in FOLDER.glob("test_*.py"):
        for test in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                called = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
                ours = {f.id for f in called if isinstance(f, ast.Name)}
                theirs = {f.attr for f in called if isinstance(f, ast.Attribute) and ast.unparse(f.value) == "oracle"}
                found |= ours & theirs
    return found


def test_every_public_function_is_compared_with_an_oracle():
    public = set(coati.losses.__all__)
    missing = {name for name in public if not any(hasattr(module, name) for module in ORACLES)}
    assert not missing, f"write tests/oracles for {sorted(missing)}"
    assert not public - compared_with_an_oracle(), "an oracle that no test calls beside the function"


def test_every_public_function_is_in_these_tables():
    assert {*PER_TOKEN, *OF_LOGITS, *NO_GRADIENT} == set(coati.losses.__all__)


@pytest.mark.parametrize("name", sorted(PER_TOKEN))
def test_gradients_are_those_of_finite_differences(name):
    """In all arguments, with holes in the mask and an empty row; drawn away from the corners of clips."""
    count, function = PER_TOKEN[name]
    generator = torch.Generator().manual_seed(5)
    x = [torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    if name == "whiten":  # its statistics must stay where they are while an entry is moved
        mean, std = moments(masked_sums(x[0].detach(), mask))
        function = lambda x, mask: whiten(x[0], mask, mean, std)  # noqa: E731
    assert torch.autograd.gradcheck(lambda *x: function(x, mask), x)


@pytest.mark.parametrize("name", sorted(OF_LOGITS))
def test_gradients_of_logits_are_those_of_finite_differences(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator).requires_grad_()
    ids = torch.randint(5, (2, 4), generator=generator)
    assert torch.autograd.gradcheck(lambda x: OF_LOGITS[name](x, ids), logits)


@quick
@given(st.sampled_from(sorted(PER_TOKEN)), masks(), st.data(), dtypes, st.sampled_from([50.0, 1e4, 1e6]))
def test_finite_arguments_give_finite_results_and_gradients(name, mask, data, dtype, limit):
    """PITFALL 7, PITFALL 10: as large as they may be, spread by 1e-6 of that, or all masked; and NaN under the mask."""
    count, function = PER_TOKEN[name]
    x = [data.draw(numbers(mask.shape, limit, dtype)) for _ in range(count)]
    x = [(a if name in UNMASKED else poison(a, mask)).requires_grad_() for a in x]
    result = function(x, mask)
    assert result.isfinite().all(), result
    result.sum().backward()
    for a in x:
        assert a.grad is None or a.grad.isfinite().all(), a.grad


@quick
@given(st.sampled_from(sorted(OF_LOGITS)), st.data(), dtypes, st.sampled_from([1.0, 50.0, 1e4, 1e30]))
def test_any_logits_give_finite_gradients(name, data, dtype, limit):
    """PITFALL 10: with forbidden tokens too, all but one at some positions. A token of probability 0 may have log-prob
    -inf, but what it is replaced with under a mask leaves a gradient of 0, not NaN."""
    logits = data.draw(numbers((2, 4, 5), limit, dtype))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    ids = torch.randint(5, (2, 4), generator=generator)
    banned = torch.rand(logits.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    banned[..., 0] &= ~banned.all(-1)  # a distribution has a token left
    logits = logits.masked_fill(banned, -torch.inf).requires_grad_()
    result = OF_LOGITS[name](logits, ids)
    possible = result.detach() > -torch.inf
    assert possible.all() or name == "token_log_probs"
    assert not result.isnan().any() and (result < torch.inf).all()
    cross_entropy(result, possible, 3)[0].backward()
    assert logits.grad.isfinite().all(), logits.grad
    assert (logits.grad[banned] == 0).all()
