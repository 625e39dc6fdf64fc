"""Reward models on pairs in RewardBench's layout: the scores of their report, and what is kept."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from coati import responses
from coati.errors import UserError
from coati.models import RewardModel
from colossal_eval import reward_bench
from colossal_eval.results.reward_pairs import SECTIONS, calibration_error, report_of, report_text, summarize
from tests.applications.colossal_eval.conftest import make_model, write_jsonl

# what the benchmark weighs its subsets by: their pairs, but of mathematics, which has 447
PUBLISHED = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "math-prm": 984,
    **dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
}
PAIRS = [
    {"id": i, "subset": subset, "prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
    for i, subset in enumerate(["math-prm", "hep-cpp", "donotanswer", "of mine"] * 3)
]


def make_reward_model(folder: Path, seed: int = 5) -> Path:
    base = make_model(folder.with_name(f"{folder.name}-base"), seed)
    torch.manual_seed(seed)
    model = RewardModel(str(base))
    torch.nn.init.normal_(model.value_head.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def random_records(seed: int) -> list[dict]:
    draw = random.Random(seed)
    counts = PUBLISHED | {"math-prm": 447}
    return [
        {"subset": name, "chosen": draw.gauss(0.3, 1), "rejected": draw.gauss(0, 1)}
        for name, count in counts.items()
        for _ in range(count)
    ]


def test_sections_and_score_are_the_published_formula():
    records = random_records(0)
    found = summarize(records)
    sections = {}
    for section, subsets in SECTIONS.items():
        right = total = 0.0
        for name in subsets:
            of_subset = [r for r in records if r["subset"] == name]
            accuracy = sum(r["chosen"] > r["rejected"] for r in of_subset) / len(of_subset)
            assert found["subsets"][name]["value"] == pytest.approx(accuracy)
            right, total = right + accuracy * PUBLISHED[name], total + PUBLISHED[name]
        sections[section] = right / total
        assert found["sections"][section]["value"] == pytest.approx(sections[section])
        assert found["sections"][section]["n"] == sum(r["subset"] in subsets for r in records)
    assert set().union(*SECTIONS.values()) == set(PUBLISHED)
    assert found["score"]["value"] == pytest.approx(sum(sections.values()) / 4)
    part = summarize([r for r in records if not r["subset"].startswith("refusals")])
    assert part["score"] is not None and part["sections"]["Safety"] != found["sections"]["Safety"]
    assert summarize([r for r in records if r["subset"] not in SECTIONS["Chat"]])["score"] is None


def test_standard_errors_are_how_far_scores_of_many_draws_differ():
    """Of the section in which one subset weighs more than its pairs."""
    values = []
    for seed in range(300):
        reasoning = [r for r in random_records(seed) if r["subset"] in SECTIONS["Reasoning"]]
        values.append(summarize(reasoning)["sections"]["Reasoning"])
    center = sum(v["value"] for v in values) / len(values)
    deviation = math.sqrt(sum((v["value"] - center) ** 2 for v in values) / (len(values) - 1))
    assert values[0]["stderr"] == pytest.approx(deviation, rel=0.15)


def test_the_calibration_error_is_the_mean_distance_over_bins():
    differences = [random.Random(1).gauss(0.2, 2) for _ in range(50)] + [0.0, 0.0]
    bins = [[0.0, 0.0] for _ in range(10)]
    for d in differences:
        confidence = 1 / (1 + math.exp(-abs(d)))
        place = bins[min(int((confidence - 0.5) * 20), 9)]
        place[0] += confidence
        place[1] += 0.5 if d == 0 else d > 0
    assert calibration_error(differences) == pytest.approx(sum(abs(a - b) for a, b in bins) / len(differences))


def test_equal_rewards_are_wrong_and_told():
    constant = [{"subset": "math-prm", "chosen": 1.0, "rejected": 1.0}] * 3
    better = [{"subset": "math-prm", "chosen": 1.0, "rejected": 0.0}] * 3
    report = report_of({"same": constant, "good": better})
    assert report["models"]["same"]["mean"]["value"] == 0 and report["models"]["good"]["mean"]["value"] == 1
    assert report["differences"][0]["value"] == 1 and report["differences"][0]["p_value"] == 0.25
    text = report_text(report)
    assert "same: 3 pairs of equal rewards" in text and "| math-prm | 3 | 0.00 ± 0.00 | 100.00 ± 0.00 |" in text


def test_rewards_are_the_models_and_nothing_is_scored_twice(tmp_path, monkeypatch):
    folder, data = make_reward_model(tmp_path / "RM"), write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    config = reward_bench.RewardBenchConfig(models=[str(folder)], data=str(data), output=str(tmp_path / "out"))
    open_scorer = responses.open_scorer

    def dies_at_the_fifth(path, flag):
        score, asked = open_scorer(path, flag), []

        def scored(*pair):
            asked.append(pair)
            if len(asked) == 5:
                raise KeyboardInterrupt
            return score(*pair)

        return scored

    monkeypatch.setattr(responses, "open_scorer", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        reward_bench.evaluate(config)
    scored = []

    def counts(path, flag):
        score = open_scorer(path, flag)
        return lambda *pair: scored.append(pair) or score(*pair)

    monkeypatch.setattr(responses, "open_scorer", counts)
    report = reward_bench.evaluate(config)
    assert len(scored) == len(PAIRS) - 4
    score = open_scorer(str(folder))
    expected = [score([{"role": "user", "content": p["prompt"]}], [p["chosen"], p["rejected"]]) for p in PAIRS]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rewards-RM.jsonl").read_text().splitlines()]
    assert [[row["chosen"], row["rejected"]] for row in rows] == expected
    assert [(row["id"], row["subset"]) for row in rows] == [(str(p["id"]), p["subset"]) for p in PAIRS]
    assert report["models"]["RM"]["mean"]["value"] == sum(a > b for a, b in expected) / len(expected)
    assert set(report["models"]["RM"]["sections"]) == {"Safety", "Reasoning"} and not report["models"]["RM"]["score"]
    assert reward_bench.evaluate(config) == report and len(scored) == len(PAIRS) - 4
    limited = reward_bench.read_pairs(data, limit=1)
    assert [pair.subset for pair in limited] == [p["subset"] for p in PAIRS[:4]]


def test_what_can_not_be_scored_is_said_at_once(tmp_path):
    good = PAIRS[0]
    for wrong, said in [
        ({"subset": None}, r"pairs.jsonl:2: `subset` must be a text"),
        ({"rejected": None}, r"pairs.jsonl:2: .*rejected"),
        ({"chosen": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, r"pairs.jsonl:2"),
    ]:
        data = write_jsonl(tmp_path / "pairs.jsonl", [good, good | wrong])
        with pytest.raises(UserError, match=said):
            reward_bench.read_pairs(data)
    with pytest.raises(UserError, match="no file"):
        reward_bench.read_pairs(tmp_path / "missing.jsonl")
    data = write_jsonl(tmp_path / "pairs.jsonl", [good])
    policy = make_model(tmp_path / "policy", 1)
    config = reward_bench.RewardBenchConfig(models=[str(policy)], data=str(data), output=str(tmp_path / "out"))
    with pytest.raises(UserError, match="policy has no head, so it is no reward model"):
        reward_bench.evaluate(config)
