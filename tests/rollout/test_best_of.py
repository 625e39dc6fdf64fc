"""Best-of-n keeps the response that scores highest, and moves the policy by log n - (n - 1) / n."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from coati.errors import UserError
from coati.models import Actor
from coati.rewards import Reward
from coati.rollout import GenerationConfig, best_of_n, best_of_n_kl


class SumOfIds(Reward):
    """Scores a response by its sampled tokens; keeps what it was asked for."""

    name = "sum of ids"

    def __init__(self):
        self.samples = []

    def score(self, samples):
        self.samples += samples
        return [
            float(sum(token for token, sampled in zip(s.tokens, s.response_mask, strict=True) if sampled))
            for s in samples
        ]


@pytest.fixture(scope="module")
def policy(tiny_world):
    return Actor(tiny_world["policy"]).eval(), AutoTokenizer.from_pretrained(tiny_world["tokenizer"])


def test_the_best_of_each_prompt_is_returned(policy):
    actor, tokenizer = policy
    prompts, reward = ["User: one\nAssistant:", "User: two words\nAssistant:", "User: x\nAssistant:"], SumOfIds()
    torch.manual_seed(0)
    chosen = best_of_n(
        actor, reward, prompts, 4, tokenizer=tokenizer, config=GenerationConfig(max_new_tokens=8), batch_size=5,
        columns=[{"answer": answer} for answer in "abc"],
    )  # fmt: skip
    assert [c.prompt for c in chosen] == prompts
    seen = [sample.response for sample in reward.samples]
    assert [sample.columns["answer"] for sample in reward.samples] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    for i, c in enumerate(chosen):
        assert len(c.scores) == 4 and c.scores[c.best] == max(c.scores)
        assert c.response == seen[4 * i + c.best]
    assert any(min(c.scores) < max(c.scores) for c in chosen)


def test_the_kl_is_that_of_the_best_of_n_distribution():
    """With m equally likely responses of different scores, the best of n is response k with (k/m)^n - ((k-1)/m)^n."""
    m, n = 20_000, 8
    shares = [(k / m) ** n - ((k - 1) / m) ** n for k in range(1, m + 1)]
    exact = sum(p * math.log(p * m) for p in shares if p > 0)
    assert best_of_n_kl(n) == pytest.approx(exact, rel=1e-3)
    assert best_of_n_kl(1) == 0


@pytest.mark.parametrize(
    ("n", "settings", "words"),
    [(0, {}, "at least 1"), (2, dict(temperature=0.0), "temperature above 0"), (2, dict(num_beams=2), "num_beams 1")],
)
def test_what_makes_no_sense_is_refused(n, settings, words, policy):
    actor, tokenizer = policy
    with pytest.raises(UserError, match=words):
        best_of_n(actor, SumOfIds(), ["a"], n, tokenizer=tokenizer, config=GenerationConfig(**settings))


@pytest.mark.parametrize("bad", [[1.0], [float("nan")] * 2])
def test_a_reward_that_gives_no_score_is_named(bad, policy):
    class Broken(Reward):
        name = "broken"

        def score(self, samples):
            return bad

    actor, tokenizer = policy
    with pytest.raises(UserError, match="'broken'"):
        best_of_n(actor, Broken(), ["User:"], 2, tokenizer=tokenizer, config=GenerationConfig(max_new_tokens=2))
