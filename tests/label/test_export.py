"""Exported rows are those one would write by hand, and coati's data pipeline reads them as they are meant."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.cli import main
from coati.data import load_rows, parse_record
from coati.label.export import kto_rows, preference_rows, sft_rows
from coati.label.results import Outcome
from coati.label.store import Pair
from tests.label.world import click, store_with

DIALOGUE = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
PAIRS = {
    1: Pair(1, "red?", ("yes", "no"), ("A", "B")),
    2: Pair(2, "blue?", ("yes", "no"), ("A", "B")),
    3: Pair(3, DIALOGUE, ("hello", "what"), ("A", "B")),
    4: Pair(4, "tie?", ("x", "y"), ("A", "B")),
    5: Pair(5, "bad?", ("x", "y"), ("A", "B")),
    6: Pair(6, "split?", ("x", "y"), ("A", "B")),
    7: Pair(7, "same?", ("x", "y"), ("A", "B")),
}
DECIDED = {
    1: Outcome("first"),
    2: Outcome("second", "no, it is red"),
    3: Outcome("first"),
    4: Outcome("tie"),
    5: Outcome("both_bad"),
    6: Outcome("split"),
    7: Outcome("first", "y"),
}


def said(text):
    return [{"role": "assistant", "content": text}]


def test_preference_rows():
    rows, left_out = preference_rows(DECIDED, PAIRS)
    assert rows == [
        {"prompt": "red?", "chosen": "yes", "rejected": "no"},
        {"prompt": "blue?", "chosen": "no, it is red", "rejected": "yes"},
        {"prompt": DIALOGUE, "chosen": said("hello"), "rejected": said("what")},
    ]
    assert left_out == {"tie": 1, "both_bad": 1, "split": 1, "edited into the rejected response": 1}


def test_kto_rows():
    rows, left_out = kto_rows(DECIDED, PAIRS)
    assert rows == [
        {"prompt": "red?", "completion": "yes", "label": True},
        {"prompt": "red?", "completion": "no", "label": False},
        {"prompt": "blue?", "completion": "no, it is red", "label": True},
        {"prompt": "blue?", "completion": "yes", "label": False},
        {"prompt": DIALOGUE, "completion": said("hello"), "label": True},
        {"prompt": DIALOGUE, "completion": said("what"), "label": False},
        {"prompt": "bad?", "completion": "x", "label": False},
        {"prompt": "bad?", "completion": "y", "label": False},
    ]
    assert left_out == {"tie": 1, "split": 1, "responses that are good in one pair and bad in another": 1}


def test_sft_rows():
    rows, left_out = sft_rows(DECIDED, PAIRS)
    assert rows == [
        {"prompt": "red?", "completion": "yes"},
        {"prompt": "blue?", "completion": "no, it is red"},
        {"prompt": DIALOGUE, "completion": said("hello")},
        {"prompt": "same?", "completion": "y"},
    ]
    assert left_out == {"tie": 1, "both_bad": 1, "split": 1}


def test_rows_say_which_models_responses_are_from_where_that_is_wanted():
    """Of an edited response, the model whose response was edited."""
    rows, _ = preference_rows(DECIDED, PAIRS, with_models=True)
    assert [(row["chosen_model"], row["rejected_model"]) for row in rows] == [("A", "B"), ("B", "A"), ("A", "B")]
    rows, _ = kto_rows(DECIDED, PAIRS, with_models=True)
    assert [row["model"] for row in rows] == ["A", "B", "B", "A", "A", "B", "A", "B"]
    rows, _ = sft_rows(DECIDED, PAIRS, with_models=True)
    assert [row["model"] for row in rows] == ["A", "B", "A", "A"]


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.sampled_from(["\n\nHuman: hi", "\n\nHuman: hi\n\nAssistant: ho", "\n\nAssistant: x", "Human:", '{"a": 1}']),
)
PROMPT = st.one_of(st.sampled_from(["red?", "\n\nHuman: red?\n\nAssistant:"]), st.just(DIALOGUE))


@given(PROMPT, TEXT, TEXT)
def test_coati_reads_every_text_as_it_was_shown(prompt, chosen, rejected):
    pairs, decided = {1: Pair(1, prompt, (chosen, rejected), ("", ""))}, {1: Outcome("first")}
    asked = DIALOGUE if prompt == DIALOGUE else [{"role": "user", "content": "red?"}]
    for row in preference_rows(decided, pairs)[0]:
        [record] = parse_record(json.loads(json.dumps(row)), "preference")
        assert (record.prompt, record.chosen, record.rejected) == (asked, said(chosen), said(rejected))
        assert record.unused == ()
    for row in kto_rows(decided, pairs)[0]:
        [record] = parse_record(json.loads(json.dumps(row)), "unpaired")
        assert (record.prompt, record.response) == (asked, said(chosen if record.desirable else rejected))
    [row] = sft_rows(decided, pairs)[0]
    [record] = parse_record(json.loads(json.dumps(row)), "sft")
    assert record.messages == [*asked, *said(chosen)]


@pytest.mark.parametrize("format", ["preference", "kto", "sft"])
def test_the_command_writes_what_was_chosen_and_says_what_was_left_out(tmp_path, capsys, format):
    store, [ana] = store_with(tmp_path, 3, ("ana",))
    for choice in ("winner", "tie", "skip"):
        shown = store.next(ana)
        place = next(side for side, text in zip("ab", shown.responses, strict=True) if text.startswith("response 1"))
        store.label(ana, click(f"click-{choice}", shown.id, place if choice == "winner" else choice))
    output = tmp_path / "rows.jsonl"
    assert main(["label", "export", str(store.path), "--format", format, "--output", str(output)]) == 0
    good = {"prompt": "prompt 0", "completion": "response 1 to 0"}
    expected = {
        "preference": [{"prompt": "prompt 0", "chosen": "response 1 to 0", "rejected": "response 0 to 0"}],
        "kto": [good | {"label": True}, {"prompt": "prompt 0", "completion": "response 0 to 0", "label": False}],
        "sft": [good],
    }
    assert [row for _, row in load_rows(str(output))] == expected[format]
    told = capsys.readouterr().out
    assert told == f"{output}: {len(expected[format])} rows\n  left out 1: ties\n"
