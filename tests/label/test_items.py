"""Items from files; mistakes name file and line."""

import json

import pytest

from coati.errors import UserError
from coati.label.items import join_items, read_items, read_scores

PAIR = [{"text": "Yes.", "model": "m"}, {"text": "No.", "model": "n"}]


def written(folder, *rows, name="items.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_prompts_are_texts_dialogues_or_messages(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"from": "human", "value": "Is it red?"}]
    hh = "\n\nHuman: Is it red?\n\nAssistant:"
    rows = [{"prompt": p, "responses": PAIR, "id": i} for i, p in enumerate(["Is it red?", messages, hh])]
    plain, dialogue, text = read_items(written(tmp_path, *rows))
    assert [item.key for item in (plain, dialogue, text)] == ["0", "1", "2"]
    assert plain.messages == text.messages == [{"role": "user", "content": "Is it red?"}]
    assert dialogue.messages == [{"role": "system", "content": "Be kind."}, *plain.messages]
    assert dialogue.prompt == messages and text.prompt == hh
    assert [response.model for response in plain.responses] == ["m", "n"]


def test_calls_of_tools_are_shown(tmp_path):
    call = {"type": "function", "function": {"name": "stock", "arguments": '{"item": "lamp"}'}}
    messages = [
        {"role": "user", "content": "Is it in stock?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "10"},
    ]
    [item] = read_items(written(tmp_path, {"prompt": messages, "responses": PAIR}))
    assert [message["role"] for message in item.messages] == ["user", "assistant", "tool"]
    assert "stock" in item.messages[1]["content"] and "lamp" in item.messages[1]["content"]


def test_a_row_without_an_id_always_has_the_same_key(tmp_path):
    one, two = read_items(written(tmp_path, {"prompt": "a", "responses": PAIR}, {"prompt": "b", "responses": PAIR}))
    [again] = read_items(written(tmp_path, {"responses": PAIR, "prompt": "b"}, name="other.jsonl"))
    assert again.key == two.key != one.key


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{", "valid JSON"),
        ("[1]", "no object"),
        ({"responses": PAIR}, "`prompt` is neither"),
        ({"prompt": " ", "responses": PAIR}, "a prompt is empty"),
        ({"prompt": [{"role": "assistant", "content": "Hi."}], "responses": PAIR}, "alternate"),
        ({"prompt": "a", "responses": PAIR[:1]}, "two or more"),
        ({"prompt": "a", "responses": [*PAIR, {"model": "m"}]}, "not a text"),
        ({"prompt": "a", "responses": [*PAIR, {"text": " "}]}, "empty"),
        ({"prompt": "a", "responses": [*PAIR, {"text": "\ud800"}]}, "surrogate"),
        ({"prompt": "a", "responses": [*PAIR, {"text": "b", "model": 3}]}, "`model`"),
        ({"prompt": "a", "responses": PAIR, "id": [1]}, "`id`"),
        ({"prompt": "first", "responses": PAIR, "id": "first"}, "'first' is there already"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, row, fault):
    path = written(tmp_path, {"prompt": "first", "responses": PAIR, "id": "first"}, row)
    with pytest.raises(UserError, match=fault) as error:
        read_items(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_files_of_several_models_are_joined_by_prompt(tmp_path):
    a = written(tmp_path, {"prompt": "x", "response": "xa"}, {"prompt": "y", "response": "ya"}, name="a.jsonl")
    b = written(tmp_path, {"prompt": "y", "completion": "yb"}, {"prompt": "x", "response": "xb"}, name="b.jsonl")
    c = written(tmp_path, {"prompt": "z", "response": "zc"}, name="c.jsonl")
    items, left_out = join_items({"A": a, "B": b, "C": c})
    found = {item.prompt: [(response.model, response.text) for response in item.responses] for item in items}
    assert found == {"x": [("A", "xa"), ("B", "xb")], "y": [("A", "ya"), ("B", "yb")]}
    assert left_out == 1


def test_scores_are_found_by_id_by_prompt_or_in_the_items(tmp_path):
    scored = [{**PAIR[0], "score": 2.5}, {**PAIR[1], "score": -1}]
    path = written(
        tmp_path, {"prompt": "a", "responses": PAIR, "id": 7}, {"prompt": "b", "responses": scored, "id": "c"}
    )
    items = read_items(path)
    found = written(tmp_path, {"id": 7, "scores": [1, 2]}, {"id": "gone", "scores": [1]}, name="scores.jsonl")
    assert read_scores(found, items) == {"7": [1, 2]}
    found = written(tmp_path, {"prompt": "b", "scores": [1, 2]}, name="scores.jsonl")
    assert read_scores(found, items) == {"c": [1, 2]}
    with pytest.raises(UserError, match=r"items\.jsonl:1: no `scores`"):
        read_scores(path, items)
    assert read_scores(written(tmp_path, {"responses": scored, "id": "c"}, name="s.jsonl"), items) == {"c": [2.5, -1]}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"id": "a", "scores": [1]}, r"scores\.jsonl:1: 1 scores for 2 responses"),
        ({"id": "a", "scores": [1, float("nan")]}, r"scores\.jsonl:1: no `scores`"),
        ({"id": "b", "scores": [1, 2]}, "no scores of these items"),
    ],
)
def test_wrong_scores_are_named(tmp_path, row, fault):
    items = read_items(written(tmp_path, {"prompt": "a", "responses": PAIR, "id": "a"}))
    with pytest.raises(UserError, match=fault):
        read_scores(written(tmp_path, row, name="scores.jsonl"), items)
