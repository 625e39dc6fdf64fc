"""PPO against theory: E[r] - beta KL(pi || pi_ref) is greatest for pi*(y) proportional to pi_ref(y) exp(r(y) / beta).

Answers of one or two tokens from a vocabulary of 8 are few enough to enumerate, so pi_ref, pi* and the trained policy
are known exactly. Nothing in the trainer is replaced: tokens are sampled (the pad token may be one), EOS ends an answer
or the limit does, the critic learns, advantages are whitened, ratios are clipped.
"""

import math

import pytest
import torch

from examples.stages import fill_figures
from tests.conftest import ROOT, write_rows

VOCABULARY = ("<eos>", "<pad>", "a", "b", "c", "d", "e", "f")
EOS, PROMPT = 0, [2, 3]
ANSWERS = [[EOS]] + [[first, second] for first in range(1, 8) for second in range(8)]
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}{{- message.content + ' ' }}{% endif %}
{%- endfor %}"""


class Table:
    """A reward for each of the 57 answers: no rule to learn, and much of it hangs on both tokens."""

    name = "table"

    def of(self, answer: list[int]) -> float:
        return math.sin(7.0 * answer[0]) + 0.7 * math.sin(5.0 * sum(answer) + len(answer))

    def score(self, prompts, responses, *, input_ids, response_mask, **columns):
        return [self.of(ids[mask].tolist()) for ids, mask in zip(input_ids, response_mask, strict=True)]


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict[str, str]:
    """Settings that every run shares: a policy whose distribution is far from flat, and one prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from coati.models import Actor

    root = tmp_path_factory.mktemp("theory")
    words = models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="f")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), eos_token_id=EOS, pad_token_id=1, max_position_embeddings=8, **sizes
    )
    torch.manual_seed(0)
    actor = Actor(config=config)
    for weight in (actor.model.lm_head.weight, actor.model.model.embed_tokens.weight):
        torch.nn.init.normal_(weight, std=0.3)
    actor.save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")
    rows = write_rows(root / "prompts.jsonl", [{"prompt": "a b"}] * 64)
    return dict(model=str(root / "policy"), train_data=[rows], cache_dir=str(root / "cache"), progress="off")


@torch.no_grad()
def distribution(model) -> torch.Tensor:
    """The probability of each of ANSWERS, float64."""
    width = len(PROMPT) + 2
    ids = torch.tensor([(PROMPT + answer + [0])[:width] for answer in ANSWERS])
    log_probs = model(ids)[:, len(PROMPT) :].double()
    log_probs[0, 1] = 0.0  # nothing is drawn after EOS
    return log_probs.sum(1).exp()


def optimum(reference: torch.Tensor, beta: float) -> torch.Tensor:
    rewards = torch.tensor([Table().of(answer) for answer in ANSWERS], dtype=torch.float64)
    return torch.softmax(reference.log() + rewards / beta, 0)


def total_variation(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().sum().item() / 2


def trained(task, runtime, output, beta: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution before and after 100 iterations of 256 answers, at a learning rate that falls to 0."""
    from coati.trainers.ppo import PPOConfig, PPOTrainer

    settings = task | dict(output_dir=str(output), seed=seed, kl_coefficient=beta, gae_lambda=1.0, max_new_tokens=2)
    settings |= dict(steps=100, batch_size=256, micro_batch_size=256, generation_batch_size=256, value_clip=0.0)
    settings |= dict(learning_rate=1e-2, critic_learning_rate=1e-2, warmup=0.0, final_rate=0.0)
    trainer = PPOTrainer(PPOConfig(**settings), runtime, rewards=[Table()])
    while trainer.step < trainer.total_steps:
        trainer.train_step(trainer.step)
        trainer.step += 1
    return distribution(trainer.reference.module), distribution(trainer.actor.module)


def check(task, runtime, output, beta: float, seed: int) -> float:
    before, after = trained(task, runtime, output, beta, seed)
    assert before.sum() == pytest.approx(1, abs=1e-5) and after.sum() == pytest.approx(1, abs=1e-5)
    best = optimum(before, beta)
    assert total_variation(before, best) > 0.3  # there was something to learn
    assert total_variation(optimum(before, 1.1 * beta), best) > 0.02  # a penalty 10 % off would be noticed
    distance = total_variation(after, best)
    assert distance < 0.02
    return distance


def test_ppo_finds_the_optimum_that_theory_gives(task, runtime, tmp_path):
    check(task, runtime, tmp_path, beta=0.5, seed=0)


@pytest.mark.slow
def test_ppo_finds_it_for_three_penalties_and_three_seeds(task, runtime, tmp_path):
    """Rewrites the table in docs/reading-the-curves.md."""
    lines = ["| $\\beta$ | seed 0 | seed 1 | seed 2 |", "|---|---|---|---|"]
    for beta in (0.25, 0.5, 1.0):
        found = [check(task, runtime, tmp_path / f"{beta}-{seed}", beta, seed) for seed in range(3)]
        lines.append(f"| {beta} | " + " | ".join(f"{distance:.4f}" for distance in found) + " |")
    fill_figures(ROOT / "docs" / "reading-the-curves.md", "\n".join(lines), "theory")
