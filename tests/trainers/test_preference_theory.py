"""DPO against theory: from comparisons by Bradley-Terry with rewards r, the policy becomes pi_ref(y) exp(r(y) / beta),
up to a constant (Rafailov et al., 2305.18290, eq. 4), among the answers that are compared.

The rewards are logarithms of whole numbers w: an answer is then preferred to another w : w' times, and all pairs of 20
answers, each written down w + w' times, are exactly what Bradley-Terry gives.
"""

import math
from itertools import combinations, product

import pytest
import torch

from coati.config import configure
from examples.stages import fill_figures
from tests.conftest import ROOT, write_rows
from tests.trainers.test_theory import EOS, PROMPT, VOCABULARY, task, total_variation  # noqa: F401

LETTERS = (4, 5, 6, 7)  # tokens
ANSWERS = [[a] for a in LETTERS] + [list(pair) for pair in product(LETTERS, repeat=2)]


def strength(answer: list[int]) -> int:
    """1 to 4, by no rule of the single tokens."""
    return 1 + (7 * answer[0] + 5 * sum(answer) ** 2 + len(answer)) % 4


@pytest.fixture(scope="module")
def comparisons(task, tmp_path_factory) -> str:  # noqa: F811
    def text(answer):
        return " ".join(VOCABULARY[token] for token in answer)

    rows = []
    for one, other in combinations(ANSWERS, 2):
        for better, worse in ((one, other), (other, one)):
            rows += [{"prompt": "a b", "chosen": text(better), "rejected": text(worse)}] * strength(better)
    return write_rows(tmp_path_factory.mktemp("comparisons") / "pairs.jsonl", rows)


@torch.no_grad()
def distribution(model) -> torch.Tensor:
    """The probability of each of ANSWERS among them all, float64."""
    width = len(PROMPT) + 3
    sums = []
    for answer in ANSWERS:
        ids = torch.tensor([PROMPT + answer + [EOS]])
        assert ids.shape[1] <= width
        sums.append(model(ids)[0, len(PROMPT) :].double().sum())
    return torch.stack(sums).softmax(0)


def optimum(reference: torch.Tensor, beta: float) -> torch.Tensor:
    rewards = torch.tensor([math.log(strength(answer)) for answer in ANSWERS], dtype=torch.float64)
    return torch.softmax(reference.log() + rewards / beta, 0)


def check(task, pairs, runtime, output, beta: float, seed: int, steps: int) -> float:  # noqa: F811
    """Trains on all comparisons at a learning rate that falls to 0; the distance to the optimum."""
    from coati.models import Actor
    from coati.trainers.config import PreferenceConfig
    from coati.trainers.dpo import DPOTrainer

    settings = task | dict(train_data=[pairs], output_dir=str(output), seed=seed, beta=beta, cache_reference=True)
    settings |= dict(steps=steps, batch_size=256, micro_batch_size=256, learning_rate=1e-2, warmup=0.0, final_rate=0.0)
    trainer = DPOTrainer(configure(PreferenceConfig, **settings), runtime)
    for k in range(trainer.total_steps):
        trainer.step(k)
    before, after = distribution(Actor(task["model"])), distribution(trainer.engines["model"].module)
    best = optimum(before, beta)
    assert total_variation(before, best) > 0.1  # there was something to learn
    assert total_variation(optimum(before, 1.25 * beta), best) > 0.02  # a wrong beta would be noticed
    distance = total_variation(after, best)
    assert distance < 0.02
    return distance


def test_dpo_finds_the_optimum_that_theory_gives(task, comparisons, runtime, tmp_path):  # noqa: F811
    check(task, comparisons, runtime, tmp_path, beta=0.5, seed=0, steps=100)


@pytest.mark.slow
def test_dpo_finds_it_for_three_penalties_and_three_seeds(task, comparisons, runtime, tmp_path):  # noqa: F811
    """Rewrites the table in docs/preference.md."""
    lines = ["| $\\beta$ | seed 0 | seed 1 | seed 2 |", "|---|---|---|---|"]
    for beta in (0.25, 0.5, 1.0):
        found = [check(task, comparisons, runtime, tmp_path / f"{beta}-{seed}", beta, seed, 300) for seed in range(3)]
        lines.append(f"| {beta} | " + " | ".join(f"{distance:.4f}" for distance in found) + " |")
    fill_figures(ROOT / "docs" / "preference.md", "\n".join(lines), "theory")
