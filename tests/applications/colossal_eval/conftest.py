"""Small benchmarks in their published layouts, and what is made of them."""

import csv
import json
from pathlib import Path

import pytest

from colossal_eval.prepare import PrepareConfig, prepare
from examples.tokenizer import byte_level_tokenizer
from tests.conftest import ROOT, SPECIAL

DATA = ROOT.parent / "shared" / "data"


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_mmlu(root: Path, subjects=("anatomy", "virology"), questions: int = 6) -> Path:
    """Questions of arithmetic; the right letter goes round."""
    for subject in subjects:
        for split, count in (("dev", 5), ("test", questions)):
            rows = []
            for i in range(count):
                choices = [str(3 * i + j) for j in range(4)]
                rows.append([f"What is {3 * i} + {i % 4} in {subject}?", *choices, "ABCD"[i % 4]])
            write_csv(root / split / f"{subject}_{split}.csv", rows)
    return root


def make_gsm8k(root: Path) -> Path:
    for name, count in (("train", 10), ("test", 4)):
        rows = [
            {
                "question": f"{'Really, ' * (i % 3)}Ann has {i} red lamps and {i} blue. How many?",
                "answer": f"{i} + {i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i},000",
            }
            for i in range(count)
        ]
        write_jsonl(root / f"{name}.jsonl", rows)
    return root


def make_agieval(root: Path) -> Path:
    row = {
        "passage": None,
        "question": "求值",
        "options": ["(A)一", "(B)二", "(C)三", "(D)"],
        "label": "B",
        "answer": None,
    }
    rows = [row, row | {"question": "多选", "label": ["C", "A"]}, row | {"label": "A"}]
    write_jsonl(root / "data" / "v1" / "gaokao-physics.jsonl", rows)
    cloze = {"passage": None, "question": "x=", "options": None, "label": None, "answer": "$5$"}
    write_jsonl(root / "data" / "v1" / "gaokao-mathcloze.jsonl", [cloze])
    shot = repr(row | {"options": ["A. 一\tB. 二 C. 三 D. 四"], "label": "D"})
    write_csv(
        root / "data" / "few_shot_prompts.csv",
        [["", "gaokao-physics", "gaokao-mathcloze"], ["sample 1", shot, repr(cloze)], ["explanation 1", "why", "so"]],
    )
    return root


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder of three prepared benchmarks: mmlu (2 subjects of 6 questions), agieval, gsm8k."""
    root, output = tmp_path_factory.mktemp("published"), tmp_path_factory.mktemp("prepared")
    for name, make in (("mmlu", make_mmlu), ("agieval", make_agieval), ("gsm8k", make_gsm8k)):
        prepare(PrepareConfig(benchmark=name, data=str(make(root / name)), output=str(output)))
    return output


def byte_tokenizer(vocabulary: int = 400):
    """A small byte-level BPE tokenizer that knows the benchmarks' words."""
    words = "Question: What is 12 + 3 in anatomy? A. B. C. D. E.\nAnswer: A B C D E\n\n题目：求值\n答案是：一二三"
    tokenizer = byte_level_tokenizer([words] * 4, vocabulary, SPECIAL)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def make_model(folder: Path, seed: int, length: int = 1024, sliding: bool = False, eos: int = 1) -> Path:
    """A random model whose answers depend on the question (large initial weights), with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = (MistralConfig if sliding else LlamaConfig)(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        initializer_range=0.6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=eos,
        pad_token_id=2,
        **({"sliding_window": 24} if sliding else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """Folders of models: "first", "second", "short" (256 tokens), "sliding" (a window of 24 tokens)."""
    root = tmp_path_factory.mktemp("models")
    return {
        "first": make_model(root / "first", 1),
        "second": make_model(root / "second", 2),
        "short": make_model(root / "short", 3, length=256),
        "sliding": make_model(root / "sliding", 4, sliding=True),
    }


@pytest.fixture
def harness(tiny, runtime, tmp_path):
    """Makes a `CoatiLM` of one of the tiny models."""
    from colossal_eval.run.harness_model import CoatiLM
    from colossal_eval.run.model_loading import load_model
    from colossal_eval.run.response_store import ResponseStore

    def make(name: str = "first", folder: Path | None = None, batch_tokens: int | None = None, **settings):
        loaded = load_model(name, folder or tiny[name], "float32", runtime.device, **settings)
        return CoatiLM(loaded, ResponseStore(tmp_path / "answers"), runtime.communicator, batch_tokens=batch_tokens)

    return make
