"""Every supported format becomes the same records, and every fault has its reason."""

import json

import pytest

from coati.data import PreferenceRecord, PromptRecord, SFTRecord, UnpairedRecord, load_rows, parse_record
from coati.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


DIALOGUE = [user("hi"), assistant("hello")]
SFT_ROWS = {
    "openai": {"messages": DIALOGUE},
    "colossalchat": {"messages": [{"from": "user", "content": "hi"}, {"from": "assistant", "content": "hello"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "completion": {"prompt": "hi", "completion": "hello"},
    "response": {"prompt": "hi", "response": "hello"},
    "completion messages": {"prompt": [user("hi")], "completion": [assistant("hello")]},
    "alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "alpaca without input": {"instruction": "hi", "output": "hello"},
    "self-instruct": {"instruction": "hi", "instances": [{"input": "", "output": "hello"}]},
    "gsm8k": {"question": "hi", "answer": "hello"},
    "nulls of a table": {"messages": None, "prompt": "hi", "completion": "hello", "input": None},
}


@pytest.mark.parametrize("name", SFT_ROWS)
def test_every_dialogue_format_gives_the_same_record(name):
    assert parse_record(SFT_ROWS[name], "sft") == [SFTRecord(DIALOGUE)]


@pytest.mark.parametrize("name", SFT_ROWS)
def test_a_prompt_is_the_dialogue_without_the_last_answer(name):
    [record] = parse_record(SFT_ROWS[name], "prompt")
    assert record.prompt == [user("hi")]


@pytest.mark.parametrize("name", SFT_ROWS)
@pytest.mark.parametrize("label", [True, False])
def test_a_dialogue_with_a_label_is_a_good_or_a_bad_answer(name, label):
    expected = [UnpairedRecord([user("hi")], [assistant("hello")], label)]
    assert parse_record(SFT_ROWS[name] | {"label": label}, "unpaired") == expected


def test_a_pair_taken_apart_is_a_good_and_a_bad_answer():
    row = {"prompt": "hi", "chosen": "hello", "rejected": "no"}
    assert parse_record(row, "unpaired") == [
        UnpairedRecord([user("hi")], [assistant("hello")], True),
        UnpairedRecord([user("hi")], [assistant("no")], False),
    ]


def test_only_the_last_answer_of_a_labelled_dialogue_is_judged():
    messages = [*DIALOGUE, user("more"), assistant("no")]
    [record] = parse_record({"messages": messages, "label": False}, "unpaired")
    assert (record.prompt, record.answer) == (messages[:-1], messages[-1:])


@pytest.mark.parametrize("label", [None, "true", 0.5, [True]])
def test_a_label_must_be_true_or_false(label):
    with pytest.raises(ValueError, match="`label`"):
        parse_record({"prompt": "hi", "completion": "hello", "label": label}, "unpaired")


def test_system_and_several_turns_are_kept():
    messages = [{"role": "system", "content": "be short"}, *DIALOGUE, user("more"), assistant("no")]
    assert parse_record({"messages": messages}, "sft") == [SFTRecord(messages)]
    assert parse_record({"messages": messages}, "prompt")[0].prompt == messages[:-1]
    assert parse_record({"messages": messages[:-1]}, "prompt")[0].prompt == messages[:-1]


def test_alpaca_input_follows_the_instruction():
    [record] = parse_record({"instruction": "Add.", "input": "1 2", "output": "3"}, "sft")
    assert record.messages == [user("Add.\n\n1 2"), assistant("3")]


def test_self_instruct_gives_one_record_an_instance():
    row = {
        "instruction": "Add.",
        "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
    }
    assert [r.messages[1]["content"] for r in parse_record(row, "sft")] == ["3", "4"]
    assert [r.columns["output"] for r in parse_record(row, "prompt")] == ["3", "4"]


def test_prompt_columns_are_the_other_fields():
    [record] = parse_record({"question": "1+1?", "answer": "2", "level": 3}, "prompt")
    assert record == PromptRecord([user("1+1?")], {"answer": "2", "level": 3})
    assert parse_record({"prompt": "hi"}, "prompt") == [PromptRecord([user("hi")], {})]


PAIR = PreferenceRecord([user("hi")], [assistant("hello")], [assistant("go")])
HH = "\n\nHuman: hi\n\nAssistant: "
PREFERENCE_ROWS = {
    "text": {"prompt": "hi", "chosen": "hello", "rejected": "go"},
    "messages": {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("go")]},
    "whole dialogues": {
        "chosen": [user("hi"), assistant("hello")],
        "rejected": [user("hi"), assistant("go")],
    },
    "prompt repeated": {
        "prompt": "hi",
        "chosen": [user("hi"), assistant("hello")],
        "rejected": [user("hi"), assistant("go")],
    },
    "colossalchat": {
        "context": [{"from": "human", "content": "hi"}],
        "chosen": [{"from": "assistant", "content": "hello"}],
        "rejected": [{"from": "assistant", "content": "go"}],
    },
    "hh-rlhf": {"chosen": HH + "hello", "rejected": HH + "go"},
    "hh-rlhf prompt": {"prompt": HH.rstrip(), "chosen": "hello", "rejected": "go"},
}


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_every_preference_format_gives_the_same_record(name):
    assert parse_record(PREFERENCE_ROWS[name], "preference") == [PAIR]


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_a_preference_row_gives_its_prompt(name):
    assert parse_record(PREFERENCE_ROWS[name], "prompt")[0].prompt == [user("hi")]


def test_hh_markers_inside_a_paragraph_are_text():
    """PITFALL 14: a user who types "Human:" or "Assistant:" makes no turn."""
    opening = "\n\nHuman: Human: say Assistant: \nHuman: ok\n\nAssistant: "
    [record] = parse_record({"chosen": opening + "a", "rejected": opening + "b"}, "preference")
    assert record.prompt == [user("Human: say Assistant: \nHuman: ok")]


def test_hh_neighbouring_turns_of_one_role_are_joined():
    text = "\n\nHuman: hi\n\nAssistant: one\n\nAssistant: "
    [record] = parse_record({"chosen": text + "two", "rejected": text + "three"}, "preference")
    assert record.prompt == [user("hi")]
    assert record.chosen == [assistant("one\n\ntwo")]


def test_hh_dialogues_that_part_early_share_only_what_is_common():
    chosen = HH + "a\n\nHuman: b\n\nAssistant: c"
    [record] = parse_record({"chosen": chosen, "rejected": HH + "x"}, "preference")
    assert record.prompt == [user("hi")]
    assert [m["content"] for m in record.chosen] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "extra, margin",
    [
        ({}, None),
        ({"margin": 2}, 2.0),
        ({"score_chosen": 5, "score_rejected": 3.5}, 1.5),
        ({"margin": None}, None),
    ],
)
def test_margin(extra, margin):
    [record] = parse_record({**PREFERENCE_ROWS["text"], **extra}, "preference")
    assert record.margin == margin


FAULTS = [
    ("sft", ["no dict"], "not an object"),
    ("sft", {"text": "hi"}, "no known fields"),
    ("sft", {"prompt": "hi"}, "no known fields"),
    ("sft", {"messages": "hi"}, "not a list of messages"),
    ("sft", {"messages": ["hi"]}, "not a list of messages"),
    ("sft", {"messages": []}, "no messages"),
    ("sft", {"messages": [{"role": "narrator", "content": "hi"}]}, "has a role"),
    ("sft", {"messages": [{"role": "tool", "content": "hi"}]}, "do not alternate"),
    ("sft", {"messages": [{"role": ["user"], "content": "hi"}]}, "has a role"),
    ("sft", {"messages": [user("a"), user("b"), assistant("c")]}, "do not alternate"),
    ("sft", {"messages": [assistant("a")]}, "do not alternate"),
    ("sft", {"messages": [*DIALOGUE, {"role": "system", "content": "x"}]}, "do not alternate"),
    ("sft", {"messages": [user("a")]}, "not from the assistant"),
    ("sft", {"messages": [user("a"), assistant(" \n")]}, "answer is empty"),
    ("sft", {"prompt": "", "completion": "x"}, "prompt is empty"),
    ("sft", {"prompt": "x", "completion": 3}, "not text"),
    ("sft", {"messages": [user([{"type": "image", "url": "a"}]), assistant("b")]}, "not text"),
    ("sft", {"prompt": "\ud800", "completion": "x"}, "not valid Unicode"),
    ("sft", {"instruction": "x", "instances": []}, "list of objects"),
    ("prompt", {"messages": [assistant("a")]}, "no messages"),
    ("preference", {"prompt": "hi", "chosen": "a"}, "no `chosen` and `rejected`"),
    ("preference", {"prompt": "hi", "chosen": "a", "rejected": "a"}, "equals"),
    ("preference", {"chosen": DIALOGUE, "rejected": DIALOGUE}, "equals"),
    ("preference", {"prompt": "hi", "chosen": "a", "rejected": ""}, "answer is empty"),
    ("preference", {"chosen": "a", "rejected": "b"}, "do not share a prompt"),
    (
        "preference",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
        "not from the assistant",
    ),
    ("preference", {**PREFERENCE_ROWS["text"], "margin": float("nan")}, "finite"),
    ("preference", {**PREFERENCE_ROWS["text"], "margin": True}, "finite"),
    ("preference", {**PREFERENCE_ROWS["text"], "score_chosen": "1", "score_rejected": 0}, "finite"),
]


@pytest.mark.parametrize("kind, row, reason", FAULTS)
def test_a_faulty_row_has_a_reason(kind, row, reason):
    """PITFALL 20: rows that do not parse, have the wrong roles or empty answers are named at the start."""
    with pytest.raises(ValueError, match=reason):
        parse_record(row, kind)


ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def test_jsonl_json_and_parquet_give_the_same_rows(tmp_path, write_jsonl):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for source in (write_jsonl(ROWS), str(tmp_path / "rows.json"), str(tmp_path / "rows.parquet")):
        assert list(load_rows(source)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_a_folder_is_read_through_datasets(tmp_path, monkeypatch, write_jsonl):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(ROWS, "set/train.jsonl")
    assert list(load_rows(str(tmp_path / "set"))) == [(1, ROWS[0]), (2, ROWS[1])]


def test_line_numbers_count_blank_lines_and_broken_lines_are_errors(write_jsonl):
    rows = list(load_rows(write_jsonl([ROWS[0], "", '{"prompt": ', ROWS[1], "[" * 100_000])))
    assert [line for line, _ in rows] == [1, 3, 4, 5]
    assert [isinstance(row, ValueError) for _, row in rows] == [False, True, False, True]


@pytest.mark.parametrize("name", ["no.jsonl", "no.json", "no.parquet", "./no/such", "/no/such"])
def test_a_missing_file_is_named(name):
    with pytest.raises(UserError, match=name):
        list(load_rows(name))


@pytest.mark.parametrize("name, content", [("a.json", "{"), ("a.json", "{}"), ("a.parquet", "x"), ("a.txt", "x")])
def test_an_unreadable_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        list(load_rows(str(tmp_path / name)))


def test_a_name_that_datasets_cannot_load_is_named(monkeypatch):
    import datasets

    def fail(path, config, split):
        raise FileNotFoundError(f"{path} {config} {split}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"org/name/main:test is neither .*org/name main test"):
        load_rows("org/name/main:test")
