"""`coati plan`: the memory of a run, before anything is started."""

from coati.planner.report import main

__all__ = ["main"]
