"""PPO against theory: the optimum of E[r] - beta KL(pi || pi_ref) is pi*(y), proportional to pi_ref(y) exp(r(y) / beta).

Answers of one or two tokens from a vocabulary of 8 are few enough to enumerate, so pi_ref, pi* and the trained policy are
known exactly. Nothing in the trainer is replaced: tokens are sampled, EOS (and the pad token, which may be sampled too)
ends or does not end an answer, the critic learns, advantages are whitened, ratios are clipped.
"""

import json
import math

import pytest
import torch

from tests.conftest import write_rows

VOCABULARY = ("<eos>", "<pad>", "a", "b", "c", "d", "e", "f")
EOS, PROMPT = 0, [2, 3]
ANSWERS = [[EOS]] + [[first, second] for first in range(1, 8) for second in range(8)]
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}{{- message.content + ' ' }}{% endif %}
{%- endfor %}"""


class Table:
    """A reward for each of the 57 answers: no rule to learn, two of five tokens' worth of it on the second token."""

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
