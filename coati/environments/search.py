"""A question, and a search over texts to answer it with.

class Library(Search):
    corpus = "texts.jsonl"
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import bm25s

from coati.errors import UserError


class Search:
    """A row has `question`, and what the policy says in the end is for the run's rewards to score. Texts are ranked by
    BM25 (Robertson and Zaragoza 2009), which the library bm25s computes.

    Attributes:
        corpus: a .jsonl file whose rows have `text`; set by a subclass.
        results: how many texts a search returns at most.
    """

    corpus: ClassVar[str]
    results: ClassVar[int] = 3

    def __init__(self):
        self.texts, self.index = read_corpus(str(self.corpus))

    def reset(self, row: dict[str, Any]) -> str:
        return row["question"]

    def search(self, query: str) -> list[str]:
        """Searches for texts, and returns the best ones.

        Args:
            query: words to look for
        """
        words = bm25s.tokenize(query, show_progress=False)
        count = min(self.results, len(self.texts))
        [found], [scores] = self.index.retrieve(words, k=count, show_progress=False)
        return [self.texts[place] for place, score in zip(found, scores, strict=True) if score > 0]


@cache
def read_corpus(path: str) -> tuple[list[str], "bm25s.BM25"]:
    """The texts of a file and their index.

    Raises:
        UserError: a row has no text, or there is none.
    """
    texts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: no object with a `text`") from None
        texts.append(text)
    if not texts:
        raise UserError(f"{path} has no texts")
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    return texts, index
