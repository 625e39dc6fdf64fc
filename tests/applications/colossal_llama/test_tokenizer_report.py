"""The report's figures are those of plain counting."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.applications.colossal_llama.conftest import chinese, english, write_jsonl


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, list[str]]:
    """Texts by file."""
    root = tmp_path_factory.mktemp("texts")
    texts = {"zh": [chinese(seed) for seed in range(70)], "en": [english(seed) for seed in range(5)]}
    return {
        write_jsonl(root / f"{name}.jsonl", [{"text": text} for text in rows]): rows for name, rows in texts.items()
    }


@pytest.fixture(scope="module")
def made(tokenizers, extended, texts, tmp_path_factory):
    """The report's folder and its rows, of both sentencepiece tokenizers."""
    from colossal_llama.tokenizer_report import main

    folder = tmp_path_factory.mktemp("report") / "out"
    base, new = tokenizers["sentencepiece"], extended["sentencepiece"]["settings"]["output"]
    renamed = folder.parent / "extended"
    renamed.symlink_to(new)
    flags = ["--tokenizers", base, str(renamed), "--base", base, "--corpus", *texts, "--output", str(folder)]
    assert main([*flags, "--progress", "off"]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_figures_equal_plain_counts(made, texts, tokenizers, extended):
    from transformers import AutoTokenizer

    folders = {
        "sentencepiece": tokenizers["sentencepiece"],
        "extended": extended["sentencepiece"]["settings"]["output"],
    }
    old = set(AutoTokenizer.from_pretrained(folders["sentencepiece"]).get_vocab())
    for file, rows in texts.items():
        table = made[1][Path(file).name]
        assert [row["tokenizer"] for row in table] == list(folders)
        for row in table:
            tokenizer = AutoTokenizer.from_pretrained(folders[row["tokenizer"]])
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in rows]
            tokens, characters = sum(map(len, ids)), sum(map(len, rows))
            assert (row["samples"], row["tokens"], row["characters"]) == (len(rows), tokens, characters)
            assert row["vocabulary_size"] == len(tokenizer)
            assert row["tokens_per_character"] == tokens / characters
            assert row["tokens_per_sample"] == tokens / len(rows)
            assert row["bytes_per_token"] == sum(len(text.encode()) for text in rows) / tokens
            new = {token for piece, token in tokenizer.get_vocab().items() if piece not in old}
            assert row["new_tokens"] == len(new)
            used = {token for text in ids for token in text} & new
            assert row["new_tokens_used"] == (len(used) / len(new) if new else None)


def test_new_tokens_are_used_in_their_language_only(made):
    share = {name: table[1]["new_tokens_used"] for name, table in made[1].items()}
    assert share["zh.jsonl"] > 0.5 and share["en.jsonl"] == 0


def test_the_table_has_the_form_of_the_original(made):
    lines = (made[0] / "report.md").read_text().splitlines()
    row = made[1]["zh.jsonl"][1]
    assert lines[0] == "## zh.jsonl" and lines[4].startswith("| Model | Vocabulary Size | Compression Rate |")
    cells = [cell.strip() for cell in lines[7].strip("|").split("|")]
    assert cells[:4] == [
        "extended",
        str(row["vocabulary_size"]),
        f"{row['tokens_per_character']:.3f}",
        f"{row['tokens_per_sample']:.3f}",
    ]
    ElementTree.parse(made[0] / "report.svg")


def test_drawing_some_samples_depends_on_the_seed_only(tokenizers, texts, tmp_path):
    from colossal_llama.tokenizer_report import ReportConfig, report

    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = dict(tokenizers=[tokenizers["byte-level"]], corpus=[next(iter(texts))], progress="off")
        tables.append(report(ReportConfig(**settings, output=str(tmp_path / name), samples=10, seed=seed)))
    assert tables[0] == tables[1] != tables[2]
    assert tables[0]["zh.jsonl"][0].samples == 10


def test_bad_input_is_named_and_leaves_nothing(tokenizers, texts, tmp_path, capsys):
    from colossal_llama.tokenizer_report import main

    bad, folder, corpus = tmp_path / "bad.jsonl", tokenizers["byte-level"], next(iter(texts))

    def refusal(*flags: str) -> str:
        assert main([*flags, "--output", str(tmp_path / "out"), "--progress", "off"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and not list(tmp_path.glob("out*"))
        return lines[0]

    bad.write_bytes(b'{"text": "\xff"}')
    assert "bad.jsonl:1 is not UTF-8" in refusal("--tokenizers", folder, "--corpus", str(bad))
    bad.write_bytes(b"")
    assert "holds no text" in refusal("--tokenizers", folder, "--corpus", str(bad))
    assert "does not exist" in refusal("--tokenizers", str(tmp_path / "gone"), "--corpus", corpus)
    assert "Nothing to compare" in refusal("--tokenizers", folder)
    assert "'byte-level' names" in refusal("--tokenizers", folder, folder, "--corpus", corpus)
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer that transformers can load" in refusal(
        "--tokenizers", str(tmp_path / "empty"), "--corpus", corpus
    )
    (tmp_path / "out").mkdir()
    assert main(["--tokenizers", folder, "--corpus", corpus, "--output", str(tmp_path / "out")]) == 2
    assert "out exists" in capsys.readouterr().err
