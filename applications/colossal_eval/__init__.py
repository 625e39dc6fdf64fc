"""Benchmarks of language models: published data to local task files, lm-evaluation-harness tasks, scores, reports."""
