"""Models with random weights and rows of known lengths, for benchmarks and for measuring memory."""

import json
from collections.abc import Iterable
from pathlib import Path

PIECES = ("policy", "scorer")
SPECIAL_IDS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
PLAIN = (  # a dialogue with no words of the template's own
    "{{ bos_token }} {% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
REWARD = """def reward(prompts, responses, **columns):
    return [float(len(text) % 7) for text in responses]
"""


def words(start: int, count: int) -> str:
    """Text of that many tokens for the tokenizer of `write_models`."""
    return " ".join(f"w{(start * 31 + i) % 1000}" for i in range(count))


def write_models(folder: Path, size: dict, template: str | None = None):
    """A tokenizer of one token a word and two random Llamas: a policy and a reward model, in folders of these names."""
    import torch
    from transformers import LlamaConfig

    from coati.models import Actor, RewardModel

    folder.mkdir(parents=True)
    config = LlamaConfig(**dict(max_position_embeddings=512) | SPECIAL_IDS | size)
    config.save_pretrained(folder / "shape")
    tokenizer = word_tokenizer(config.vocab_size, template)
    torch.manual_seed(0)
    for name, model_class in zip(PIECES, (Actor, RewardModel), strict=True):
        model_class(config=config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_real_models(folder: Path, base: Path, template: str):
    """The same of a real model's weights, a new head for the reward model; its own tokenizer is left out, so that rows
    have the lengths that a benchmark wants."""
    from transformers import AutoConfig

    from coati.models import Actor, RewardModel

    folder.mkdir(parents=True)
    tokenizer = word_tokenizer(AutoConfig.from_pretrained(base).vocab_size, template)
    for name, model_class in zip(PIECES, (Actor, RewardModel), strict=True):
        model = model_class(str(base))
        model.config.update(SPECIAL_IDS)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def word_tokenizer(vocab_size: int, template: str | None):
    """A token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<bos>", "<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(vocab_size - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, chat_template=template)


def write_rows(path: Path, rows: Iterable[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
