"""What `prepare_pretrain` makes of rows: every token once, sources masked, one category a row, equal buckets."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.applications.colossal_llama.prepared import byte_level, corpus, metaspace, read_rows, run, write_jsonl
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data" / "text"


def plain_pieces(row: dict, tokenizer, max_length: int) -> list[tuple]:
    """A document's pieces (category, ids, labels): each token of a byte-level tokenizer is as many bytes as letters."""
    source, target = row.get("source") or "", row["target"]
    tokens = tokenizer.tokenize(source + target)
    ends = [sum(map(len, tokens[: i + 1])) for i in range(len(tokens))]
    masked = [bool(source), *(end <= len(source.encode()) for end in ends), False]
    ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(tokens), tokenizer.eos_token_id]
    labels = [-100 if mask else token for mask, token in zip(masked, ids, strict=True)]
    cuts = range(0, len(ids), max_length)
    return [(row["category"], tuple(ids[i : i + max_length]), (-100, *labels[i + 1 : i + max_length])) for i in cuts]


def packed_pieces(row: dict) -> list[tuple]:
    """The pieces of a packed row, told apart by its positions, which count from 0 in each."""
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    bounds = list(zip(starts, [*starts[1:], len(row["input_ids"])], strict=True))
    for start, end in bounds:
        assert row["position_ids"][start:end] == list(range(end - start))
    return [(row["category"], tuple(row["input_ids"][a:b]), tuple(row["labels"][a:b])) for a, b in bounds]


def assert_whole(rows: list[dict], output: Path, max_length: int, manifest: dict, tokenizer: str):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    expected = Counter(piece for row in rows for piece in plain_pieces(row, tokenizer, max_length))
    packed = list(read_rows(output))
    assert Counter(piece for row in packed for piece in packed_pieces(row)) == expected
    assert all(len(row["input_ids"]) <= max_length for row in packed)
    total = manifest["total"]
    assert manifest["tokens_in"] == total["tokens"] == sum(len(row["input_ids"]) for row in packed)
    assert total["trained_tokens"] == sum(label != -100 for row in packed for label in row["labels"])
    assert (total["documents"], total["rows"]) == (len(rows), len(packed))
    assert total["padding_share"] == pytest.approx(1 - total["tokens"] / (len(packed) * max_length), abs=1e-6)


texts = st.text(st.sampled_from("heloab  (\n你é😀"), max_size=40)
documents = st.fixed_dictionaries(
    {"source": texts, "target": texts.filter(str.strip), "category": st.sampled_from(["zh", "en"])}
)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(documents, min_size=1, max_size=12), max_length=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_token_of_every_document_comes_out_once(rows, max_length, seed, tmp_path_factory):
    """PITFALL 39: the residue of a window was dropped."""
    folder = tmp_path_factory.mktemp("property")
    data = write_jsonl(folder / "rows.jsonl", rows)
    manifest = run(data, folder / "out", f"--max_length={max_length}", f"--seed={seed}")
    assert_whole(rows, folder / "out", max_length, manifest, byte_level())


