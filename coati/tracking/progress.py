"""Progress on the terminal: a rich bar, or a plain line now and then. Rank 0 only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from coati.tracking.config import TrackingConfig, rank_and_world_size

PLAIN_INTERVAL = 10.0


class Progress:
    """Counts steps and tokens and shows nothing; the base of the visible kinds."""

    def __init__(self, total: int, description: str, initial: int = 0) -> None:
        self.total, self.description, self.initial, self.step = total, description, initial, initial
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        self._start = time.monotonic()

    def advance(self, tokens: int = 0, **metrics: float) -> None:
        """One step over `tokens` tokens is done; `metrics` are shown until a later call changes them."""
        self.step += 1
        self.tokens += tokens
        self.metrics.update(metrics)
        self._show()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, never 0."""
        return max(time.monotonic() - self._start, 1e-9)

    def status(self) -> str:
        """Tokens/s since the start, if tokens were counted, and the metrics."""
        speed = [f"{self.tokens / self.elapsed:,.0f} tokens/s"] if self.tokens else []
        return "  ".join(speed + [f"{name} {value:.4g}" for name, value in self.metrics.items()])

    def _show(self) -> None:
        pass

    def close(self) -> None:
        """Show the last state."""


class PlainProgress(Progress):
    """A line for the first step, for the last, and at most every `PLAIN_INTERVAL` seconds between them."""

    _shown_step, _shown_time = -1, float("-inf")

    def _show(self) -> None:
        if self.step >= self.total or time.monotonic() - self._shown_time >= PLAIN_INTERVAL:
            self._print()

    def _print(self) -> None:
        self._shown_step, self._shown_time = self.step, time.monotonic()
        left = self.elapsed / (self.step - self.initial) * (self.total - self.step)
        times = f"{_clock(self.elapsed)}<{_clock(left)}"
        line = f"{self.description} {self.step}/{self.total}  {times}  {self.status()}".rstrip()
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show where an interrupted run stopped."""
        if self.step not in (self.initial, self._shown_step):
            self._print()


class BarProgress(Progress):
    """A rich bar with steps, time left, tokens/s and metrics."""

    def __init__(self, total: int, description: str, initial: int = 0) -> None:
        super().__init__(total, description, initial)
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=30),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[status]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(description, total=total, completed=initial, status="")
        self._bar.start()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.step, status=self.status())

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._bar.stop()


@contextmanager
def progress_bar(total: int, description: str, config: TrackingConfig, initial: int = 0) -> Iterator[Progress]:
    """Show on stderr the progress of `total` steps, of which `initial` are done. Only rank 0 shows anything.

    `with progress_bar(...) as bar:`, and in it `bar.advance(tokens=n, loss=x)` after each step.
    """
    kind = config.progress if rank_and_world_size()[0] == 0 else "off"
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "plain"
    classes = {"bar": BarProgress, "plain": PlainProgress, "off": Progress}
    bar = classes[kind](total, description, initial)
    try:
        yield bar
    finally:
        bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes:02}:{seconds:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
