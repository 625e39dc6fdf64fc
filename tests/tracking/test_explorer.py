"""Which samples are on the report's page, as data for its script."""

import json

import pytest

from coati.tracking.explorer import CHARACTERS, ROWS, STEPS, as_script_data, evenly, explorer, sample_data


def row(step, prompt="p", response="r", name="samples", **more):
    return {"step": step, "name": name, "prompt": prompt, "response": response, **more}


@pytest.mark.parametrize("count", [1, 2, STEPS, STEPS + 1, 1000])
def test_steps_are_thinned_evenly_and_both_ends_stay(count):
    steps = [7 * i for i in range(count)]
    kept = evenly(steps, STEPS)
    assert kept == sorted(set(kept)) and set(kept) <= set(steps)
    assert (kept[0], kept[-1], len(kept)) == (0, steps[-1], min(count, STEPS))


def test_what_is_left_out_is_counted():
    samples = [row(step, f"p{i}") for step in range(STEPS + 3) for i in range(ROWS + 1)]
    data = sample_data([("a", samples), ("b", [row(1)])])
    assert len(data["samples"]) == STEPS * ROWS + 1
    assert data["left_out"] == len(samples) - STEPS * ROWS
    assert {sample["run"] for sample in data["samples"]} == {0, 1} and data["runs"] == ["a", "b"]


def test_lengths_are_tokens_where_all_samples_tell_them():
    told = [row(1, response="twelve chars", response_length=3)]
    assert sample_data([("a", told)])["length_unit"] == "tokens"
    assert sample_data([("a", told)])["samples"][0]["length"] == 3
    mixed = sample_data([("a", told), ("b", [row(1, response="four")])])
    assert mixed["length_unit"] == "characters"
    assert [sample["length"] for sample in mixed["samples"]] == [12, 4]


def test_a_sample_has_its_texts_reward_turns_and_whatever_else_was_logged():
    turns = [{"role": "assistant", "content": "call", "reward": 0.5, "tokens": 2, "malformed_call": "no quotes"}]
    turns.append({"role": "tool", "content": "x" * (CHARACTERS + 1)})
    [sample] = sample_data([("a", [row(4, conversation=turns, reward=-1.5, correct=1.0)])])["samples"]
    assert (sample["step"], sample["reward"], sample["more"]) == (4, -1.5, {"correct": "1.0"})
    assert sample["turns"][0] == {"role": "assistant", "text": "call\n(no call: no quotes)", "reward": 0.5}
    assert sample["turns"][1] == {"role": "tool", "text": "x" * CHARACTERS + " […]", "reward": None}


def test_a_reward_that_is_no_number_is_none():
    found = sample_data([("a", [row(1, reward="nan"), row(1), row(1, reward=None), row(1, reward=0)])])
    assert [sample["reward"] for sample in found["samples"]] == [None, None, None, 0]


@pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "<!--<script>", "a\u2028b", "&lt;", '"'])
def test_no_text_ends_the_script_that_holds_it(text):
    written = as_script_data({"text": text})
    assert "<" not in written
    assert json.loads(written) == {"text": text}


def test_without_samples_there_is_no_such_part():
    assert explorer([("a", []), ("b", [])]) == ""
