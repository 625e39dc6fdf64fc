"""`coati doctor` and `coati report`."""

import pytest

from coati.cli import main
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


def test_report_of_nothing_is_one_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_no_or_an_unknown_command_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "usage: coati" in capsys.readouterr().err
