"""Advantages of groups and the weights of tokens against the oracle, and whole losses against TRL."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.losses import (
    aggregation_weights,
    decoupled_advantages,
    group_advantages,
    importance_weights,
    is_accepted,
    is_near_policy,
    kl_divergence,
    policy_loss,
    punish_overlong,
)
from tests.losses.draw import assert_close, dtypes, masks, numbers, quick
from tests.oracles import group as oracle

ADVANTAGES = ("grpo", "dr_grpo", "rloo", "rloo_std", "maxrl", "reinforce++-baseline", "remax")
groups = st.tuples(st.integers(1, 4), st.integers(2, 6))


@quick
@given(groups, st.data(), dtypes, st.sampled_from(ADVANTAGES), st.sampled_from([0.1, 1.0]))
def test_advantages_equal_the_oracle(shape, data, dtype, advantage, floor):
    """PITFALL 8: groups that are nearly equal, or exactly, included."""
    count, size = shape
    rewards, baseline = (data.draw(numbers((count * size,), 100.0, dtype)) for _ in range(2))
    rewards = rewards.abs() if advantage == "maxrl" else rewards
    found = group_advantages(rewards, size, advantage, baseline=baseline, min_std=floor)
    expected = oracle.group_advantages(rewards.tolist(), size, advantage, baseline.tolist(), floor)
    # a reward is subtracted from others of its size, and what is left may be divided by as little as the floor
    largest = rewards.abs().max().item() + baseline.abs().max().item()
    smallest = {"grpo": 1e-4, "rloo_std": floor}.get(advantage, 1.0)
    error = (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    precision = 1e-9 if dtype == torch.float64 else 3e-6
    assert found.isfinite().all()
    # spreads are differences of squares, so near the floor they are known to the root of the rounding
    assert error <= precision * (1 + largest / smallest) ** (2 if advantage == "rloo_std" else 1)


@pytest.mark.parametrize("advantage", ADVANTAGES[:-1])
def test_a_group_of_equal_rewards_teaches_nothing(advantage):
    """PITFALL 8: 0, not NaN, nor rounding errors blown up."""
    rewards = torch.tensor([0.1, 0.7, -1e4]).repeat_interleave(6)
    assert group_advantages(rewards, 6, advantage).abs().max() < 1e-3


@quick
@given(groups, st.data(), st.sampled_from(ADVANTAGES), st.randoms(use_true_random=False))
def test_advantages_are_of_the_group_alone(shape, data, advantage, random):
    """Neither other groups nor the order within the group change them."""
    count, size = shape
    rewards, baseline = (data.draw(numbers((count * size,), 100.0, torch.float64)) for _ in range(2))
    rewards = rewards.abs() if advantage == "maxrl" else rewards
    expected = group_advantages(rewards, size, advantage, baseline=baseline).reshape(count, size)
    order = list(range(size))
    random.shuffle(order)
    for g in range(count):
        alone, its_own = rewards.reshape(count, size)[g][order], baseline.reshape(count, size)[g][order]
        found = group_advantages(alone, size, advantage, baseline=its_own)
        torch.testing.assert_close(found, expected[g][order], rtol=1e-6, atol=1e-9)


@quick
@given(groups, st.integers(1, 3), st.data(), dtypes)
def test_decoupled_advantages_equal_the_oracle(shape, kinds, data, dtype):
    """With rewards that skip some responses, or all of a group."""
    count, size = shape
    rewards = data.draw(numbers((count * size, kinds), 100.0, dtype))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    skipped = torch.rand(rewards.shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    weights = data.draw(numbers((kinds,), 2.0, dtype))
    found = decoupled_advantages(torch.where(skipped, torch.nan, rewards), weights, size)
    given_rewards = torch.where(skipped, torch.nan, rewards).tolist()
    expected = oracle.decoupled_advantages(given_rewards, weights.tolist(), size)
    # as with grpo: a reward of up to 100 is subtracted from others, and what is left may be divided by 1e-4
    precision = 1e-9 if dtype == torch.float64 else 3e-6
    error = (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    assert error <= precision * (1 + rewards.abs().max().item() / 1e-4) * kinds and found.isfinite().all()


def test_decoupled_advantages_of_one_reward_are_grpos_and_tell_equal_sums_apart():
    rewards = torch.randn(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = decoupled_advantages(rewards, torch.ones(1, dtype=torch.float64), 4)
    torch.testing.assert_close(found, group_advantages(rewards[:, 0], 4, "grpo"))
    kinds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    sums = group_advantages(kinds.sum(1), 4, "grpo")
    apart = decoupled_advantages(kinds, torch.ones(2), 4)
    assert sums[0] == sums[1] and abs(apart[0] - apart[1]) > 0.2


def test_rloo_is_dr_grpo_times_a_constant():
    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(rewards, 4, "rloo"), 4 / 3 * group_advantages(rewards, 4, "dr_grpo"))


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_the_mean_gradient_of_maxrl_is_that_of_the_log_of_success_up_to_a_term(p, size):
    """Exactly, over all outcomes of a group: d/dp is 1/p = sum of (1 - p)^k, of which size - 1 terms are there; the
    other advantages have the gradient of p itself."""
    gradient = 0.0
    for successes in range(size + 1):
        rewards = torch.tensor([1.0] * successes + [0.0] * (size - successes), dtype=torch.float64)
        scores = rewards / p - (1 - rewards) / (1 - p)  # d log probability / dp of each outcome
        weight = math.comb(size, successes) * p**successes * (1 - p) ** (size - successes)
        gradient += weight * (group_advantages(rewards, size, "maxrl") * scores).mean().item()
    assert gradient == pytest.approx(sum((1 - p) ** k for k in range(size - 1)), rel=1e-9)


def test_rewards_whose_mean_is_not_positive_teach_maxrl_nothing():
    rewards = torch.tensor([0.0, 0.0, -1.0, 1.0, -2.0, 1.0])
    assert group_advantages(rewards, 2, "maxrl").tolist() == [0.0] * 6


def test_the_scale_of_rloo_std_does_not_depend_on_the_answer_itself():
    """Unlike GRPO's: a bandit's exact mean gradient keeps the direction of the true one."""
    rewards, logits = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64), torch.tensor([0.3, 0.0, -0.5])
    p = logits.double().softmax(0)
    true = p * (rewards - (p * rewards).sum())

    def mean_gradient(advantage):
        total = torch.zeros(3, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                for k in range(3):
                    a = group_advantages(rewards[[i, j, k]], 3, advantage, min_std=0.5)
                    score = sum(a[n] * (torch.eye(3)[y] - p) for n, y in enumerate((i, j, k)))
                    total += p[i] * p[j] * p[k] * score
        return total

    def angle(g):
        return torch.cosine_similarity(g, true, dim=0).item()

    assert angle(mean_gradient("rloo_std")) == pytest.approx(1, abs=1e-9) == angle(mean_gradient("rloo"))
    assert angle(mean_gradient("grpo")) < 0.999


def test_what_is_no_advantage_of_whole_answers_is_named():
    with pytest.raises(ValueError, match=r"'reinforce\+\+'"):
        group_advantages(torch.zeros(4), 2, "reinforce++")


@quick
@given(masks(), st.sampled_from(["token", "sequence", "sum", "constant"]), st.data())
def test_aggregation_equals_the_oracle(mask, aggregation, data):
    """Of shares too: weights know only the global counts."""
    tokens, responses = max(mask.sum().item(), 1), max(mask.any(1).sum().item(), 1)
    found = aggregation_weights(mask, aggregation, tokens, responses, 9)
    assert_close(found, oracle.aggregation_weights(mask.tolist(), aggregation, tokens, responses, 9), rtol=1e-6)
    parts = [aggregation_weights(m, aggregation, tokens, responses, 9) for m in mask.split(1)]
    assert torch.equal(torch.cat(parts), found)


def test_aggregates_are_the_means_that_they_are_called():
    """A response of one token and one of three: means over tokens, over responses, and over responses x 10."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    x = torch.tensor([[8.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    found = {
        k: (aggregation_weights(mask, k, 4, 2, 10) * x).sum().item() / 4
        for k in ("token", "sequence", "sum", "constant")
    }
    assert found == pytest.approx({"token": 14 / 4, "sequence": (8 + 2) / 2, "sum": (8 + 6) / 2, "constant": 14 / 20})
    with pytest.raises(ValueError, match="token, sequence, sum or constant"):
        aggregation_weights(mask, "response", 4, 2, 10)


