"""Atomic writes of files and folders."""

import ast
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from coati.files import atomic_write, partial_path, remove_folder, remove_partials, replace_file, write_json
from tests.conftest import ROOT
from tests.kills import killed_before

OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "c": "new"}


def write_file(target: Path, contents: dict[str, str]):
    with atomic_write(target) as partial:
        partial.write_text(json.dumps(contents))


def write_folder(target: Path, contents: dict[str, str]):
    with atomic_write(target) as partial:
        (partial / "below").mkdir(parents=True)
        for name, text in contents.items():
            (partial / "below" / name).write_text(text)


def read(target: Path) -> dict[str, str] | None:
    if target.is_dir():
        return {path.name: path.read_text() for path in (target / "below").iterdir()}
    return json.loads(target.read_text()) if target.exists() else None


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@WRITERS
def test_what_was_there_is_replaced_and_nothing_else_stays(write, tmp_path):
    for contents in (OLD, NEW):
        write(tmp_path / "target", contents)
        assert read(tmp_path / "target") == contents
        assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [None, OLD])
@WRITERS
def test_an_error_leaves_what_was_there_and_nothing_half_written(write, before, error, tmp_path):
    if before is not None:
        write(tmp_path / "target", before)

    def fail(target: Path):
        with atomic_write(target) as partial:
            partial.mkdir()
            (partial / "half").write_text("wri")
            raise error

    with pytest.raises(type(error)):
        fail(tmp_path / "target")
    assert read(tmp_path / "target") == before
    assert not list(tmp_path.glob("*.partial"))


@WRITERS
def test_killed_before_any_operation_it_is_the_old_one_or_the_new_one(write, tmp_path):
    """PITFALL 26: a folder that is replaced is absent for a moment, but never in parts."""
    folder = tmp_path / "folder"
    allowed = [OLD, NEW] if write is write_file else [OLD, NEW, None]
    for operation in range(100):
        folder.mkdir()
        write(folder / "target", OLD)
        killed = killed_before(operation, folder, lambda: write(folder / "target", NEW))
        assert read(folder / "target") in allowed
        if not killed:
            break
        write(folder / "target", NEW)
        assert [path.name for path in folder.iterdir()] == ["target"] and read(folder / "target") == NEW
        shutil.rmtree(folder)
    assert 3 < operation < 99 and read(folder / "target") == NEW


@WRITERS
def test_all_is_on_disk_before_the_rename_and_the_name_after_it(write, tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(Path(os.readlink(f"/proc/self/fd/{number}"))))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write(tmp_path / "target", NEW)
    partial = partial_path(tmp_path / "target")
    within = [] if write is write_file else [partial / "below", *(partial / "below" / name for name in NEW)]
    assert sorted(calls[:-2]) == sorted([partial, *within]) and calls[-2:] == ["rename", tmp_path]


def sync_files_only(number: int):
    if Path(f"/proc/self/fd/{number}").is_dir():
        raise OSError(errno.EINVAL, "Invalid argument")


def test_a_file_system_that_syncs_no_folders_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", sync_files_only)
    write_folder(tmp_path / "target", NEW)
    assert read(tmp_path / "target") == NEW


def test_a_file_that_can_not_be_synced_is_an_error(tmp_path, monkeypatch):
    """PITFALL 26: it may be lost, so it must not take the old one's place."""

    def fail(number: int):
        raise OSError(errno.EIO, "Input/output error")

    write_file(tmp_path / "target", OLD)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_file(tmp_path / "target", NEW)
    assert read(tmp_path / "target") == OLD


def test_a_removed_folder_never_looks_whole(tmp_path):
    """PITFALL 26: killed at any moment of its removal."""
    folder = tmp_path / "folder"
    for operation in range(100):
        folder.mkdir()
        write_folder(folder / "target", OLD)
        killed = killed_before(operation, folder, lambda: remove_folder(folder / "target"))
        assert read(folder / "target") in (OLD, None)
        if not killed:
            break
        remove_partials(folder)
        assert [path.name for path in folder.iterdir()] in ([], ["target"])
        shutil.rmtree(folder)
    assert 2 < operation < 99 and not list(folder.iterdir())


def test_json_is_written_aside_and_renamed(tmp_path):
    """PITFALL 26: a value that can't be written leaves the old file as it was."""
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_text_that_no_encoding_has_is_written_with_a_mark(tmp_path):
    replace_file(tmp_path / "a.txt", "half a pair: \ud800")
    assert (tmp_path / "a.txt").read_text() == "half a pair: ?"


def test_there_is_no_other_way_to_do_it():
    """Nothing else in coati renames over a file or syncs one."""
    own = {("os", "replace"), ("os", "rename"), ("os", "fsync")}
    for path in sorted((ROOT / "coati").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        found = own & {(node.value.id, node.attr) for node in calls if isinstance(node.value, ast.Name)}
        assert not found or path == ROOT / "coati" / "files.py", path
