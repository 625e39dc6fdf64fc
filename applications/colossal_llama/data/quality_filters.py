"""Rules by which a document's text is dropped; each is off unless it is set.

After the rules of Gopher (Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1) and C4 (Raffel et al. 2019,
https://arxiv.org/abs/1910.10683, section 2.2), by characters instead of words, so that they hold for Chinese too.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Filters:
    """Limits on a text; None: no limit. Shares are 0 to 1."""

    min_characters: int | None = None
    max_symbol_share: float | None = None
    max_digit_share: float | None = None
    max_repeated_lines: float | None = None

    def reason_to_drop(self, text: str) -> str | None:
        """The first rule that `text` breaks, in words that are equal for equal rules; None if it breaks none."""
        if self.min_characters is not None and len(text.strip()) < self.min_characters:
            return f"fewer than {self.min_characters} characters"
        if self.max_repeated_lines is not None and repeated_lines(text) > self.max_repeated_lines:
            return f"over {self.max_repeated_lines:.0%} of the lines repeat an earlier one"
        if self.max_symbol_share is None and self.max_digit_share is None:
            return None
        symbols, digits = symbol_and_digit_shares(text)
        if self.max_symbol_share is not None and symbols > self.max_symbol_share:
            return f"over {self.max_symbol_share:.0%} symbols"
        if self.max_digit_share is not None and digits > self.max_digit_share:
            return f"over {self.max_digit_share:.0%} digits"
        return None


def repeated_lines(text: str) -> float:
    """The share of the lines that are equal to an earlier line; blank lines don't count."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def symbol_and_digit_shares(text: str) -> tuple[float, float]:
    """The shares of the characters other than white space that are punctuation or symbols (Unicode P*, S*), and
    decimal digits (Nd)."""
    counts = {character: count for character, count in Counter(text).items() if not character.isspace()}
    total = sum(counts.values()) or 1
    categories = {character: unicodedata.category(character) for character in counts}
    symbols = sum(count for character, count in counts.items() if categories[character][0] in "PS")
    digits = sum(count for character, count in counts.items() if categories[character] == "Nd")
    return symbols / total, digits / total
