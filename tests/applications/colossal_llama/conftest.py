"""Tiny tokenizers of both kinds, texts in two languages, and the real texts where they are."""

import io
import json
import random
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data" / "text"
ENGLISH = "the red lamp and the blue chair were sent back as they came too late please help me with order".split()  # noqa: SIM905
CHINESE = "人工智能 学习 模型 数据 我们 他们 今天 天气 很好 北京 大学 学生 老师 图书馆 机器学习 深度学习".split()  # noqa: SIM905
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def english(seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(ENGLISH) for _ in range(20)) + f"? No. {seed}!"


def chinese(seed: int) -> str:
    generator = random.Random(seed)
    words = [generator.choice(CHINESE) for _ in range(20)]
    return "，".join("".join(words[i : i + 4]) for i in range(0, 20, 4)) + f"。{english(seed)[:9]}\n" + words[0]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_sentencepiece(folder: Path, model_type: str = "bpe", size: int = 400) -> str:
    import sentencepiece

    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([english(seed) for seed in range(200)]),
        model_writer=model,
        model_type=model_type,
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    return str(folder)


def write_byte_level(folder: Path) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([english(seed) for seed in range(200)], trainer)
    # special tokens behind the vocabulary, as Llama-3's and Qwen's
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, str]:
    """Folders by kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": write_sentencepiece(root / "sentencepiece"),
        "byte-level": write_byte_level(root / "byte-level"),
    }


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "zh.jsonl"
    return write_jsonl(path, [{"source": "", "target": chinese(seed)} for seed in range(150)])


@pytest.fixture(scope="session")
def extended(tokenizers, corpus, tmp_path_factory) -> dict[str, dict]:
    """Reports by kind; `report["settings"]["output"]` is the folder."""
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    root = tmp_path_factory.mktemp("extended")
    return {
        kind: extend(
            ExtendConfig(
                tokenizer=folder,
                output=str(root / kind),
                corpus=[corpus],
                size=120,
                min_frequency=5,
                sample_size=100,
                progress="off",
            )
        )
        for kind, folder in tokenizers.items()
    }


@pytest.fixture(scope="session")
def real_texts() -> Path:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is absent")
    return SHARED
