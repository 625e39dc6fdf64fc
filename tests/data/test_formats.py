"""Every supported format becomes the same records, and every fault has its reason."""

import json
from dataclasses import replace

import pytest

from coati.data import PreferenceRecord, PromptRecord, SFTRecord, UnpairedRecord, parse_record


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


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
    "conversation": {"conversation": [{"role": "User", "content": "hi"}, {"role": "Assistant", "content": "hello"}]},
    "gemma's roles": {"messages": [user("hi"), {"role": "model", "content": "hello"}]},
    "content parts": {
        "messages": [user([{"type": "text", "text": "hi"}]), assistant([{"type": "text", "text": "hello"}])]
    },
    "parts without a type, and bare texts": {"messages": [user([{"text": "h"}, "i"]), assistant(["hel", "lo"])]},
    "one message": {"prompt": [user("hi")], "completion": assistant("hello")},
    "problem": {"problem": "hi", "solution": "hello"},
    "problem and answer": {"problem": "hi", "answer": "hello"},
    "query": {"query": "hi", "response": "hello"},
    "question and response": {"question": "hi", "response": "hello"},
    "input and output": {"input": "hi", "output": "hello"},
    "instruction and response": {"instruction": "hi", "response": "hello"},
    "any of them": {"query": "hi", "solution": "hello"},
    "nulls of a table": {"messages": None, "prompt": "hi", "completion": "hello", "input": None},
}


@pytest.mark.parametrize("name", SFT_ROWS)
def test_every_dialogue_format_gives_the_same_record(name):
    """REPORT 25: the common names of fields and roles."""
    assert parse_record(SFT_ROWS[name], "sft") == [SFTRecord(DIALOGUE)]


@pytest.mark.parametrize("name", SFT_ROWS)
def test_a_prompt_is_the_dialogue_without_the_last_response(name):
    [record] = parse_record(SFT_ROWS[name], "prompt")
    assert record.prompt == [user("hi")]


@pytest.mark.parametrize("name", SFT_ROWS)
@pytest.mark.parametrize("label", [True, False])
def test_a_dialogue_with_a_label_is_a_good_or_a_bad_response(name, label):
    expected = [UnpairedRecord([user("hi")], [assistant("hello")], label)]
    assert parse_record(SFT_ROWS[name] | {"label": label}, "unpaired") == expected


def test_a_pair_taken_apart_is_a_good_and_a_bad_response():
    row = {"prompt": "hi", "chosen": "hello", "rejected": "no"}
    assert parse_record(row, "unpaired") == [
        UnpairedRecord([user("hi")], [assistant("hello")], True),
        UnpairedRecord([user("hi")], [assistant("no")], False),
    ]


def test_only_the_last_response_of_a_labeled_dialogue_has_the_label():
    messages = [*DIALOGUE, user("more"), assistant("no")]
    [record] = parse_record({"messages": messages, "label": False}, "unpaired")
    assert (record.prompt, record.response) == (messages[:-1], messages[-1:])


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
    "llama-factory": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "hello"},
        "rejected": {"from": "gpt", "value": "go"},
    },
    "alpaca": {"instruction": "hi", "input": "", "chosen": "hello", "rejected": "go"},
    "orca": {"system": "", "question": "hi", "chosen": "hello", "rejected": "go"},
    "input": {"input": "hi", "chosen": "hello", "rejected": "go"},
    "the chosen dialogue again": {
        "messages": [user("hi"), assistant("hello")],
        "chosen": [user("hi"), assistant("hello")],
        "rejected": [user("hi"), assistant("go")],
    },
    "hh-rlhf": {"chosen": HH + "hello", "rejected": HH + "go"},
    "hh-rlhf prompt": {"prompt": HH.rstrip(), "chosen": "hello", "rejected": "go"},
}


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_every_preference_format_gives_the_same_record(name):
    """REPORT 25: LLaMA-Factory's and orca_dpo's too."""
    assert parse_record(PREFERENCE_ROWS[name], "preference") == [PAIR]


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_ties_are_told_from_preferences_where_they_are_learned(name):
    row = PREFERENCE_ROWS[name]
    assert parse_record(row, "comparison") == parse_record({**row, "preference": "chosen"}, "comparison") == [PAIR]
    assert parse_record({**row, "preference": "tie"}, "comparison") == [replace(PAIR, tie=True)]
    for kind in ("preference", "unpaired"):
        with pytest.raises(ValueError, match="tie_theta above 1"):
            parse_record({**row, "preference": "tie"}, kind)
    with pytest.raises(ValueError, match='neither "chosen" nor "tie"'):
        parse_record({**row, "preference": 0}, "comparison")
    assert parse_record({**row, "preference": 0}, "preference") == [PAIR]


