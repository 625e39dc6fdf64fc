"""What requests may say, and what OpenAI's API says where they are wrong."""

import pytest

from coati.serve.protocol import (
    NEUTRAL,
    ApiError,
    Token,
    chat_log_probs,
    completion_log_probs,
    read_chat,
    read_completion,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi."}]}


def test_a_request_is_read_and_nulls_are_absent():
    body = CHAT | dict(
        max_tokens=7, temperature=0, top_p=0.5, n=2, stop="x", seed=3, stream=True, user="me", tools=None
    )
    wanted = read_chat(body | {"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 5}).wanted
    assert (wanted.max_tokens, wanted.temperature, wanted.top_p, wanted.n, wanted.seed) == (7, 0.0, 0.5, 2, 3)
    assert (wanted.stop, wanted.stream, wanted.with_usage) == (("x",), True, True)
    assert (wanted.log_probs, wanted.heads) == (True, 5)
    assert read_chat(CHAT | {"max_tokens": 7, "max_completion_tokens": 9}).wanted.max_tokens == 9
    assert read_chat(CHAT).wanted.max_tokens is None
    assert read_chat(CHAT | {name: values[0] for name, values in NEUTRAL.items()}).wanted.temperature == 1


def test_parts_of_a_message_are_joined_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    found = read_chat(CHAT | {"messages": messages}).messages
    assert found == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([""], [""])],
)
def test_prompts_are_texts_or_ids(prompt, prompts):
    request = read_completion({"model": "m", "prompt": prompt})
    assert request.prompts == prompts and request.wanted.max_tokens == 16 and not request.wanted.log_probs


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": 3}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include": 1}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tempreature": 1}, "tempreature"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(changes, param):
    with pytest.raises(ApiError) as refusal:
        read_chat(CHAT | changes)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert refusal.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes",
    [{"prompt": None}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [1, "a"]}, {"prompt": {}}, {"prompt": [True]}]
    + [{"max_tokens": 0}, {"echo": True, "stream": True}, {"logprobs": 21}, {"best_of": 3}, {"messages": []}],
)
def test_a_wrong_completion_is_refused(changes):
    with pytest.raises(ApiError):
        read_completion({"model": "m", "prompt": "a"} | changes)


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ApiError, match="no JSON object"):
        read_chat(body)


def test_log_probs_as_the_api_writes_them():
    tokens = [Token(b"a", None), Token(b"\xe4\xbd", -1.0, [(b"b", -0.5), (b"c", -0.75)]), Token(b"\xa0!", -0.25)]
    found = completion_log_probs(tokens, 10)
    assert found["tokens"] == ["a", "bytes:\\xe4\\xbd", "bytes:\\xa0\\x21"]
    assert found["token_logprobs"] == [None, -1.0, -0.25]
    assert found["top_logprobs"][:2] == [None, {"bytes:\\xe4\\xbd": -1.0, "b": -0.5, "c": -0.75}]
    assert found["text_offset"][0] == 10
    [_, second, _] = chat_log_probs(tokens)["content"]
    assert second["bytes"] == [0xE4, 0xBD] and [head["token"] for head in second["top_logprobs"]] == ["b", "c"]
