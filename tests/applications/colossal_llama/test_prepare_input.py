"""Bad input to `prepare_pretrain` is one clear error that leaves nothing behind, or is counted; what is dropped too."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from colossal_llama.data.deduplication import Deduplication, normalize, shingles
from colossal_llama.data.quality_filters import Filters, repeated_lines, symbol_and_digit_shares
from colossal_llama.prepare_pretrain import main
from tests.applications.colossal_llama.prepared import byte_level, corpus, flags, read_rows, run, write_jsonl

GOOD = {"source": "", "target": "red", "category": "c"}


def assert_refused(command: list[str], message: str, folder, capsys):
    """Status 2, one line on stderr, and no file but those that were there."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


BAD = [
    (b'{"target": "\xff", "category": "c"}', "the line is not UTF-8"),
    (b'{"target": "red", ', "the line is not valid JSON"),
    (b"[" * 100_000, "the line is not valid JSON"),
    (b"[1]", "the row is not an object with named fields"),
    ({"target": "red"}, "`category` is missing, and --category names none"),
    ({"target": "red", "category": " "}, "`category` is empty"),
    ({"target": "red", "category": 3}, "`category` is not text"),
    ({"category": "c"}, "the row has neither `target` nor `text`"),
    ({"target": " \n", "category": "c"}, "`target` is empty"),
    ({"text": None, "target": ["red"], "category": "c"}, "`target` is not text"),
    ({"text": "red", "target": "red", "category": "c"}, "the row has both `text` and `target`"),
    ({**GOOD, "source": "\ud800"}, "`source` has half a surrogate pair"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_a_malformed_row_is_named_by_file_and_line(row, reason, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [GOOD, b"", b"", GOOD, row])
    for part_size in ("4", "0.00001"):
        command = flags(data, tmp_path / "out", f"--part_megabytes={part_size}")
        assert_refused(command, f"{data} line 5: {reason}", tmp_path, capsys)


def test_malformed_rows_are_counted_by_reason_on_demand(tmp_path):
    rows = [row for row, _ in BAD] + [GOOD] + [{"target": "red"}] * 4
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    for size in ("4", "0.00001"):
        manifest = run(data, tmp_path / size, "--bad_rows=count", f"--part_megabytes={size}")
        missing = next(bad for bad in manifest["bad_rows"] if "is missing" in bad["reason"])
        assert (missing["file"], missing["count"], missing["first_lines"]) == (data, 5, [5, 14, 15])
        assert sum(bad["count"] for bad in manifest["bad_rows"]) == len(BAD) + 4
        assert manifest["files"][data] == {"rows": len(rows), "documents": 1}


@pytest.mark.parametrize("content, message", [(b"", "holds no documents"), (b"\n \n", "holds no documents")])
def test_a_file_without_rows_is_refused(content, message, tmp_path, capsys):
    good, empty = write_jsonl(tmp_path / "good.jsonl", [GOOD]), tmp_path / "empty.jsonl"
    empty.write_bytes(content)
    assert_refused(flags(f"{good},{empty}", tmp_path / "out"), f"{empty} {message}", tmp_path, capsys)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--output={folder}"], "exists; remove it"),
        (["--tokenizer={folder}/none"], "none does not exist"),
        (["--tokenizer={folder}"], "holds no tokenizer that transformers can load"),
        (["--data={folder}/none.jsonl"], "none.jsonl cannot be read (No such file"),
        (["--data={folder}/rows.txt"], "rows.txt is not a .jsonl file"),
        (["--buckets=2"], "of documents c has 1; give --buckets 1 or fewer"),
        (["--buckets=0"], "--buckets is 0; give a number above 0"),
        (["--max_digit_share=2"], "--max_digit_share is 2.0; give a share"),
        (["--min_characters=9"], "drop every document"),
        (["--speed=9"], "'--speed=9' is no flag"),
    ],
)
def test_settings_that_cannot_be_met_are_one_error(more, message, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    more = [flag.format(folder=tmp_path) for flag in more]
    assert_refused([*flags(data, tmp_path / "out"), *more], message, tmp_path, capsys)


def test_a_tokenizer_without_offsets_is_refused(tmp_path, capsys):
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    data = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    command = flags(data, tmp_path / "out", tokenizer=str(tmp_path / "slow"))
    assert_refused(command, "(ByT5Tokenizer) gives no character offsets", tmp_path, capsys)


def test_help_imports_no_torch():
    code = "import sys\nfrom colossal_llama.prepare_pretrain import main\ntry: main(['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True)
    assert (shown.returncode, shown.stderr) == (0, b"") and b"--max_length" in shown.stdout


def test_exact_duplicates_are_dropped_but_for_the_first(tmp_path):
    texts = ["red  green", "lamp", " red green\n", "red Green", "e\u0301", "\u00e9"]
    rows = [{"text": text, "category": "c"} for text in texts] + [
        {"source": "red ", "target": "green", "category": "d"}
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, GOOD | {"category": "d"}])
    manifest = run(data, tmp_path / "out", "--deduplicate=exact", "--max_length=64")
    dropped = [{"file": data, "reason": "a duplicate (exact)", "count": 3, "first_lines": [3, 6, 7]}]
    assert manifest["dropped"] == dropped and manifest["total"]["documents"] == 5


