"""The example: a small English model learns Chinese."""
