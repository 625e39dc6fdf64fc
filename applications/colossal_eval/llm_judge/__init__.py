"""Responses rated and compared by an LLM judge: its prompts, its verdicts and what they add up to.

Prompts and rules are those of MT-Bench."""
