"""Rows from files, folders and tables of all sorts are the same rows."""

import bz2
import gzip
import json

import pytest

from coati.data import DataConfig, build_dataset, load_rows, parse_record
from coati.data.sources import fingerprint
from coati.errors import UserError

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


# --- containers, slices, encodings

FIVE = [{"prompt": f"{i}", "completion": "é中\u2028x"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in FIVE)


def zstandard(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.Codec("zstd").compress(data, asbytes=True)


WAYS = {
    "lines.jsonl": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),  # to_json of datasets and pandas
    "list.json": json.dumps(FIVE, indent=2).encode(),
    "list.jsonl": b"\n" + json.dumps(FIVE).encode(),
    "indented list.jsonl": json.dumps(FIVE, indent=2).encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed in parts.jsonl.gz": b"".join(gzip.compress(line.encode() + b"\n") for line in LINES.split("\n")[:-1]),
    "packed.jsonl.zst": zstandard(LINES.encode()),
    "packed.jsonl.bz2": bz2.compress(LINES.encode()),
    "packed list.json.gz": gzip.compress(json.dumps(FIVE).encode()),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "mark.json": json.dumps(FIVE, ensure_ascii=False).encode("utf-8-sig"),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16 without a mark.jsonl": LINES.encode("utf-16-le"),
    "utf16 list.json": json.dumps(FIVE).encode("utf-16"),
    "utf16.jsonl.gz": gzip.compress(LINES.encode("utf-16")),
    "utf32.jsonl": LINES.encode("utf-32"),
    "cr.jsonl": LINES.replace("\n", "\r").encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "no newline at the end.jsonl": LINES.rstrip("\n").encode(),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_store_rows_gives_the_same(name, tmp_path):
    """REPORT 24: containers and encodings; the line numbers are those of the file."""
    (tmp_path / name).write_bytes(WAYS[name])
    rows = list(load_rows(str(tmp_path / name)))
    assert [row for _, row in rows] == FIVE
    assert [number for number, _ in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_one_object_is_one_row(suffix, tmp_path):
    """REPORT 24: to_json of a set with one row."""
    (tmp_path / f"a{suffix}").write_text(json.dumps(FIVE[0]) + "\n")
    assert list(load_rows(str(tmp_path / f"a{suffix}"))) == [(1, FIVE[0])]
    (tmp_path / "b.json").write_text(json.dumps(FIVE[0], indent=2))
    assert list(load_rows(str(tmp_path / "b.json"))) == [(1, FIVE[0])]


@pytest.fixture
def saved(tmp_path):
    """Folders as `datasets` writes them: one set, and one with splits; and a folder of files."""
    import datasets

    rows = datasets.Dataset.from_list(FIVE)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([3])).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    for name, lines in (("train", LINES), ("test", json.dumps(FIVE[3]) + "\n")):
        (tmp_path / "files" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(LINES, encoding="utf-8")
    return tmp_path


SPLITS = {
    "one": [0, 1, 2, 3, 4],
    "one:train": [0, 1, 2, 3, 4],
    "one:train[-1:]": [4],
    "two": [0, 1, 2, 3, 4],
    "two:test": [3],
    "two:train[:2]": [0, 1],
    "two:train[1:3]+test": [1, 2, 3],
    "two:train[:40%]": [0, 1],
    "files": [0, 1, 2, 3, 4],
    "files:test": [3],
    "files:train[1:3]": [1, 2],
    "rows.jsonl:train[1:3]": [1, 2],
    "rows.jsonl:train[-2:]": [3, 4],
}


@pytest.mark.parametrize("place", SPLITS)
@pytest.mark.parametrize("how", ["absolute", "relative", "with a dot"])
def test_splits_and_slices_of_what_lies_here(place, how, saved, monkeypatch):
    """REPORT 24: FOLDER:SPLIT, also of saved sets and files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "cache")
    monkeypatch.chdir(saved)
    source = {"absolute": f"{saved}/{place}", "relative": place, "with a dot": f"./{place}"}[how]
    rows = list(load_rows(source))
    assert [row for _, row in rows] == [FIVE[i] for i in SPLITS[place]]
    assert fingerprint(source) == fingerprint(source)
    if place.startswith("rows"):
        assert [number for number, _ in rows] == [i + 1 for i in SPLITS[place]]


WRONG_PLACES = {
    "one:test": "has no split 'test' .* it has train",
    "two:valid": "has no split 'valid' .* it has train, test",
    "rows.jsonl:test": "has no split 'test' .* it has train",
    "rows.jsonl:train[": "has no split",
    "gone.jsonl:train[:2]": "gone.jsonl:train.* does not exist",
    "gone.jsonl.gz": "gone.jsonl.gz does not exist",
    "text.txt": "unknown format",
    "short.jsonl.gz": "short.jsonl.gz cannot be read",
    "not packed.jsonl.zst": "not packed.jsonl.zst cannot be read",
    "cut.jsonl": "cut.jsonl is not UTF-16 text",
    "broken.jsonl": "broken.jsonl is not valid JSON",
    "damaged": "damaged cannot be read",
}


@pytest.mark.parametrize("place", WRONG_PLACES)
def test_what_cannot_be_read_as_a_whole_is_one_line_with_the_cause(place, saved, monkeypatch):
    """REPORT 24: splits that are not there, torn files."""
    monkeypatch.chdir(saved)
    (saved / "text.txt").write_text("x")
    (saved / "short.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    (saved / "not packed.jsonl.zst").write_text(LINES)
    (saved / "cut.jsonl").write_bytes(LINES.encode("utf-16")[:-1])
    (saved / "broken.jsonl").write_text("[" + LINES)
    (saved / "damaged").mkdir()
    (saved / "damaged" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=WRONG_PLACES[place]) as error:
        list(load_rows(place))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "shift-jis"])
def test_lines_in_another_encoding_are_named(encoding, tmp_path, tokenizer_for):
    """REPORT 24: the cause and the line, and not that it is no JSON."""
    text = {"gbk": "中文", "latin-1": "café", "shift-jis": "日本"}[encoding]
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": text, "completion": "b"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(lines.encode(encoding))
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="line 2: the line is not UTF-8 text; save the file as UTF-8"):
        build_dataset([str(tmp_path / "rows.jsonl")], "sft", tokenizer_for("default"), config)


# --- nulls of tables

MIXED = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"prompt": "hi", "completion": "hello", "meta": {"level": 3}},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "b", "arguments": {"y": "z"}}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "hello"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": "int"}}}}},
            {"type": "function", "function": {"name": "b", "parameters": {"properties": {"y": {"enum": ["z"]}}}}},
        ],
    },
]


@pytest.mark.parametrize("kind", ["sft", "prompt"])
@pytest.mark.parametrize("container", ["parquet", "saved"])
def test_the_nulls_of_a_table_are_no_fields_at_any_level(container, kind, tmp_path):
    """REPORT 23: a table gives every struct the fields of all rows; the records are those of the JSON rows."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    names = {name: None for row in MIXED for name in row}
    table = pyarrow.Table.from_pylist([names | row for row in MIXED])
    assert table.to_pylist()[0]["messages"][0]["from"] is None, "the table must have what this test is about"
    place = tmp_path / "rows.parquet" if container == "parquet" else tmp_path / "saved"
    if container == "parquet":
        parquet.write_table(table, place)
    else:
        datasets.Dataset(table).save_to_disk(place)
    rows = [row for _, row in load_rows(str(place))]
    assert [parse_record(row, kind) for row in rows] == [parse_record(row, kind) for row in MIXED]
    assert rows == MIXED


def test_nulls_of_json_stay_where_they_have_a_meaning(write_jsonl):
    """REPORT 23: in the arguments of a call a null is a value; a message's or a row's is none."""
    call = {"function": {"name": "a", "arguments": {"x": None}}}
    messages = [
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "hello", "tool_calls": None},
    ]
    [(_, row)] = load_rows(write_jsonl([{"messages": messages, "tools": None}]))
    [record] = parse_record(row, "sft")
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": None}
    assert set(record.messages[0]) == set(record.messages[3]) == {"role", "content"} and record.tools is None
