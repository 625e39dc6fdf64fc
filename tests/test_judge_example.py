"""The example of a model that learns to judge: its data, what its reward pays, and what is told of judges."""

import json
from collections import Counter

import pytest
import yaml

from coati.samples import Sample
from examples.judge.data import KINDS, SIZES, VERDICT, judgment, make_data, tokenizer
from examples.judge.run import JUDGMENT, MAJORITY, ONE, accuracy_by_kind, figures_of, walk
from examples.process_reward.data import solution
from tests.conftest import ROOT
from tests.rewards.samples import rewards_of, samples

JUDGED = ("marked", "validation", "held_out")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), 1)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers_of(prompt: str) -> list[int]:
    return [int(number) for number in prompt.split("=")[0].split("+")]


def test_half_of_the_responses_are_right_and_the_verdict_says_which(files):
    for name in (*JUDGED, "verdicts"):
        rows = rows_of(files[name])
        assert Counter(row["answer"] for row in rows) == {"right": SIZES[name], "wrong": SIZES[name]}
        for row in rows:
            _, *steps = row["prompt"].strip("\n").split("\n")
            assert (steps == solution(numbers_of(row["prompt"]))) == (row["answer"] == "right")
    assert {row["mistake"] for row in rows_of(files["held_out"])} == {"none", *KINDS}


def test_a_judgment_marks_each_step_up_to_the_first_mistake(files):
    for row in rows_of(files["held_out"]):
        _, *steps = row["prompt"].strip("\n").split("\n")
        right = solution(numbers_of(row["prompt"]))
        *lines, verdict = row["completion"].split("\n")
        marks = [line[-2:] for line in lines]
        assert marks == ["ok"] * (len(lines) - 1) + ["ok" if verdict == "right" else "no"]
        for i, line in enumerate(lines):
            assert (line[-2:] == "ok") == (steps[i : i + 1] == right[i : i + 1])
        assert verdict == row["answer"]


def test_a_step_too_many_is_copied_and_wrong():
    assert judgment(["06+5=11", "11+4=15"], ["06+5=11"]) == "06+5=11 ok\n11+4=15 no\nwrong"


def test_the_rows_of_grpo_do_not_tell_the_marks(files):
    assert all({*row} == {"prompt", "answer", "mistake"} for row in rows_of(files["verdicts"]))


def test_the_discriminative_model_is_told_the_same_verdicts_and_nothing_else(files):
    for name in ("verdicts", "held_out"):
        rows, outcomes = rows_of(files[name]), rows_of(files[f"{name}_outcome"])
        for row, outcome in zip(rows, outcomes, strict=True):
            assert row["prompt"] == outcome["prompt"] + "\n".join(outcome["steps"]) + "\n\n"
            assert outcome["labels"] == [None] * (len(outcome["steps"]) - 1) + [row["answer"] == "right"]


def test_the_same_seed_gives_the_same_bytes_and_no_sum_stands_in_two_files(files, tmp_path):
    again = make_data(tmp_path, 1)
    assert all(files[name].read_bytes() == again[name].read_bytes() for name in again if name != "tokenizer")
    sums = [number for name in SIZES for number in {tuple(numbers_of(row["prompt"])) for row in rows_of(files[name])}]
    assert len({*sums}) == len(sums) == sum(SIZES.values())


def test_texts_come_back_from_their_tokens_and_fit_the_settings(files):
    made, settings = tokenizer(), yaml.safe_load((ROOT / "examples/judge/grpo.yaml").read_text())
    for row in rows_of(files["held_out"]):
        for text, longest in ((row["prompt"], "max_prompt_length"), (row["completion"], "max_new_tokens")):
            ids = made(text, add_special_tokens=False)["input_ids"]
            assert made.decode(ids) == text and made.pad_token_id not in ids
            assert len(ids) < (settings["data"] | settings["generation"])[longest]  # with EOS


RIGHT = "06+5=11 ok\n11+4=15 ok\nright"
NOT_PAID = {
    "the other verdict": "06+5=11 ok\n11+4=15 no\nwrong",
    "no verdict": "06+5=11 ok\n11+4=15 ok\n",
    "a verdict without thoughts": "right",
    "a verdict before the thoughts": "right\n06+5=11 ok\n11+4=15 ok\n",
    "a verdict before and after the thoughts": "right\n06+5=11 ok\nright",
    "both verdicts": "06+5=11 ok\nwrongright",
    "both verdicts on lines": "06+5=11 ok\nwrong\nright",
    "the same verdict twice": "06+5=11 ok\nright\nright",
    "a step without a mark": "06+5=11\n11+4=15 ok\nright",
    "marks without steps": " ok\n ok\nright",
    "something after the verdict": "06+5=11 ok\nright\n",
    "nothing": "",
}


def paid(response: str, finish_reason: str = "eos") -> bool:
    """Whether grpo.yaml pays a response where `right` is the right verdict."""
    settings = yaml.safe_load((ROOT / "examples/judge/grpo.yaml").read_text())
    [reward] = rewards_of(*settings["rewards"])
    assert reward.pattern == VERDICT  # by which judges are measured
    [score] = reward.make("cpu").score(samples([""], [response], finish_reason, answer=["right"]))
    return bool(score)


def test_the_reward_pays_for_the_right_verdict_whatever_the_marks_are():
    assert paid(RIGHT)
    assert paid(RIGHT.replace("ok", "no"))


@pytest.mark.parametrize("name", NOT_PAID)
def test_the_reward_does_not_pay_for(name):
    assert not paid(NOT_PAID[name])


def test_the_reward_does_not_pay_for_a_judgment_that_was_cut_off():
    assert not paid(RIGHT, "length")


def judged(response: str, verdict: float) -> Sample:
    return Sample(0, {}, "", response, [], [], None, "eos", rewards={"verdict": verdict})


def test_a_majority_needs_more_than_half_of_the_verdicts():
    rows = [{"completion": "a", "mistake": "none"}, {"completion": "b", "mistake": "start"}]
    groups = [[judged("a", 1.0), judged("a", 0.0)], [judged("c", 0.0), judged("b", 1.0), judged("b", 1.0)]]
    found = figures_of(groups, rows)
    assert {name: share for name, (share, _, _) in found.items()} == {ONE: 0.5, MAJORITY: 0.5, JUDGMENT: 0.5}
    assert all(low < share < high for share, low, high in found.values())


def test_accuracy_by_kind_is_of_all_verdicts():
    rows = [{"mistake": kind} for kind in ("none", *KINDS)]
    groups = [[judged("", 1.0), judged("", float(row["mistake"] == "none"))] for row in rows]
    assert accuracy_by_kind(groups, rows) == {"none": 1.0} | dict.fromkeys(KINDS, 0.5)


@pytest.mark.slow
def test_the_example_goes_from_nothing_to_its_figures(tmp_path):
    """Two steps of each stage with few sums: that every stage starts from what the one before it left, and that all
    judges are measured. Nothing is learned."""
    sizes = dict.fromkeys(SIZES, 40)
    walk(tmp_path, 0, 1, sizes, steps=2, batch_size=8, eval_every=2)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert {*found["figures"]} == {*found["kinds"], "the discriminative model"}
    assert all(low <= share <= high for judge in found["figures"].values() for share, low, high in judge.values())
