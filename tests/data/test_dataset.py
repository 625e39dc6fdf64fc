"""Building a data set: the report, the cache, and one clear error for each kind of bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coati.config import parse_config
from coati.data import DataConfig, build_dataset, dataset, prepare_tokenizer, tokenize
from coati.data.records import parse_record
from coati.errors import UserError

GOOD = [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(12)]
PAIRS = [{"prompt": "hi", "chosen": "hello", "rejected": "go " * i, "margin": i} for i in range(1, 4)]


@pytest.fixture
def tokenizer(tokenizer_for):
    return tokenizer_for("default")


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind, rows", [("sft", GOOD), ("prompt", GOOD), ("preference", PAIRS)])
def test_samples_are_those_of_tokenize_in_order(kind, rows, tokenizer, config, write_jsonl):
    data = build_dataset([write_jsonl(rows)], kind, tokenizer, config)
    expected = [tokenize(parse_record(row, kind)[0], tokenizer, config) for row in rows]
    assert list(data) == expected
    assert data.lengths.tolist() == [len(sample) for sample in expected]
    assert len(data) == len(rows) and data[np.int64(1)] == expected[1]


def test_sources_keep_their_order_and_weights(tokenizer, config, write_jsonl):
    sources = [write_jsonl(GOOD[:3], "a.jsonl"), write_jsonl(GOOD[3:5], "b.jsonl")]
    data = build_dataset(sources, "sft", tokenizer, config, weights=[1.0, 0.5])
    assert data.part_of_row.tolist() == [0, 0, 0, 1, 1]
    assert data.weights_per_row.tolist() == [1, 1, 1, 0.5, 0.5]
    assert data.report.samples == dict(zip(sources, [3, 2], strict=True))
    assert build_dataset(sources, "sft", tokenizer, config).weights_per_row is None


def test_weights_must_fit_the_sources(tokenizer, config, write_jsonl):
    with pytest.raises(UserError, match="2 values for 1"):
        build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config, weights=[1, 2])
    with pytest.raises(UserError, match="not all 0"):
        DataConfig(train_data=["a"], train_weights=[0.0])


BAD = [GOOD[0], '{"prompt": ', {"text": "x"}, GOOD[1], {"prompt": "x", "completion": ""}]
BAD += [{"text": "x"}] * 5 + [{"prompt": "x " * 3000, "completion": "y"}]


def test_the_report_counts_reasons_with_first_lines(tokenizer, config, write_jsonl):
    """PITFALL 20: no row vanishes without a word."""
    config.bad_rows = "drop"
    source = write_jsonl(BAD)
    report = build_dataset([source], "sft", tokenizer, config).report
    found = {p.reason: (p.count, p.lines, p.bad) for p in report.problems}
    assert found == {
        "the line is not valid JSON": (1, [2], True),
        "no known fields for sft data, only `text`": (6, [3, 6, 7], True),
        "a response is empty": (1, [5], True),
        "the row is longer than --max_length 1024 tokens": (1, [11], False),
    }
    assert report.rows[source] == 11 and report.samples[source] == 2
    assert str(report).splitlines()[0] == f"{source}: 11 rows, 2 samples"
    assert f"dropped 6 rows: no known fields for sft data, only `text` ({source}, line 3, 6, 7, ...)" in str(report)


def test_the_report_fits_one_screen():
    from coati.data import ValidationReport

    report = ValidationReport({"a": 100}, {"a": 0})
    for i in range(100):
        report.drop("a", i, f"reason {i}", bad=True)
    assert len(str(report).splitlines()) <= 24 and "85 more rows" in str(report)


@pytest.mark.parametrize("train_on", ["all", "each"])
def test_the_report_counts_what_no_sample_holds(train_on, tokenizer, config, write_jsonl):
    """REPORT 8: by field, once per row however many samples it gives; also when it is read from the cache."""
    config.train_on = train_on
    dialogue = [{"role": "user", "content": "a", "name": "Al"}, {"role": "assistant", "content": "b"}] * 2
    rows = [{"id": 0, **GOOD[0]}, GOOD[1], {"messages": dialogue, "id": 2}, {"id": 3, "tag": "x", **GOOD[2]}]
    source = write_jsonl(rows)
    for _ in range(2):
        report = build_dataset([source], "sft", tokenizer, config).report
        assert {(p.reason, p.count, *p.lines) for p in report.unused} == {
            ("`id`", 3, 1, 3, 4),
            ("`tag`", 1, 4),
            ("the chat template leaves out or rewrites `name` of user messages", 1, 3),
        }
        assert f"  not used of 3 rows: `id` ({source}, line 1, 3, 4)" in str(report).splitlines()
        assert report.problems == [] and report.bad_rows == 0


def test_the_report_names_every_unused_field_in_few_lines():
    """REPORT 8: a table may have a hundred columns."""
    from coati.data import ValidationReport

    report = ValidationReport({"a": 9}, {"a": 9})
    for name in range(100):
        report.note("a", 1, f"`field{name}`")
    assert len(str(report).splitlines()) <= 10 and all(f"`field{name}`" in str(report) for name in range(100))


def test_a_bad_row_is_an_error_with_file_line_and_remedy(tokenizer, config, write_jsonl):
    """PITFALL 20: checked at the start."""
    source = write_jsonl(BAD)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError) as error:
            build_dataset([source], "sft", tokenizer, config)
        assert f"{source} line 2: the line is not valid JSON (1 of 11 rows)" in str(error.value)
        assert "--bad_rows drop" in str(error.value)


def test_a_row_that_is_only_too_long_is_no_error(tokenizer, config, write_jsonl):
    assert len(build_dataset([write_jsonl([GOOD[0], BAD[-1]])], "sft", tokenizer, config)) == 1


@pytest.mark.parametrize("rows", [[], ["", ""], [{"text": "x"}], [BAD[-1]]])
def test_nothing_left_is_an_error(rows, tokenizer, config, write_jsonl):
    config.bad_rows = "drop"
    with pytest.raises(UserError, match=r"No usable rows in .*rows\.jsonl"):
        build_dataset([write_jsonl(rows)], "sft", tokenizer, config)


def test_no_source_and_a_missing_source_are_errors(tokenizer, config):
    with pytest.raises(UserError, match="--train_data"):
        build_dataset([], "sft", tokenizer, config)
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        build_dataset(["gone.jsonl"], "sft", tokenizer, config)


def test_a_cache_folder_that_cannot_be_made_is_an_error(tokenizer, write_jsonl, tmp_path):
    (tmp_path / "file").write_text("")
    config = DataConfig(cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="--cache_dir"):
        build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config)


@pytest.fixture
def builds(monkeypatch):
    """Count the real builds."""
    calls = []
    build = dataset._build
    monkeypatch.setattr(dataset, "_build", lambda *arguments: (calls.append(1), build(*arguments)))
    return calls


def test_a_second_build_reads_the_cache_with_its_report(tokenizer, config, write_jsonl, builds):
    config.bad_rows = "drop"
    first, second = (build_dataset([write_jsonl(BAD)], "sft", tokenizer, config) for _ in range(2))
    assert len(builds) == 1
    assert list(first) == list(second) and first.report == second.report


def test_using_the_tokenizer_in_between_does_not_invalidate_the_cache(new_tokenizer, config, write_jsonl, builds):
    tokenizer, _ = prepare_tokenizer(new_tokenizer())
    build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config)
    assert len(builds) == 1


def test_a_changed_file_template_setting_or_kind_is_built_anew(new_tokenizer, config, write_jsonl, builds):
    tokenizer, _ = prepare_tokenizer(new_tokenizer())
    build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config)
    build_dataset([write_jsonl(GOOD[1:])], "sft", tokenizer, config)
    assert len(builds) == 2
    config.max_length = 100
    build_dataset([write_jsonl(GOOD[1:])], "sft", tokenizer, config)
    assert len(builds) == 3
    tokenizer.chat_template = tokenizer.chat_template.replace("User", "Human")
    data = build_dataset([write_jsonl(GOOD[1:])], "sft", tokenizer, config)
    assert len(builds) == 4 and "Human: " in tokenizer.decode(data[0].input_ids)
    build_dataset([write_jsonl(GOOD[1:])], "prompt", tokenizer, config)
    assert len(builds) == 5


def test_a_build_that_fails_leaves_no_data(tokenizer, config, write_jsonl, monkeypatch):
    """PITFALL 26: nothing that looks whole."""

    def fail(*arguments):
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_tokenized", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config)
    assert [p for p in Path(config.cache_dir).iterdir() if p.suffix != ".lock"] == []
    assert len(build_dataset([write_jsonl(GOOD)], "sft", tokenizer, config)) == len(GOOD)


CHILD = """
import sys, time
from transformers import PreTrainedTokenizerFast
from coati.config import parse_config
from coati.data import DataConfig, build_dataset, dataset, prepare_tokenizer
source, tokenizer, cache, mode = sys.argv[1:]
tokenizer, _ = prepare_tokenizer(PreTrainedTokenizerFast.from_pretrained(tokenizer))
original = dataset._tokenized
def slow(*arguments):
    yield from original(*arguments)
    print("started", flush=True)
    time.sleep(60 if mode == "hang" else 0.5)