def labels_of(source: str, target: str, tokenizer: str, folder: Path, *more: str) -> tuple[list[str], list[str]]:
    """(all tokens, trained tokens) of one document, but for the first, which nothing predicts."""
    data = write_jsonl(folder / "rows.jsonl", [{"source": source, "target": target, "category": "c"}])
    run(data, folder / "out", *more, tokenizer=tokenizer)
    [row] = read_rows(folder / "out")
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    name = AutoTokenizer.from_pretrained(tokenizer).convert_ids_to_tokens
    return name(row["input_ids"]), name([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize(
    "tokenizer, source, target, all_tokens, trained",
    [
        (byte_level, "hello", " world", "<s> hello Ġworld </s>", "Ġworld </s>"),
        (byte_level, "hello wo", "rld", "<s> hello Ġworld </s>", "Ġworld </s>"),
        (byte_level, "hello ( ", " red", "<s> hello Ġ(ĠĠ red </s>", "Ġ(ĠĠ red </s>"),
        (byte_level, "", "red</s>", "<s> red < / s > </s>", "red < / s > </s>"),
        (metaspace, "hello", " world", "▁hello ▁world </s>", "▁world </s>"),
        (metaspace, "hello wo", "rld", "▁hello ▁world </s>", "▁world </s>"),
        (metaspace, "hello ", "é", "▁hello ▁ <0xC3> <0xA9> </s>", "<0xC3> <0xA9> </s>"),
    ],
)
def test_sources_are_masked_by_where_tokens_end(tokenizer, source, target, all_tokens, trained, tmp_path):
    """A token over the border is trained on; one spelled out in a text is text (PITFALL 40: EOS ends documents)."""
    assert labels_of(source, target, tokenizer(), tmp_path) == (all_tokens.split(), trained.split())


def test_a_source_ends_in_a_later_piece(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"source": "red red red", "target": " red" * 4, "category": "c"}])
    run(data, tmp_path / "out", "--max_length=3")
    rows = sorted((row["labels"] for row in read_rows(tmp_path / "out")), key=lambda labels: labels.count(-100))
    red, eos = rows[0][1], 2
    assert sorted(rows) == sorted([[-100, -100, -100], [-100, red, red], [-100, red, eos]])


@pytest.mark.parametrize(
    "tokenizer, bos, first", [(byte_level, "never", "red"), (metaspace, "always", "<s>"), (metaspace, "auto", "▁red")]
)
def test_bos_is_the_tokenizers_unless_said_otherwise(tokenizer, bos, first, tmp_path):
    assert labels_of("", "red", tokenizer(), tmp_path, f"--bos={bos}")[0][0] == first


def test_buckets_are_equal_parts_of_every_category(tmp_path):
    """PITFALL 45: 30 were asked for, 25 made."""
    rows = corpus(250)
    manifest = run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--max_length=64", "--buckets=30")
    assert len(list((tmp_path / "out").glob("bucket_*"))) == len(manifest["buckets"]) == 30
    for name, count in Counter(row["category"] for row in rows).items():
        counts = [bucket["categories"][name]["documents"] for bucket in manifest["buckets"]]
        assert sum(counts) == count and max(counts) - min(counts) <= 1
    assert_whole(rows, tmp_path / "out", 64, manifest, byte_level())


def test_more_than_a_hundred_buckets(tmp_path):
    rows = [{"text": f"red {i}", "category": "a"} for i in range(120)]
    run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--buckets=120")
    assert [len(row["input_ids"]) > 2 for row in read_rows(tmp_path / "out")] == [True] * 120


def test_the_seed_deals_out_documents(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", corpus())
    outputs = [tmp_path / f"out{i}" for i in range(3)]
    for output, seed in zip(outputs, (1, 1, 2), strict=True):
        run(data, output, "--buckets=3", f"--seed={seed}")
    first, again, other = ([row["input_ids"] for row in read_rows(output)] for output in outputs)
    assert first == again != other


def test_text_rows_and_a_category_for_rows_without(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "red", "category": "a"}, {"text": "blue"}, {"target": "lamp"}])
    manifest = run(data, tmp_path / "out", "--category=b")
    assert {name: counts["documents"] for name, counts in manifest["categories"].items()} == {"a": 1, "b": 2}
    assert manifest["files"] == {data: {"rows": 3, "documents": 3}}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data sets are not at {DATA}")
def test_nothing_of_real_chinese_and_english_is_lost(tmp_path):
    paths = [DATA / "zh_classics.jsonl", DATA / "en_c4_demo.jsonl"]
    rows = [json.loads(line) for path in paths for line in path.open(encoding="utf-8")]
    manifest = run(",".join(map(str, paths)), tmp_path / "out", "--max_length=1024", "--buckets=4")
    tokenizer = AutoTokenizer.from_pretrained(byte_level())
    lengths = Counter()
    for row in rows:
        lengths[row["category"]] += len(tokenizer(row["source"] + row["target"])["input_ids"]) + 1
    assert {name: counts["tokens"] for name, counts in manifest["categories"].items()} == lengths
    assert manifest["total"]["padding_share"] < 0.02
