"""The parts of the example: texts, and what is measured on them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from colossal_llama.example import measure as example
from colossal_llama.example import texts as example_texts
from colossal_llama.pretraining.pretrain_trainer import PretrainConfig
from colossal_llama.pretraining.stage_plan import parse_stages
from tests.conftest import ROOT


def test_texts_are_cut_at_lines_and_nothing_is_lost(tmp_path):
    text = "".join(f"line {i} " + "x" * (i * 37 % 700) + "\n" for i in range(60))
    (tmp_path / "en_a.txt").write_text(text)
    pieces = list(example_texts.read_pieces(tmp_path / "en_a.txt"))
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(len(piece) <= example_texts.LONGEST and piece.endswith("\n") for piece in pieces)


def test_every_tenth_document_is_held_back(tmp_path):
    for language in ("en", "zh"):
        rows = [json.dumps({"source": "", "target": f"{language} text {i}"}) + "\n" for i in range(25)]
        (tmp_path / f"{language}_a.jsonl").write_text("".join(rows))
    example_texts.write_texts(tmp_path, tmp_path / "data")

    def read(name):
        return [json.loads(line)["text"] for line in (tmp_path / "data" / f"{name}.jsonl").open()]

    for language in ("en", "zh"):
        assert read(f"{language}_eval") == [f"{language} text {i}" for i in (0, 10, 20)]
        assert not set(read(language)) & set(read(f"{language}_eval")) and len(read(language)) == 22
    assert (tmp_path / "data" / "english" / "tokenizer.json").is_file()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_losses_of_documents_are_the_plain_models(adds_bos, tiny_world, monkeypatch, tmp_path):
    """In windows too: each begins with the last token of the one before, the first with BOS or EOS; every token of a
    document counts once."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_world["policy"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_world["policy"])
    assert tokenizer("a", add_special_tokens=False) == tokenizer("a")  # it adds none
    first, folder = tokenizer.eos_token_id, Path(tiny_world["policy"])
    if adds_bos:
        first, folder = tokenizer.bos_token_id, shutil.copytree(folder, tmp_path / "with-bos")
        bos = (tokenizer.bos_token, first)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
        tokenizer.save_pretrained(folder)
    documents = ["red blue green lamp", "order refund late soon thank please happy help sorry never", "chair"]
    for window in (256, 5):
        monkeypatch.setattr(example, "WINDOW", window)
        expected = []
        for text in documents:
            ids, loss = [first, *tokenizer(text, add_special_tokens=False)["input_ids"]], 0.0
            for t in range(1, len(ids)):
                start = (t - 1) // (window - 1) * (window - 1)
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start:t]])).logits[0, -1].double()
                loss -= logits.log_softmax(-1)[ids[t]].item()
            expected.append(loss)
        assert example.document_losses(folder, documents) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("plan", "stages"), [("english", ["english"]), ("chinese", ["warm-up", "knowledge", "replay"])]
)
def test_its_plans_are_plans(plan, stages):
    path = ROOT / "applications" / "colossal_llama" / "example" / f"{plan}.yaml"
    found = parse_stages(PretrainConfig, "", ["--config", str(path)])
    assert [stage.tracking.run_name for stage in found.stages] == stages


def test_bits_and_their_interval():
    texts = ["ab", "abcd"]
    assert example.bits([2 * math.log(2), 4 * math.log(2)], texts) == pytest.approx(1.0)
    nats, characters = np.random.default_rng(0).normal(1.0, 0.5, 400), np.full(400, 10)
    low, high = example.interval(nats, characters)
    mean, error = nats.mean() / 10 / math.log(2), nats.std() / 20 / 10 / math.log(2)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error)
