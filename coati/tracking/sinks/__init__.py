"""Where a run's metrics and samples go: the run folder, and the libraries that are asked for, each in its module."""

from coati.tracking.sinks.base import RunInfo, Sink, check_installed, open_sink
from coati.tracking.sinks.jsonl import JsonlSink

__all__ = ["JsonlSink", "RunInfo", "Sink", "check_installed", "open_sink"]
