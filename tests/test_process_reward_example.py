"""The example of process reward models: its data, and what is told of responses."""

import json
import re
from collections import Counter
from itertools import zip_longest

import pytest

from coati.data import DataConfig, parse_record, prepare_tokenizer, tokenize
from coati.samples import Sample
from examples.process_reward.data import SIZES, complete, correct, flawless, make_data, tokenizer
from examples.process_reward.run import MEASURES, N, best_of, comparison


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), 1)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def faults(row: dict) -> list[str]:
    """Of each step what is wrong with it, or nothing: its `form`, the number that it starts from (`start`), the
    `number` that it adds, its `result`, or that there is nothing left to add (`too long`)."""
    found = []
    first, *numbers = row["prompt"].removesuffix("=").split("+")
    before = f"{int(first):02d}"
    for step, number in zip_longest(row["steps"], numbers):
        parts = re.fullmatch(r"(\d\d)\+(\d)=(\d\d)", step)
        if parts is None:
            found.append("form")
            before = ""
            continue
        start, second, result = parts.groups()
        if number is None:
            found.append("too long")
            break
        right = {"start": start == before, "number": second == number}
        right["result"] = int(start) + int(second) == int(result)
        found.append("".join(name for name, holds in right.items() if not holds))
        before = result
    return found


def test_labels_say_which_steps_are_wrong(files):
    seen = Counter()
    for row in rows_of(files["steps_eval"]):
        found = faults(row)
        end = row["labels"].index(0) + 1 if 0 in row["labels"] else len(row["steps"])
        assert [not fault for fault in found[:end]] == [label == 1 for label in row["labels"][:end]]
        assert row["labels"][end:] == [None] * (len(row["steps"]) - end)
        seen[found[end - 1]] += 1
    assert seen == dict.fromkeys(("", "result", "number", "start", "form", "too long"), SIZES["labeled_eval"])


def test_of_a_pair_only_the_chosen_solution_is_right(files):
    assert len(rows_of(files["pairs_eval"])) == 5 * SIZES["labeled_eval"]
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


@pytest.mark.parametrize(
    ("response", "answer", "steps"),
    [
        ("06+5=11\n11+4=15", 1.0, 1.0),
        ("06+5=10\n10+4=15", 1.0, 0.0),  # two mistakes that cancel out
        ("06+5=11\n11+4=16", 0.0, 0.0),
        ("06+5=11", 0.0, 0.0),
        ("11+4=15", 1.0, 0.0),
        ("06+5=11\n11+4=15\n15+1=16", 0.0, 0.0),
    ],
)
def test_an_answer_may_be_right_where_a_step_is_wrong(response, answer, steps):
    assert correct(["6+5+4="], [response], ["15"]) == [answer]
    assert flawless(["6+5+4="], [response]) == [steps]


LOW = dict.fromkeys(("min", "product", "last", "outcome", *MEASURES), 0.0)


def sample(**rewards) -> Sample:
    """With rewards by name, where `answer` and `steps` stand for what they are in `MEASURES`."""
    names = dict(zip(("answer", "steps"), MEASURES, strict=True))
    given = {names.get(name, name): value for name, value in rewards.items()}
    return Sample(0, {}, "", "", [], [], None, "eos", rewards=LOW | given)


def test_the_best_response_is_chosen_by_each_score():
    group = [sample(), sample(min=0.9), sample(outcome=3.0, answer=1.0)]
    figures = best_of([group, [sample(answer=1.0, steps=1.0)]])
    assert {name: tuple(share for share, _, _ in found.values()) for name, found in figures.items()} == {
        "one response": (0.5, 0.5),
        f"best of {N} by steps, min": (0.5, 0.5),
        f"best of {N} by steps, product": (0.5, 0.5),
        f"best of {N} by steps, last": (0.5, 0.5),
        f"best of {N} by the outcome reward model": (1.0, 0.5),
        f"any of {N} is right": (1.0, 0.5),
    }
    shares = [share for found in figures.values() for share in found.values()]
    assert all(low < share <= high for share, low, high in shares if share < 1)


def test_choices_are_compared_where_only_one_of_them_is_right():
    only_steps = [sample(min=0.9, answer=1.0), sample(outcome=3.0)]
    only_outcome = [sample(outcome=3.0, answer=1.0), sample(min=0.9)]
    both, neither = [sample(answer=1.0)], [sample()]
    groups = [only_outcome, both, *[only_steps] * 5, neither]
    told = comparison(groups, "right answer")
    assert "of 8 prompts" in told and "(min) in 5, only" in told and "by outcome in 1;" in told
    assert "p = 0.22 " in told  # 2 (1 + 6) / 2^6
    assert "p = 1 " in comparison(groups, "every step right")
