"""`watch_report`: the report is written again while its runs go on, and a browser that shows it loads it again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from coati.tracking.files import METRICS, RUN, SAMPLES, SUMMARY, read_run, run_folders
from coati.tracking.report import write_report

SECONDS = 5.0  # after which a browser loads the page again
POLL = 2.0  # seconds between two looks at the files, at the least
SHARE = 0.1  # of the time that writing may take: the machine is for training
RUNNING = "running"

State = dict[Path, tuple[int, int]]


def watch_report(run_dirs: list[Path], output: Path, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Write the page whenever one of the runs has logged something, until none of them is running, or until Ctrl-C.
    The page that is left does not load itself again.

    Args:
        run_dirs, output: those of `write_report`; runs that appear in the folders meanwhile are on the page as well.
        sleep: waits so many seconds.

    Raises:
        UserError: as for `write_report`.
    """
    folders = [Path(folder) for folder in run_dirs]
    written: State | None = None
    try:
        while is_running(folders):
            start, state = time.monotonic(), state_of(folders)
            if state != written:
                write_report(folders, output, SECONDS)
                written = state
            sleep(max(POLL, (time.monotonic() - start) / SHARE))
    except KeyboardInterrupt:
        print("stopped; the page stays as it is")
    return write_report(folders, output)


def is_running(folders: list[Path]) -> bool:
    """Whether a run in the folders says so; one that was killed says so, too."""
    return any(read_run(run)["status"] == RUNNING for folder in folders for run in run_folders(folder))


def state_of(folders: list[Path]) -> State:
    """Time and size of the files that the page is made from."""
    paths = [run / name for folder in folders for run in run_folders(folder) for name in (RUN, METRICS, SAMPLES)]
    paths += [folder / SUMMARY for folder in folders]
    found = {path: path.stat() for path in paths if path.exists()}
    return {path: (status.st_mtime_ns, status.st_size) for path, status in found.items()}
