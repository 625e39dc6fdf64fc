"""`coati doctor` and `coati report`."""

import pytest

from coati.cli import TOOLS, main
from coati.commands import COMMANDS
from coati.tracking import Tracker, TrackingConfig


def test_doctor_says_which_plugins_run_here(capsys):
    """PITFALL 34 and 35: all plugins on a CPU, without a compiler; what is refused names its alternative."""
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "colossalai", "zero2-offload", "gemini", "gloo"):
        assert word in text
    assert "missing" not in text


def test_report_writes_one_page(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", TrackingConfig(), algorithm="sft", settings={})
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("finished")
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert str(tmp_path / "run" / "report.html") in capsys.readouterr().out


def test_report_of_a_finished_run_is_watched_no_longer(tmp_path, capsys):
    tracker = Tracker(tmp_path / "run", TrackingConfig(), algorithm="sft", settings={})
    tracker.finish("finished")
    assert main(["report", str(tmp_path / "run"), "--watch", "--output", str(tmp_path / "page.html")]) == 0
    assert "data-seconds" not in (tmp_path / "page.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"


def test_report_of_nothing_is_one_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_in_groups(arguments, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: coati COMMAND") and "train from preferences:" in text
    assert all(f"\n  {name} " in text for name in (*COMMANDS, *TOOLS))


def test_an_unknown_command_is_one_line(capsys):
    assert main(["unknown"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'unknown': coati --help lists them\n"