@quick
@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 20)), min_size=1, max_size=6), st.integers(0, 20))
def test_overlong_punishment_equals_the_oracle(responses, buffer):
    scores, lengths = (list(x) for x in zip(*responses, strict=True))
    found = punish_overlong(torch.tensor(scores, dtype=torch.float64), torch.tensor(lengths), 20, buffer, 0.7)
    assert_close(found, oracle.punish_overlong(scores, lengths, 20, buffer, 0.7), scale=10)


def test_overlong_answers_lose_up_to_the_penalty():
    found = punish_overlong(torch.ones(5), torch.tensor([1, 6, 7, 9, 10]), 10, 4, 2.0)
    assert found.tolist() == [1.0, 1.0, 0.5, -0.5, -1.0]


TRL = json.loads(Path(__file__).with_name("trl_grpo.json").read_text())


@pytest.mark.parametrize("advantage", TRL["advantages"])
def test_advantages_are_those_of_trl(advantage):
    rewards = torch.tensor(TRL["rewards"], dtype=torch.float64)
    found = group_advantages(rewards, TRL["group_size"], advantage)
    assert found.tolist() == pytest.approx(TRL["advantages"][advantage], rel=1e-6, abs=1e-9)


def test_decoupled_advantages_are_those_of_trl():
    """TRL whitens with the unbiased standard deviation and adds 1e-4 to it."""
    case = {name: torch.tensor(value, dtype=torch.float64) for name, value in TRL["decoupled"].items()}
    summed = decoupled_advantages(case["rewards"], case["weights"], TRL["group_size"])
    found = (summed - summed.mean()) / (summed.std() + 1e-4)
    torch.testing.assert_close(found, case["advantages"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TRL["losses"])
def test_losses_and_their_gradients_are_those_of_trl(name):
    """TRL's bound of CISPO is the largest ratio itself, and there is none from below."""
    case, options = dict(TRL["case"]), TRL["losses"][name]["options"]
    mask = torch.tensor(case.pop("mask"))
    x = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.items()}
    log_probs, kind = x["log_probs"].requires_grad_(), options["loss_type"]
    clips = dict(clip_low=options.get("epsilon_low", 0.2), clip_high=options.get("epsilon_high", 0.2))
    clips |= dict(kind={"gspo": "gspo", "luspo": "gspo", "vespo": "vespo", "sapo": "sapo"}.get(name, "clip"))
    if kind == "cispo":
        clips = dict(kind="cispo", clip_low=1.0, clip_high=options["epsilon_high"] - 1)
    aggregation = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant", "luspo": "sum"}.get(kind, "token")
    weights = aggregation_weights(mask, aggregation, mask.sum().item(), len(mask), TRL["longest"])
    advantages = x["advantages"][:, None].expand_as(log_probs)
    if "mode" in options:
        level, what = options["mode"].split("_")
        advantages = advantages * importance_weights(x["old"], x["rollout"], mask, level, 2.0)
        if what == "mask":
            advantages = advantages * is_accepted(x["old"], x["rollout"], mask, level, 0.5, 2.0)
    used = weights
    if "off_policy_bound" in options:
        near = is_near_policy(log_probs, x["rollout"], advantages, mask, options["off_policy_bound"])
        assert 0 < (mask & ~near).sum() < mask.sum()
        used = weights * near
    loss, _ = policy_loss(log_probs, x["old"], advantages, mask, mask.sum(), weights=used, **clips)
    kl = kl_divergence(log_probs, x["reference"], mask, "k3")
    loss = loss + options["beta"] * (weights * kl).sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(TRL["losses"][name]["loss"], rel=1e-6)
    expected = torch.tensor(TRL["losses"][name]["gradient"], dtype=torch.float64)
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-6, atol=1e-9)