def test_near_duplicates_are_those_of_a_plain_comparison():
    """Pairs far above and far below the threshold; each text against all that were kept before it."""
    choose = random.Random(0)
    texts = ["".join(choose.choices("abcdefghij你好", k=300)) for _ in range(40)]
    texts = [text for t in texts for text in (t, t[:150] + "X" + t[151:], t[:100] + t[250:])]
    choose.shuffle(texts)
    kept: list[set[str]] = []
    expected = []
    for text in texts:
        mine = shingles(text)
        expected.append(not any(len(mine & other) / len(mine | other) >= 0.8 for other in kept))
        kept += [mine] if expected[-1] else []
    minhash = Deduplication("minhash", 0.8)
    assert minhash.is_first(minhash.signatures(texts)).tolist() == expected
    assert 40 < sum(expected) < 120


def test_near_duplicates_do_not_depend_on_parts(tmp_path):
    rows = [row | {"target": row["target"] + end} for row in corpus(20) for end in (" lamp" * 20, " lamp" * 20 + "!")]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    manifests = [run(data, tmp_path / p, "--deduplicate=minhash", f"--part_megabytes={p}") for p in ("4", "0.001")]
    assert manifests[0]["dropped"] == manifests[1]["dropped"]
    assert [row["input_ids"] for row in read_rows(tmp_path / "4")] == [
        row["input_ids"] for row in read_rows(tmp_path / "0.001")
    ]
    assert manifests[0]["total"]["documents"] < 40


@given(st.text(st.sampled_from("a1!\n ，你٣०²"), max_size=30))
def test_shares_are_those_of_plain_counts(text):
    solid = [c for c in text if not c.isspace()]
    expected = (sum(c in "!，" for c in solid), sum(c in "1٣०" for c in solid))
    assert symbol_and_digit_shares(text) == pytest.approx([count / max(1, len(solid)) for count in expected])
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    repeats = sum(line in lines[:i] for i, line in enumerate(lines))
    assert repeated_lines(text) == pytest.approx(repeats / max(1, len(lines)))
    assert normalize(text) == " ".join(text.split())


@pytest.mark.parametrize(
    "text, filters, reason",
    [
        ("red green", Filters(), None),
        ("red  ", Filters(min_characters=4), "fewer than 4 characters"),
        ("a!?", Filters(max_symbol_share=0.5), "over 50% symbols"),
        ("a12", Filters(max_digit_share=0.5), "over 50% digits"),
        ("一二三", Filters(max_digit_share=0.0, max_symbol_share=0.0), None),
        ("नमस्ते", Filters(max_symbol_share=0.0), None),
        ("a\nb\na\na", Filters(max_repeated_lines=0.4), "over 40% of the lines repeat an earlier one"),
        ("a\nb\na\na", Filters(max_repeated_lines=0.5), None),
    ],
)
def test_filters_name_the_rule_that_is_broken(text, filters, reason):
    assert filters.reason_to_drop(text) == reason


def test_filtered_documents_are_counted(tmp_path):
    texts = ["red", "red green", "x" * 3, "12345678 ab"]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "category": "c"} for text in texts])
    manifest = run(data, tmp_path / "out", "--min_characters=4", "--max_digit_share=0.3", tokenizer=byte_level())
    assert {d["reason"]: (d["count"], d["first_lines"]) for d in manifest["dropped"]} == {
        "fewer than 4 characters": (2, [1, 3]),
        "over 30% digits": (1, [4]),
    }
    assert manifest["total"]["documents"] == 1
