"""Continual pre-training in a new language: tokenizer extension, model initialisation, pre-training data."""