def test_whole_dialogues_need_no_prompt_and_one_that_differs_is_named():
    """REPORT 25: some sets keep a text of the prompt beside them."""
    row = {"prompt": "Human: hi", **PREFERENCE_ROWS["whole dialogues"]}
    assert parse_record(row, "preference") == [PAIR]
    assert parse_record(row, "preference")[0].unused == ("`prompt`",)


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_a_preference_row_gives_its_prompt(name):
    assert parse_record(PREFERENCE_ROWS[name], "prompt")[0].prompt == [user("hi")]


def test_hh_markers_inside_a_paragraph_are_text():
    """PITFALL 14: a user who types "Human:" or "Assistant:" makes no turn."""
    opening = "\n\nHuman: Human: say Assistant: \nHuman: ok\n\nAssistant: "
    [record] = parse_record({"chosen": opening + "a", "rejected": opening + "b"}, "preference")
    assert record.prompt == [user("Human: say Assistant: \nHuman: ok")]


def test_hh_neighboring_turns_of_one_role_are_joined():
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
    ("sft", {"messages": [user("a"), assistant(" \n")]}, "response is empty"),
    ("sft", {"prompt": "", "completion": "x"}, "prompt is empty"),
    ("sft", {"prompt": "x", "completion": 3}, "not text"),
    ("sft", {"messages": [user([{"type": "image", "url": "a"}]), assistant("b")]}, "not text"),
    ("sft", {"prompt": "\ud800", "completion": "x"}, "not valid Unicode"),
    ("sft", {"instruction": "x", "instances": []}, "list of objects"),
    ("prompt", {"messages": [assistant("a")]}, "no messages"),
    ("preference", {"prompt": "hi", "chosen": "a"}, "no `chosen` and `rejected`"),
    ("preference", {"prompt": "hi", "chosen": "a", "rejected": "a"}, "equals"),
    ("preference", {"chosen": DIALOGUE, "rejected": DIALOGUE}, "equals"),
    ("preference", {"prompt": "hi", "chosen": "a", "rejected": ""}, "response is empty"),
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
    """PITFALL 20: rows that do not parse, have the wrong roles or empty responses are named at the start."""
    with pytest.raises(ValueError, match=reason):
        parse_record(row, kind)


# --- what else a row holds

SYSTEM = {"role": "system", "content": "be short"}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("kind", ["sft", "preference", "unpaired", "prompt"])
def test_a_system_prompt_of_a_row_is_its_first_message(kind, name):
    """REPORT 8: in every kind of data."""
    rows = {"preference": PREFERENCE_ROWS["text"], "unpaired": SFT_ROWS["query"] | {"label": True}}
    for row in (rows.get(kind, SFT_ROWS["query"]), rows.get(kind, SFT_ROWS["openai"])):
        [record] = parse_record({**row, name: "be short"}, kind)
        messages = record.messages if kind == "sft" else record.prompt
        assert messages[:2] == [SYSTEM, user("hi")] and not [name for name in record.unused if "system" in name]


def test_two_system_prompts_must_be_one():
    """REPORT 22: a clash is refused; the same twice is none, and an empty one is none."""
    row = {"messages": [SYSTEM, *DIALOGUE]}
    for system in ("be short", ""):
        assert parse_record({**row, "system": system}, "sft") == [SFTRecord([SYSTEM, *DIALOGUE])]
    with pytest.raises(ValueError, match="`system` differs from the dialogue's own system message"):
        parse_record({**row, "system": "be long"}, "sft")


@pytest.mark.parametrize("row", [{"instruction": "hi", "output": "hello"}, {"question": "hi", "answer": "hello"}])
def test_a_history_comes_before_the_prompt(row):
    """REPORT 8: LLaMA-Factory's pairs."""
    row |= {"history": [["a", "b"], ["c", "d"]], "system": "be short"}
    before = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]
    assert parse_record(row, "sft") == [SFTRecord([*before, *DIALOGUE])]
    assert parse_record(row, "prompt")[0].prompt == [*before, user("hi")]
    with pytest.raises(ValueError, match="`history` is not a list of pairs"):
        parse_record({**row, "history": ["a"]}, "sft")


@pytest.mark.parametrize("kind", ["sft", "prompt"])
def test_dolly_s_context_belongs_to_the_instruction(kind):
    """REPORT 8: as alpaca's input does."""
    row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada.", "category": "qa"}
    [record] = parse_record(row, kind)
    messages = record.messages if kind == "sft" else record.prompt
    assert messages[0] == user("Who?\n\nAda wrote it.")
    assert record.unused == (("`category`",) if kind == "sft" else ())


CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "it"}}}
CALLS = {
    "transformers": {"content": "", "tool_calls": [CALL]},
    "openai": {"content": None, "tool_calls": [{**CALL, "function": {"name": "find", "arguments": '{"what": "it"}'}}]},
    "no content": {"tool_calls": [CALL]},
    "a text": {"content": "", "tool_calls": json.dumps([CALL])},
    "bare": {"content": "", "tool_calls": [{"name": "find", "arguments": {"what": "it"}}]},
    "one": {"content": "", "tool_calls": CALL},
    "older openai": {"content": None, "function_call": {"name": "find", "arguments": '{"what": "it"}'}},
    "a table's nulls": {"content": None, "tool_calls": [{**CALL, "id": None}], "function_call": None, "name": None},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_write_a_call_gives_the_same_message(name):
    """REPORT 8: templates take one."""
    messages = [user("hi"), {"role": "assistant", **CALLS[name]}, {"role": "tool", "content": "x"}, assistant("hello")]
    [record] = parse_record({"messages": messages}, "sft")
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_calls_that_are_messages_of_their_own_are_those_of_one_message():
    """REPORT 8: LLaMA-Factory's function_call and observation."""
    text = json.dumps(CALL["function"])
    turns = [("human", "hi"), ("function_call", text), ("function_call", text), ("observation", "1"), ("gpt", "hello")]
    [record] = parse_record({"conversations": [{"from": role, "value": value} for role, value in turns]}, "sft")
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert [m["role"] for m in record.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("content", [{"t": 3}, [1, 2], 3.5, True])
def test_a_tool_may_return_any_json(content):
    """REPORT 8: it is read as its text."""
    messages = [user("hi"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": content}, assistant("hello")]
    [record] = parse_record({"messages": messages}, "sft")
    assert json.loads(record.messages[2]["content"]) == content


TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}


@pytest.mark.parametrize(
    "tools", [[TOOL], TOOL, [TOOL["function"]], json.dumps([TOOL]), json.dumps([TOOL["function"]])]
)
def test_every_way_to_describe_tools_gives_the_same(tools):
    """REPORT 8: in every kind of record."""
    assert parse_record({"messages": DIALOGUE, "tools": tools}, "sft")[0].tools == [TOOL]
    assert parse_record({**PREFERENCE_ROWS["text"], "tools": tools}, "preference")[0].tools == [TOOL]
    assert parse_record({**SFT_ROWS["query"], "tools": tools, "label": True}, "unpaired")[0].tools == [TOOL]
    [record] = parse_record({"prompt": "hi", "tools": tools}, "prompt")
    assert record.tools == [TOOL] and record.columns == {}


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_none(tools):
    """REPORT 8: a template that is given an empty list may write a heading for it."""
    assert parse_record({"messages": DIALOGUE, "tools": tools}, "sft")[0].tools is None


MORE_FAULTS = [
    ("sft", {"messages": DIALOGUE, "tools": ["find"]}, "`tools` is not a list of objects"),
    ("sft", {"messages": DIALOGUE, "tools": "find"}, "`tools` is not valid JSON"),
    ("sft", {"messages": [user("a"), assistant("", tool_calls=[{"x": 1}])]}, "without the name of a function"),
    ("sft", {"messages": [user("a"), assistant("", tool_calls=["find"])]}, "not a list of objects"),
    (
        "sft",
        {"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "{"}])]},
        "arguments of a tool call that are not valid JSON",
    ),
    ("sft", {"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": [1]}])]}, "not an object"),
    ("sft", {"messages": [user("a"), {"role": "tool", "content": "b"}, assistant("c")]}, "do not alternate"),
    ("sft", {"messages": [user("a"), assistant("b", mood="\ud800")]}, "not valid Unicode"),
    ("sft", {"messages": DIALOGUE, "system": 3}, "`system` has content that is not text"),
    ("sft", {"text": "hi", "id": 3}, "no known fields for sft data, only `text`, `id`"),
    ("sft", {"instruction": "a", "output": "x", "instances": [{"input": "", "output": "b"}]}, "`output` is in the row"),
]


@pytest.mark.parametrize("kind, row, reason", MORE_FAULTS)
def test_what_cannot_be_read_is_named(kind, row, reason):
    """REPORT 8: the field, and what is wrong with it."""
    with pytest.raises(ValueError, match=reason):
        parse_record(row, kind)


# --- columns of prompts

VERL = {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "5"}, "extra_info": {"index": 1}}


