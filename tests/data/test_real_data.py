"""The shared data sets, where they are at hand."""

from pathlib import Path

import pytest

from coati.data import DataConfig, build_dataset

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data sets are not at {DATA}")


def build(name: str, kind: str, tokenizer_for, tmp_path, **settings):
    config = DataConfig(cache_dir=str(tmp_path), max_length=10**6, max_prompt_length=10**6, **settings)
    return build_dataset([str(DATA / name)], kind, tokenizer_for("default"), config)


def decode_labels(sequence, tokenizer) -> str:
    return tokenizer.decode([i for i, m in zip(sequence.input_ids, sequence.loss_mask, strict=True) if m])


def test_every_hh_rlhf_row_parses_but_for_two_empty_responses(tokenizer_for, tmp_path):
    """PITFALL 20: 1,660 rows; lines 676 and 1620 have an empty chosen response."""
    data = build("hh_rlhf/train.jsonl", "preference", tokenizer_for, tmp_path, bad_rows="drop")
    [problem] = data.report.problems
    assert len(data) == 1658
    assert (problem.reason, problem.count, problem.lines) == ("a response is empty", 2, [676, 1620])
    tokenizer = tokenizer_for("default")
    for row in range(0, len(data), 50):
        chosen, rejected = data[row].chosen, data[row].rejected
        start = chosen.loss_mask.index(True)
        assert start == rejected.loss_mask.index(True)
        assert chosen.input_ids[:start] == rejected.input_ids[:start]
        assert tokenizer.decode(chosen.input_ids[:start]).endswith("\nAssistant:")


def test_every_hh_rlhf_row_gives_a_prompt(tokenizer_for, tmp_path):
    assert len(build("hh_rlhf/train.jsonl", "prompt", tokenizer_for, tmp_path)) == 1660


@pytest.mark.parametrize(
    "name, kind, samples",
    [
        ("t0_sft/test.jsonl", "sft", 500),
        ("self_instruct/seed_tasks.jsonl", "sft", 175),
        ("self_instruct/user_oriented_instructions.jsonl", "sft", 200),
        ("gsm8k/train.jsonl", "prompt", 7473),
        ("gsm8k/test.jsonl", "sft", 1000),
    ],
)
def test_every_row_gives_a_sample(name, kind, samples, tokenizer_for, tmp_path):
    data = build(name, kind, tokenizer_for, tmp_path)
    assert len(data) == samples
    if kind == "prompt":
        assert "####" in data[0].columns["answer"] and "####" not in data[0].text


def test_t0_labels_are_the_completions(tokenizer_for, tmp_path):
    """PITFALL 14 and 16 on 5,000 real rows."""
    import json

    tokenizer = tokenizer_for("default")
    data = build("t0_sft/train.jsonl", "sft", tokenizer_for, tmp_path)
    lines = (DATA / "t0_sft/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(data) == len(lines) == 5000
    for row in range(0, 5000, 25):
        completion = json.loads(lines[row])["completion"]
        assert decode_labels(data[row], tokenizer) == " " + completion + "</s>"
