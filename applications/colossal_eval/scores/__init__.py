"""What a response is worth, and what can be said of many: metrics with standard errors, differences with p-values.

Functions of numbers and texts: no files, no models."""
