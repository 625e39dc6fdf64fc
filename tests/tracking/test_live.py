"""`coati report --watch`: when the page is written, and when watching ends."""

import pytest

from coati.errors import UserError
from coati.tracking import Tracker, TrackingConfig, watch_report

RELOADS = "data-seconds='5'"


def start(folder):
    return Tracker(folder, TrackingConfig(), algorithm="sft", settings={})


class Sleep:
    """Runs one step each time that it is called, and keeps the page as it was before."""

    def __init__(self, page, *steps):
        self.page, self.steps, self.pages = page, list(steps), []

    def __call__(self, seconds):
        self.pages.append((self.page.stat().st_ino, self.page.read_text()))
        self.steps.pop(0)()


def test_the_page_is_written_when_something_was_logged_and_once_more_at_the_end(tmp_path):
    """A page that is written is another file, as it is renamed to its place."""
    tracker, page = start(tmp_path / "run"), tmp_path / "report.html"
    sleep = Sleep(
        page,
        lambda: tracker.log({"loss": 1.0}, 1),
        lambda: None,
        lambda: tracker.log_samples([{"prompt": "p", "response": "it grows"}], 1),
        lambda: tracker.finish("finished"),
    )
    assert watch_report([tmp_path / "run"], page, sleep) == page
    files, pages = zip(*sleep.pages, strict=True)
    assert files[0] != files[1] == files[2] != files[3]
    assert all(RELOADS in text for text in pages)
    assert "step 1: 1" not in pages[0] and "step 1: 1" in pages[1]
    assert "it grows" not in pages[2] and "it grows" in pages[3]
    last = page.read_text()
    assert RELOADS not in last and "<span class='status finished'>" in last and "it grows" in last


def test_ctrl_c_leaves_a_page_that_does_not_load_itself_again(tmp_path, capsys):
    tracker, page = start(tmp_path / "run"), tmp_path / "report.html"

    def interrupt():
        tracker.log({"loss": 7.0}, 1)
        raise KeyboardInterrupt

    watch_report([tmp_path / "run"], page, Sleep(page, interrupt))
    assert RELOADS not in page.read_text() and "step 1: 7" in page.read_text()
    assert "stopped" in capsys.readouterr().out


def test_a_run_that_starts_meanwhile_is_on_the_page(tmp_path):
    first, page, started = start(tmp_path / "runs" / "first"), tmp_path / "report.html", []
    sleep = Sleep(
        page,
        lambda: started.append(start(tmp_path / "runs" / "second")),
        lambda: first.finish("finished"),
        lambda: started[0].finish("failed"),
    )
    watch_report([tmp_path / "runs"], page, sleep)
    assert ["<td>second</td>" in text for _, text in sleep.pages] == [False, True, True]
    assert "<span class='status failed'>" in page.read_text()


def test_nothing_to_watch_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        watch_report([tmp_path], tmp_path / "report.html", Sleep(tmp_path / "report.html"))
