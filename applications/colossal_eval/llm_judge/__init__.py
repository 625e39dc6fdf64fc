"""Responses rated and compared by an LLM judge: its prompts, the endpoint, its verdicts and what they add up to.

Prompts and rules are those of MT-Bench."""
