"""Continual pre-training in a new language: tokenizer extension, model initialization, pre-training data."""
