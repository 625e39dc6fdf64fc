"""What a run leaves behind: metrics, samples, settings, progress on the screen, and the HTML report."""

from coati.tracking.config import TrackingConfig
from coati.tracking.files import read_metrics, read_run, read_samples
from coati.tracking.live import watch_report
from coati.tracking.progress import Progress, progress_bar
from coati.tracking.report import write_report
from coati.tracking.sinks import check_installed
from coati.tracking.tracker import NullTracker, Tracker, make_tracker, package_versions

__all__ = [
    "NullTracker",
    "Progress",
    "Tracker",
    "TrackingConfig",
    "check_installed",
    "make_tracker",
    "package_versions",
    "progress_bar",
    "read_metrics",
    "read_run",
    "read_samples",
    "watch_report",
    "write_report",
]
