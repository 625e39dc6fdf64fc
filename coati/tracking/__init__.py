"""What a run leaves behind: metrics, samples, settings, progress on the screen, and the HTML report."""

from coati.tracking.config import TrackingConfig
from coati.tracking.files import read_metrics, read_run, read_samples
from coati.tracking.progress import Progress, progress_bar
from coati.tracking.report import write_report
from coati.tracking.tracker import NullTracker, Tracker, make_tracker

__all__ = [
    "NullTracker",
    "Progress",
    "Tracker",
    "TrackingConfig",
    "make_tracker",
    "progress_bar",
    "read_metrics",
    "read_run",
    "read_samples",
    "write_report",
]
