"""LLM judges: the client of an endpoint, a model in this process (`local`), verdicts on disk, and how a question is put
and its verdict read."""

from coati.judges.cache import VerdictCache
from coati.judges.client import Judge, Question, Verdict

__all__ = ["Judge", "Question", "Verdict", "VerdictCache"]
