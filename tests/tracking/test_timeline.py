"""Bars of what trainer and generators did: where the files say, and idle as counted instant by instant."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.errors import UserError
from coati.tracking.timeline import IDLE, ITERATIONS, Bar, generator_bars, idle_share, timeline, trainer_bars

START = 1.7e9


def row(step: int) -> dict:
    """An iteration of ten seconds that ends with its step: one to publish, three to wait, six to learn."""
    seconds = {"seconds/publish": 1.0, "seconds/wait": 3.0, "seconds/learn": 6.0, "seconds/generate": 9.0}
    return {"step": step, "time": START + 10.0 * step} | seconds


def write_job(journal, version: int, generator: int, started: float, load: float = 1.0, generate: float = 4.0):
    folder = journal / f"version-{version:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    told = {"version": version, "samples": 8, "generator": generator, "started": started}
    header = json.dumps(told | {"seconds": {"load": load, "generate": generate, "answers": 2.0}})
    (folder / f"{generator}-{started}.jsonl").write_text(header + '\n{"a sample": 1}\n{"checksum": "x"}\n')


def test_an_iteration_of_the_trainer_is_its_phases_one_after_the_other():
    bars = trainer_bars([{"step": 0, "time": START, "eval/loss": 1.0}, row(1)])
    assert [(bar.kind, bar.start - START, bar.end - START) for bar in bars] == [
        ("publish", 0, 1),
        ("wait", 1, 4),
        ("learn", 4, 10),
    ]


def test_a_job_of_a_generator_loads_weights_and_generates(tmp_path):
    write_job(tmp_path, 1, 1, START + 5)
    write_job(tmp_path, 0, 1, START)
    write_job(tmp_path, 0, 0, START)
    bars = generator_bars(tmp_path)
    assert list(bars) == [0, 1]
    assert [(bar.kind, bar.start - START, bar.end - START) for bar in bars[1]] == [
        ("load", 0, 1),
        ("generate", 1, 5),
        ("load", 5, 6),
        ("generate", 6, 10),
    ]


def test_a_damaged_journal_is_named(tmp_path):
    write_job(tmp_path, 0, 0, START)
    [path] = tmp_path.glob("*/*.jsonl")
    path.write_text("no job\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:1")):
        generator_bars(tmp_path)


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=8), st.integers(0, 15), st.integers(1, 40))
def test_what_is_idle_is_neither_bar_nor_wait(parts, start, length):
    bars, busy, now = [], set(), 0
    for seconds, waits in parts:
        bars.append(Bar(now, now + seconds, IDLE if waits else "learn", ""))
        busy |= set() if waits else set(range(now, now + seconds))
        now += seconds + 1
    idle = np.mean([second not in busy for second in range(start, start + length)])
    assert idle_share(bars, start, start + length) == pytest.approx(idle)


def test_a_timeline_has_the_last_iterations_of_trainer_and_generators(tmp_path):
    """All bars within the drawing, and the shares that they leave."""
    rows = [row(step) for step in range(1, 31)]
    for version in range(30):
        write_job(tmp_path, version, 0, START + 10 * version, 1.0, 4.0)
        write_job(tmp_path, version, 1, START + 10 * version, 0.5, 9.0)
    drawing = timeline(rows, tmp_path)
    assert re.findall(r">([\w ]+)</text><text[^>]*>(\d+)% idle", drawing) == [
        ("trainer", "30"),
        ("generator 0", "50"),
        ("generator 1", "5"),
    ]
    assert drawing.count("<title>iteration") == 2 * ITERATIONS and drawing.count("<title>version") == 4 * ITERATIONS
    edges = [
        (float(x), float(x) + float(w)) for x, w in re.findall(r'<rect[^>]* x="(.*?)"[^>]* width="(.*?)"', drawing)
    ]
    assert min(edges)[0] == 90 and max(right for _, right in edges) == pytest.approx(1090, abs=0.2)
    assert ">100 s</text>" in drawing and "<title>iteration 30: learn, 6 s</title>" in drawing


def test_a_run_without_generators_has_no_timeline(tmp_path):
    assert timeline([{"step": 1, "time": START, "seconds/generate": 1.0}], tmp_path) == ""
