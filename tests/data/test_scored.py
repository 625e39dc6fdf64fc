"""Responses with scores by objective, and which rows have which."""

import math

import pytest

from coati.data import DataConfig, collate_scored, parse_record, tokenize
from coati.data.tokenize import SkippedRow

DIALOGUE = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "no, blue"}]
SCORES = {"helpfulness": 3.5, "verbosity": 1}
NAMES = ["verbosity", "helpfulness"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "red?", "response": "no, blue", "scores": SCORES},
        {"prompt": DIALOGUE[:1], "completion": "no, blue", "scores": SCORES | {"coherence": 4}},
        {"messages": DIALOGUE, "scores": SCORES},
        {"prompt": "red?", "response": "no, blue", **SCORES},
    ],
    ids=["texts", "messages as a prompt", "messages", "fields"],
)
def test_scores_are_read_in_the_order_of_the_objectives(row):
    [record] = parse_record(row, "scored", NAMES)
    assert record.prompt == DIALOGUE[:1] and record.response == DIALOGUE[1:]
    assert list(record.scores.items()) == [("verbosity", 1), ("helpfulness", 3.5)]
    assert record.unused == (("`scores.coherence`",) if "coherence" in row.get("scores", ()) else ())


def test_without_objectives_all_of_an_object_are_read():
    [record] = parse_record({"messages": DIALOGUE, "scores": SCORES}, "scored")
    assert record.scores == SCORES


# As its card shows a row; the attributes are from 0 to 4.
HELPSTEER2 = {
    "prompt": "c#",
    "response": "C# is a language.",
    "helpfulness": 3,
    "correctness": 4,
    "coherence": 4,
    "complexity": 2,
    "verbosity": 1,
}


def test_helpsteer2_is_read_as_it_is():
    [record] = parse_record(HELPSTEER2, "scored", NAMES)
    assert record.prompt == [{"role": "user", "content": "c#"}] and record.scores == {"verbosity": 1, "helpfulness": 3}
    assert record.unused == ("`correctness`", "`coherence`", "`complexity`")


def test_the_turns_of_helpsteer2_are_told_apart():
    turns = "c#\n<extra_id_1>Assistant\nA language.\n\nOf 2000.\n<extra_id_1>User\nand java?"
    [record] = parse_record(HELPSTEER2 | {"prompt": turns}, "scored", NAMES)
    assert [(message["role"], message["content"]) for message in record.prompt] == [
        ("user", "c#"),
        ("assistant", "A language.\n\nOf 2000."),
        ("user", "and java?"),
    ]
    [record] = parse_record(HELPSTEER2 | {"prompt": "what is <extra_id_1>User\n?"}, "scored", NAMES)
    assert len(record.prompt) == 1
    with pytest.raises(ValueError, match="roles do not alternate"):
        parse_record(HELPSTEER2 | {"prompt": turns.replace(">User", ">Assistant")}, "scored", NAMES)


@pytest.fixture
def tokenizer(tiny_world):
    from transformers import AutoTokenizer

    from coati.data import prepare_tokenizer

    return prepare_tokenizer(AutoTokenizer.from_pretrained(tiny_world["tokenizer"]))[0]


@pytest.mark.parametrize("missing", [{"verbosity": None}, {}], ids=["null", "no field"])
@pytest.mark.parametrize("in_object", [True, False])
def test_a_score_that_is_missing_is_not_given(missing, in_object, tokenizer):
    scores = missing | {"helpfulness": 2}
    row = {"prompt": "red", "response": "lamp"} | ({"scores": scores} if in_object else scores)
    [whole] = parse_record({"prompt": "red", "response": "blue lamp", "scores": SCORES}, "scored", NAMES)
    [partial] = parse_record(row, "scored", NAMES)
    batch = collate_scored([tokenize(record, tokenizer, DataConfig()) for record in (whole, partial)], pad_id=2)
    assert batch.given.tolist() == [[True, True], [False, True]]
    assert batch.scores[0].tolist() == [1.0, 3.5] and batch.scores[1, 1] == 2 and math.isnan(batch.scores[1, 0])
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.loss_mask.shape


def test_a_row_without_any_score_is_skipped(tokenizer):
    [record] = parse_record({"messages": DIALOGUE, "scores": {"coherence": 1}}, "scored", NAMES)
    with pytest.raises(SkippedRow, match="no score of verbosity, helpfulness"):
        tokenize(record, tokenizer, DataConfig())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scores": [1, 2]}, "`scores` is no object with a number for each objective"),
        ({"scores": {"helpfulness": "3"}}, "the score `helpfulness` is no finite number"),
        ({"scores": {"verbosity": math.inf}}, "the score `verbosity` is no finite number"),
        ({"scores": {"verbosity": True}}, "the score `verbosity` is no finite number"),
        ({"helpfulness": math.nan}, "the score `helpfulness` is no finite number"),
        ({"response": None, "helpfulness": 1}, "no known fields for scored data, only `prompt`, `helpfulness`"),
        ({"response": "", "helpfulness": 1}, "a response is empty"),
    ],
)
def test_what_is_no_score_is_named(changes, says):
    with pytest.raises(ValueError, match=says):
        parse_record({"prompt": "red?", "response": "no"} | changes, "scored", NAMES)
