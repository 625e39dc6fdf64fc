"""The same output however often a run is killed and however many processes work, and nothing half-written."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from colossal_llama.prepare_pretrain import main
from tests.applications.colossal_llama.prepared import content, corpus, flags, read_rows, run, write_jsonl
from tests.conftest import ROOT

MORE = ("--buckets=3", "--max_length=32", "--part_megabytes=0.002", "--deduplicate=exact", "--min_characters=6")
RENAMES = 12  # settings, tokenizer, 5 parts, 3 buckets, manifest, output


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", corpus())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(data, output, *MORE)
    return content(output)


def killed_run(command: list[str], at: int, before: bool) -> int:
    """Run `main` in a child that kills itself before or after it renames for the `at`-th time; returns the status."""
    count, rename = 0, os.rename

    def rename_or_die(*paths):
        nonlocal count
        count += 1
        if not before:
            rename(*paths)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if before:
            rename(*paths)

    def child():
        os.rename = os.replace = rename_or_die
        sys.exit(main(command))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(1, RENAMES + 1))
def test_a_killed_run_goes_on_to_the_same_files(at, before, data, whole, tmp_path):
    command = flags(data, tmp_path / "out", *MORE)
    assert killed_run(command, at, before) == -signal.SIGKILL
    finished = at == RENAMES and not before
    assert (tmp_path / "out").exists() == finished
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("bucket_0000?/*.arrow")}
    if not finished:
        assert main(command) == 0
        assert content(tmp_path / "out") == whole
    for path, time_written in kept.items():
        assert (tmp_path / "out" / path.relative_to(tmp_path / "out.partial")).stat().st_mtime_ns == time_written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_kills_above_are_all_there_are(data, tmp_path):
    assert killed_run(flags(data, tmp_path / "out", *MORE), RENAMES + 1, before=True) == 0


def test_parts_that_are_done_are_not_done_again(data, tmp_path):
    command = flags(data, tmp_path / "out", *MORE)
    killed_run(command, 5, before=True)
    parts = sorted((tmp_path / "out.partial" / "documents").glob("*.arrow"))
    written = [part.stat().st_mtime_ns for part in parts]
    killed_run(command, 4, before=True)
    assert len(parts) == 2 and [part.stat().st_mtime_ns for part in parts] == written


def test_processes_and_parts_do_not_change_the_rows(data, whole, tmp_path):
    run(data, tmp_path / "three", *MORE, "--processes=3")
    assert content(tmp_path / "three") == whole
    run(data, tmp_path / "one_part", *MORE, "--part_megabytes=4")
    buckets = {name: file for name, file in whole.items() if name != "manifest.json"}
    assert {name: file for name, file in content(tmp_path / "one_part").items() if name != "manifest.json"} == buckets


@pytest.mark.parametrize(
    "flag, message", [("--max_length=33", "max_length was 32, is 33"), ("--seed=1", "seed was 42")]
)
def test_other_settings_do_not_resume(flag, message, data, whole, tmp_path, capsys):
    command = flags(data, tmp_path / "out", *MORE)
    killed_run(command, 8, before=True)
    before = content(tmp_path)
    assert main([*command, flag]) == 2
    assert message in capsys.readouterr().err
    assert content(tmp_path) == before
    assert main(command) == 0
    assert content(tmp_path / "out") == whole


def test_changed_data_does_not_resume(data, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_bytes(Path(data).read_bytes())
    killed_run(flags(str(mine), tmp_path / "out", *MORE), 6, before=True)
    mine.write_bytes(Path(data).read_bytes() + json.dumps(corpus(1)[0]).encode())
    assert main(flags(str(mine), tmp_path / "out", *MORE)) == 2
    assert "data_sha256 was" in capsys.readouterr().err


def test_a_folder_of_somebody_elses_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    assert main(flags(data, tmp_path / "out", *MORE)) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_three_processes_killed_from_outside(data, whole, tmp_path):
    """At several moments; the children of the killed process end too."""
    script = str(ROOT / "applications" / "colossal_llama" / "prepare_pretrain.py")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "applications")])
    command = [sys.executable, script, *flags(data, tmp_path / "out", *MORE, "--processes=3")]
    for parts in (0, 2, 4):
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
        documents = tmp_path / "out.partial" / "documents"
        while process.poll() is None and len(list(documents.glob("*.arrow"))) <= parts:
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert psutil.wait_procs(children, timeout=30)[1] == []
    run(data, tmp_path / "out", *MORE)
    assert content(tmp_path / "out") == whole
    assert len(list(read_rows(tmp_path / "out"))) == json.loads(whole["manifest.json"])["total"]["rows"]