@pytest.mark.parametrize(
    "prompt",
    [{"prompt": "hi"}, {"prompt": [user("hi")]}, {"messages": [user("hi")]}, {"question": "hi"}, {"problem": "hi"}]
    + [{"instruction": "hi"}, {"query": "hi"}, {"input": "hi"}],
    ids=lambda row: str(next(iter(row.items()))),
)
@pytest.mark.parametrize("answer", [5, 0.5, ["5", "five"], {"value": 5}, "5", True, []])
def test_a_right_answer_of_any_kind_is_a_column(prompt, answer):
    """REPORT 22: it is no turn of a dialogue, whatever the prompt's field is called."""
    for name in ("answer", "solution", "response", "completion", "output"):
        row = {**prompt, name: answer, **VERL}
        assert parse_record(row, "prompt") == [PromptRecord([user("hi")], {name: answer, **VERL})]


@pytest.mark.parametrize("value", ["some text", 3, ["x"], [user("x")]])
@pytest.mark.parametrize("name", ["question", "context", "input", "instruction", "query", "problem", "instances"])
def test_only_the_fields_that_made_the_prompt_are_taken(name, value):
    """REPORT 22: beside `prompt` they are columns like any other."""
    row = {"prompt": "hi", name: value}
    assert parse_record(row, "prompt") == [PromptRecord([user("hi")], {name: value})]
    assert parse_record(dict(reversed(row.items())), "prompt") == [PromptRecord([user("hi")], {name: value})]


@pytest.mark.parametrize("sides", [(5, 3), ("good", "bad"), ([user("x"), assistant("y")], [user("x"), assistant("z")])])
def test_a_prompt_beside_a_pair_is_the_prompt(sides):
    """REPORT 22: whatever its columns are called."""
    columns = dict(zip(("chosen", "rejected"), sides, strict=True))
    assert parse_record({"prompt": "hi", **columns}, "prompt") == [PromptRecord([user("hi")], columns)]


@pytest.mark.parametrize("name", ["self", "prompts", "responses", "input_ids", "attention_mask", "response_mask"])
def test_a_column_that_rewards_could_not_be_called_with_is_refused(name):
    """REPORT 22: at the start, not after a generation."""
    with pytest.raises(ValueError, match=f"the field `{name}` has a name that reward functions are called with"):
        parse_record({"prompt": "hi", name: "x"}, "prompt")
    assert parse_record({"prompt": "hi", "completion": "hello", name: "x"}, "sft")[0].unused == (f"`{name}`",)


def test_rewards_are_called_with_every_name_that_is_not_reserved():
    """REPORT 22: through all layers that take columns as keywords."""
    from coati.data.records import RESERVED
    from coati.rewards import FunctionReward, Scorer
    from coati.samples import Sample

    read = {}
    names = [
        "completion",
        "prompt",
        "response",
        "name",
        "reward",
        "row",
        "columns",
        "index",
        "function",
        "args",
        "kwargs",
    ]
    scorer = Scorer([(FunctionReward(lambda prompts, responses, **c: read.update(c) or [1.0], "f"), 1.0)])
    [record] = parse_record({"messages": [user("hi")], **dict.fromkeys(names, "x")}, "prompt")
    sample = Sample.of_texts("hi", "a")
    sample.columns = record.columns
    scorer.score([sample])
    assert sample.score == 1.0 and set(names) <= read.keys()
    for name in ("prompts", "responses"):
        assert name in RESERVED
        sample.columns = {name: "x"}
        with pytest.raises(TypeError, match="multiple values"):
            scorer.score([sample])


def test_the_response_at_a_dialogue_s_end_is_said_to_be_left_out():
    """REPORT 22: nothing of a row goes without a word."""
    [record] = parse_record({"messages": DIALOGUE}, "prompt")
    assert record.unused == ("the last response (a prompt ends in front of it)",)
    assert parse_record({"prompt": "hi", "completion": "hello"}, "prompt")[0].unused == ()


def test_fields_that_no_record_holds_are_named():
    """REPORT 8: of rows, of pairs and of content parts."""
    assert parse_record({"id": 3, **SFT_ROWS["query"], "source": "web"}, "sft")[0].unused == ("`id`", "`source`")
    row = {**PREFERENCE_ROWS["text"], "margin": 2.0, "score_chosen": 3, "messages": DIALOGUE}
    assert parse_record(row, "preference")[0].unused == ("`score_chosen`", "`messages`")
    part = {"type": "text", "text": "hi", "cache_control": "x", "image": None}
    [record] = parse_record({"messages": [user([part]), assistant("hello")]}, "sft")
    assert record.unused == ("`cache_control` of content parts",)
