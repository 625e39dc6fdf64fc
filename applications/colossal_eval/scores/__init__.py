"""Scores of responses and their statistics: metrics with standard errors, differences with p-values.

Functions of numbers and texts: no files, no models."""