dataset._tokenized = slow
print(len(build_dataset([source], "sft", tokenizer, DataConfig(cache_dir=cache))), flush=True)
"""


def start(source: str, folder: Path, cache: str, mode: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(dataset.__file__).parents[2])}
    command = [sys.executable, "-c", CHILD, source, str(folder), cache, mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_build_leaves_no_data_and_racing_builds_agree(new_tokenizer, config, write_jsonl, tmp_path):
    """PITFALL 26: kill -9 half-way, then two processes at once; one of them builds, both read the same."""
    tokenizer, _ = prepare_tokenizer(new_tokenizer())
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(GOOD)
    killed = start(source, tmp_path / "tokenizer", config.cache_dir, "hang")
    assert killed.stdout.readline() == "started\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert {path.suffix for path in Path(config.cache_dir).iterdir()} == {".lock", ".partial"}
    racers = [start(source, tmp_path / "tokenizer", config.cache_dir, "race") for _ in range(2)]
    outputs = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert sorted(outputs, key=len) == [["12"], ["started", "12"]]
    assert len([p for p in Path(config.cache_dir).iterdir() if p.suffix != ".lock"]) == 1


def test_importing_is_fast():
    """Heavy libraries are imported when they are used."""
    code = "import sys, coati.data; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(dataset.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]", result.stderr


def test_config_is_parsed():
    flags = ["--train_data", "a", "b", "--train_weights", "1", "0.5", "--too_long", "truncate_prompt"]
    config = parse_config(DataConfig, flags)
    assert config == DataConfig(train_data=["a", "b"], train_weights=[1.0, 0.5], too_long="truncate_prompt")
    with pytest.raises(UserError, match="max_length is 0"):
        DataConfig(max_length=0)
