"""The published benchmarks, read from their files into one record per question.

A benchmark is prepared once; all that comes later reads the prepared folder."""
