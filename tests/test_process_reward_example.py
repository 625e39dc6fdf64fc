"""The example of process reward models: its data, and what is told of responses."""

import json
import re
from collections import Counter

import pytest

from coati.data import DataConfig, parse_record, prepare_tokenizer, tokenize
from coati.samples import Sample
from examples.process_reward.data import SIZES, complete, correct, make_data, tokenizer
from examples.process_reward.run import N, best_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), 1)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults(row: dict) -> list[str]:
    """Of each step what is wrong with it, its `result` or its `number`, which isn't the prompt's; or nothing."""
    found = []
    for step, number in zip(row["steps"], row["prompt"].removesuffix("=").split("+")[1:], strict=True):
        first, second, result = re.split(r"[+=]", step)
        found.append("result" if int(first) + int(second) != int(result) else "" if second == number else "number")
    return found


def test_labels_say_which_steps_are_wrong(files):
    seen = Counter()
    for row in rows_of(files["steps_eval"]):
        found = faults(row)
        end = row["labels"].index(0) + 1 if 0 in row["labels"] else len(row["steps"])
        assert [not fault for fault in found[:end]] == [label == 1 for label in row["labels"][:end]]
        assert row["labels"][end:] == [None] * (len(row["steps"]) - end) and not any(found[end:])
        results = [step.split("=")[1] for step in row["steps"]]
        assert [step.split("+")[0] for step in row["steps"][1:]] == results[:-1]
        seen[max(found)] += 1
    assert seen[""] == seen["result"] == seen["number"] == SIZES["labeled_eval"]


def test_of_a_pair_only_the_chosen_solution_is_right(files):
    assert len(rows_of(files["pairs_eval"])) == 2 * SIZES["labeled_eval"]
    for row in rows_of(files["pairs_eval"]):
        answer = [f"{sum(map(int, row['prompt'].removesuffix('=').split('+'))):02d}"]
        assert correct([row["prompt"]], [row["chosen"]], answer) == [1.0]
        assert correct([row["prompt"]], [row["rejected"]], answer) == [0.0]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("06+5=11\n11+4=15", 0.0),
        ("06+5=10\n10+4=99", 0.0),  # as far as its form goes
        ("06+5=11", -1.0),
        ("11+4=15", -1.0),
        ("06+5=11\n11+4=15\n15+4=19", -1.0),
        ("06+4=10\n10+5=15", -1.0),
        ("01+5=06\n06+4=10", -1.0),
        ("06+5=11\n02+4=06", -1.0),
        ("06+5=11\n11+4=15=", -1.0),
        ("06+5=11\n\n11+4=15", -1.0),
        ("", -1.0),
    ],
)
def test_a_response_has_a_line_for_each_number_of_its_prompt(response, score):
    assert complete(["6+5+4="], [response]) == [score]


def test_the_same_seed_gives_the_same_bytes_and_no_prompt_twice(files, tmp_path):
    again = make_data(tmp_path, 1)
    names = ("sft", "prompts_train", "steps", "steps_eval", "pairs", "pairs_eval", "prompts")
    assert all(files[name].read_bytes() == again[name].read_bytes() for name in names)
    parts = ("sft", "pairs", "pairs_eval", "prompts")
    prompts = [prompt for name in parts for prompt in {row["prompt"] for row in rows_of(files[name])}]
    assert len({*prompts}) == len(prompts) == sum(SIZES.values())


def test_every_step_ends_in_a_token_of_its_own(files):
    made, _ = prepare_tokenizer(tokenizer())
    for row in rows_of(files["steps_eval"])[:50]:
        [record] = parse_record(row, "stepwise")
        sample = tokenize(record, made, DataConfig())
        labels = [label for label in sample.labels if label == label]
        assert labels == [label for label in row["labels"] if label is not None]


def test_the_best_response_is_chosen_by_each_score():
    def sample(**rewards):
        return Sample(0, {}, "", "", [], [], None, "eos", rewards=rewards)

    low = dict.fromkeys(("min", "product", "last", "outcome", "correct"), 0.0)
    group = [sample(**low), sample(**low | dict(min=0.9)), sample(**low | dict(outcome=3.0, correct=1.0))]
    figures = best_of([group, [sample(**low | dict(correct=1.0))]])
    shares = {name: share for name, (share, _, _) in figures.items()}
    assert shares == {
        "one response": 0.5,
        f"best of {N} by steps, min": 0.5,
        f"best of {N} by steps, product": 0.5,
        f"best of {N} by steps, last": 0.5,
        f"best of {N} by the outcome reward model": 1.0,
        f"best of {N} by the right answer": 1.0,
    }
    assert all(low < share <= high for share, low, high in figures.values() if share < 1)
