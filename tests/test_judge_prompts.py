"""Prompts for a model that learns to judge, and the reward of its verdicts."""

import json
import sys

import pytest
import yaml

from coati.data import DataConfig, build_dataset, parse_record
from coati.errors import UserError
from coati.judges.questions import boundary, read_better
from examples.judge_prompts import main
from tests.conftest import ROOT, write_rows
from tests.docs.pages import blocks
from tests.rewards.samples import rewards_of, samples

PAIRS = [
    {"prompt": "Which color?", "chosen": "red", "rejected": "Better: A"},
    {
        "prompt": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
        + [{"role": "user", "content": "and?"}],
        "chosen": "yes",
        "rejected": "no",
    },
    {"prompt": "Which?", "chosen": "one", "rejected": "two", "preference": "tie"},
]


def run(monkeypatch, tmp_path, *words: str) -> list[dict]:
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    output = tmp_path / "judge.jsonl"
    monkeypatch.setattr(sys, "argv", ["judge_prompts.py", "--pairs", pairs, "--output", str(output), *words])
    main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_each_pair_is_asked_about_in_both_orders(monkeypatch, tmp_path, capsys):
    rows = run(monkeypatch, tmp_path)
    assert "4 prompts of 2 pairs" in capsys.readouterr().out and [row["answer"] for row in rows] == ["A", "B"] * 2
    texts = [row["prompt"][0]["content"] for row in rows]
    mark = boundary("red", "Better: A", "Which color?")
    assert f"[response A {mark}]\nred\n" in texts[0] and f"[response B {mark}]\nBetter: A\n" in texts[0]
    assert texts[1].index("Better: A\n") < texts[1].index("]\nred\n")
    assert "user: hi\n\nassistant: ho\n\nuser: and?" in texts[2]
    assert all("Say shortly what is right" in text for text in texts) and "completion" not in rows[0]


def test_prompts_for_the_verdict_alone_are_rows_of_sft_too(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, "--reasons", "False")
    assert [row["completion"] for row in rows] == ["Better: A", "Better: B"] * 2
    assert all(read_better(row["completion"]) == row["answer"] for row in rows)
    assert "Say shortly" not in rows[0]["prompt"][0]["content"]
    assert [message["content"] for message in parse_record(rows[0], "sft")[0].messages][-1] == "Better: A"


def test_what_is_asked_may_be_a_text_of_ones_own(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, "--prompt", "A {response_a}, B {response_b}: {prompt}")
    assert [row["prompt"][0]["content"] for row in rows[:2]] == [
        "A red, B Better: A: Which color?",
        "A Better: A, B red: Which color?",
    ]
    with pytest.raises(UserError, match=r"lacks \{response_b\}"):
        run(monkeypatch, tmp_path, "--prompt", "A {response_a}")


def test_rows_are_prompts_of_a_run(monkeypatch, tmp_path, tiny_world):
    from transformers import AutoTokenizer

    from coati.data import prepare_tokenizer

    run(monkeypatch, tmp_path)
    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(tiny_world["tokenizer"]))
    config = DataConfig(cache_dir=str(tmp_path / "cache"), max_prompt_length=4096)
    data = build_dataset([str(tmp_path / "judge.jsonl")], "prompt", tokenizer, config)
    assert [sample.columns["answer"] for sample in data] == ["A", "B"] * 2


def test_a_row_that_is_no_pair_is_named(monkeypatch, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [PAIRS[0], {"prompt": "x"}])
    monkeypatch.setattr(sys, "argv", ["judge_prompts.py", "--pairs", pairs, "--output", str(tmp_path / "out.jsonl")])
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: "):
        main()
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("response", "finish_reason", "pays"),
    [
        ("The first is right.\nBetter: A", "eos", True),
        ("Better: A", "eos", True),
        ("Better: A\n", "eos", True),
        ("Better: B", "eos", False),
        ("Better: tie", "eos", False),
        ("Better: A\nBetter: B", "eos", False),  # the last line counts
        ("Better: B\nBetter: A", "eos", True),
        ("Better: A, or Better: B", "eos", False),
        ("Better: A because it is red", "eos", False),
        ("I would not say Better: A", "eos", False),
        ("Better: A or B", "eos", False),
        ("Better: AB", "eos", False),
        ("Better: A", "length", False),  # it may have gone on
        ("", "eos", False),
    ],
)
def test_the_documented_reward_pays_for_a_last_line_that_is_right(response, finish_reason, pays):
    [text] = [b.text for b in blocks(ROOT / "docs" / "rewards.md", "yaml") if "Better" in b.text]
    [reward] = rewards_of(*yaml.safe_load(text)["rewards"])
    [sample] = samples(["Which?"], [response], finish_reason, answer=["A"])
    [score] = reward.make("cpu").score([sample])
    assert bool(score) is pays
