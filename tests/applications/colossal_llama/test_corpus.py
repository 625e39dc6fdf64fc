import pytest

from coati.errors import UserError
from colossal_llama.tokenizer.raw_texts import read_texts, sample_texts


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_jsonl_gives_the_field_or_source_and_target(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "你"}\n\n{"source": "a ", "target": "b"}\n{"target": "c"}\n'.encode())
    assert list(read_texts([path])) == ["你", "a b", "c"]
    path = write(tmp_path / "b.jsonl", b'{"body": "x", "text": "y"}')
    assert list(read_texts([path], "body")) == ["x"]


def test_blank_lines_separate_the_documents_of_a_txt_file(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n two\n\n \nthree\r\nfour\r\n")
    assert list(read_texts([path])) == ["one\n two", "three\r\nfour"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2 is not UTF-8"),
        ("a.txt", b"fine\nfine\n\xe4\xbd\n", "a.txt:3 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[" * 100000, "a.jsonl:1 is not valid JSON"),
        ("a.jsonl", b"[1]", "a.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"content": "a"}', "a.jsonl:1 has neither 'text' nor 'target'"),
        ("a.jsonl", b'{"source": null, "target": "a"}', "a.jsonl:1: 'source' is not a text"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: 'text' is not a text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: 'text' has half of a surrogate pair"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.txt", b"\n \n", "a.txt holds no text"),
        ("a.csv", b"a", "a.csv is neither"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        list(read_texts([write(tmp_path / name, content)]))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        list(read_texts([tmp_path / "gone.txt"]))


def test_every_text_is_drawn_with_the_same_chance():
    drawn = [sample_texts("abcdefgh", 2, seed) for seed in range(2000)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    shares = [sum(letter in pair for pair in drawn) / len(drawn) for letter in "abcdefgh"]
    assert max(abs(share - 1 / 4) for share in shares) < 0.04  # 4 standard deviations
    assert sample_texts("abc", 5, 0) == ["a", "b", "c"]
