"""Labels of steps by sampling: from the tokens of each step on, as often as was asked for."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from coati.config import configure
from coati.data import parse_record
from coati.rewards import Scorer
from coati.rewards.function import FunctionReward
from coati.rollout.generator import Completion
from coati.samples import Sample
from examples.label_steps import LabelStepsConfig, StepLabeler, main, steps_of_response


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return AutoTokenizer.from_pretrained(tiny_world["tokenizer"])


class Scripted:
    """Responds with given texts, one after the other, and keeps what it was asked for."""

    def __init__(self, tokenizer, responses, finish_reason="eos"):
        self.tokenizer, self.responses, self.finish_reason = tokenizer, list(responses), finish_reason
        self.requests = []

    def generate(self, requests, sampling):
        self.requests += requests
        texts = [self.responses.pop(0) for _ in requests]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [Completion([*row, self.tokenizer.eos_token_id], None, self.finish_reason) for row in ids]


def labeler(generator, tokenizer, **changes):
    settings = dict(model="m", prompts="p", output="o", completions=2, max_new_tokens=30) | changes
    right = FunctionReward(lambda prompts, responses, **_: [float(r.endswith("lamp")) for r in responses], "right")
    scorer = Scorer([(right, 1.0)])
    return StepLabeler(configure(LabelStepsConfig, **settings), generator, scorer, tokenizer, [tokenizer.eos_token_id])


def prompt(tokenizer):
    ids = tokenizer("User: x\n", add_special_tokens=False)["input_ids"]
    return Sample(1, {}, "User: x\n", "", ids, [], None, "")


@pytest.mark.parametrize(("hard", "labels"), [(False, [0.5, 0.0, 1.0]), (True, [1.0, 0.0, 1.0])])
def test_a_label_is_the_share_of_right_completions(tokenizer, hard, labels):
    generator = Scripted(tokenizer, ["red\nblue clock\ngreen lamp", "a lamp", "red", "sorry", "help"])
    asked = prompt(tokenizer)
    [(steps, found)] = labeler(generator, tokenizer, hard=hard).label([asked])
    assert steps == ["red", "blue clock", "green lamp"] and found == labels
    begun = [tokenizer.decode(request.prompt[len(asked.tokens) :]) for request in generator.requests]
    assert begun == ["", "red\n", "red\n", "red\nblue clock\n", "red\nblue clock\n"]
    assert len({tuple(request.seed) for request in generator.requests}) == 5
    lengths = [len(tokenizer(text)["input_ids"]) for text in begun]
    assert [request.max_new_tokens for request in generator.requests] == [30 - length for length in lengths]


def test_the_last_step_of_a_truncated_response_has_no_label(tokenizer):
    generator = Scripted(tokenizer, ["red\nblue lamp", "a", "lamp", ""], "length")
    assert labeler(generator, tokenizer).label([prompt(tokenizer)]) == [(["red"], [0.5])]
    assert labeler(generator, tokenizer).label([prompt(tokenizer)]) == [([], [])]


def test_steps_begin_where_others_end(tokenizer):
    ids = tokenizer(" red \n\n  blue lamp\n", add_special_tokens=False)["input_ids"]
    steps = steps_of_response(ids, tokenizer, "\n")
    assert [step.text for step in steps] == ["red", "blue lamp"]
    first, last = (tokenizer.decode(step.tokens) for step in steps)
    assert " red \n\n".startswith(first.rstrip(" ")) and first.startswith(" red") and last == " red \n\n  blue lamp\n"
    others = tokenizer("red / lamp / ok", add_special_tokens=False)["input_ids"]
    assert [step.text for step in steps_of_response(others, tokenizer, " / ")] == ["red", "lamp", "ok"]
    assert steps[0].tokens == ids[: len(steps[0].tokens)] and steps_of_response([], tokenizer, "\n") == []


def test_the_written_rows_are_what_process_reward_models_learn_from(tiny_world, tmp_path, monkeypatch, capsys):
    output = tmp_path / "steps.jsonl"
    reward = f"{{type: function, path: {tiny_world['rewards']}:odd}}"
    words = f"--model {tiny_world['policy']} --prompts {tiny_world['prompts_eval']} --output {output} --rows 3"
    words += " --responses 2 --completions 3 --max_new_tokens 12"
    monkeypatch.setattr(sys, "argv", ["label_steps.py", *words.split(), "--step_separator", " ", "--rewards", reward])
    main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert 0 < len(rows) <= 6 and f"{len(rows)} responses of" in capsys.readouterr().out
    for row in rows:
        [record] = parse_record(row, "stepwise")
        assert record.prompt[0]["role"] == "user" and record.steps
        assert all(3 * label == pytest.approx(round(3 * label)) for label in record.labels)
