"""Texts from a model at the terminal."""

import io

import pytest

from colossal_llama import generate


def test_a_prompt_is_continued_the_same_greedy_way_each_time(tiny_world, capsys):
    texts = []
    for _ in range(2):
        words = ["--model", tiny_world["policy"], "--prompt", "red blue", "--max_new_tokens", "5", "--temperature", "0"]
        assert generate.main(words) == 0
        texts.append(capsys.readouterr().out.strip())
    assert texts[0] == texts[1] and texts[0].startswith("red blue") and len(texts[0]) > len("red blue")


def test_lines_are_answered_until_the_input_ends(tiny_world, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("red\nblue\n"))
    assert generate.main(["--model", tiny_world["policy"], "--max_new_tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert out.index("red") < out.index("blue")


def test_a_dialogue_holds_what_was_said_before(tiny_world, capsys, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["policy"])
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny_world["policy"]).save_pretrained(tmp_path)
    read = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **o: read.append(text) or call(self, text, **o))
    monkeypatch.setattr("sys.stdin", io.StringIO("red\nblue\n"))
    assert generate.main(["--model", str(tmp_path), "--chat", "--max_new_tokens", "3"]) == 0
    assert read[0] == "<user>red" and read[1].startswith("<user>red<assistant>") and read[1].endswith("<user>blue")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--model", "nowhere"], "can't load a model from nowhere"), (["--chat"], "no chat template: leave out --chat")],
)
def test_a_mistake_is_one_line(words, message, tiny_world, capsys):
    words = words if "--model" in words else ["--model", tiny_world["policy"], *words]
    assert generate.main([*words, "--prompt", "x"]) == 2
    assert message in capsys.readouterr().err
