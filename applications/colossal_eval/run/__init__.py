"""Asking a model: prompts, the model as lm-evaluation-harness sees it, its tasks, log-probs and responses.

Every response is on disk when it is given, so that a run that was killed can resume."""
