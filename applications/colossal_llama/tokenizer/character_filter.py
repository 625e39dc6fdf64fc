"""Which characters are new to a tokenizer, and where words end."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

from coati.errors import UserError

# Pieces stay within such a run, as sentencepiece's `split_by_unicode_script` has it; digits and spaces are in none.
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}ー"
_RUNS = (
    rf"[{_CJK}]+|\p{{Latin}}[\p{{Latin}}\p{{M}}]*|[[\p{{L}}\p{{M}}]--[{_CJK}\p{{Latin}}]]+|[^\s\p{{L}}\p{{M}}\p{{N}}]+"
)
RUN = regex.compile(rf"(?V1) ?(?:{_RUNS})")


class CharacterFilter:
    """The characters of which a new piece must contain at least one.

    Args:
        choice: "non-ascii", "any", names of Unicode scripts such as "han", or character classes such as
            "[\\u4e00-\\u9fff]"; a character passes if one of them has it.

    Raises:
        UserError: a name is no script, a class is not well formed.
    """

    def __init__(self, choice: list[str]) -> None:
        if not choice:
            raise UserError(
                "--characters is empty; give non-ascii, any, scripts such as han, or a class such as [à-ÿ]."
            )
        self.choice = choice
        patterns = []
        for name in choice:
            known = {"non-ascii": r"[^\x00-\x7f]", "any": r"(?s:.)"}.get(name)
            pattern = known or (name if name.startswith("[") else rf"\p{{Script={name}}}")
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise UserError(
                    f"--characters {name!r} is neither non-ascii, any, a Unicode script such as han, nor a class such "
                    f"as [à-ÿ] ({error})."
                ) from None
            patterns.append(pattern)
        self.everything = "any" in choice
        self._pattern = regex.compile("|".join(patterns))

    def __call__(self, text: str) -> bool:
        """Whether one of the text's characters passes."""
        return self._pattern.search(text) is not None

    @lru_cache(maxsize=4096)  # noqa: B019  a filter lives as long as its command
    def owns_prefix(self, prefix: bytes) -> bool:
        """Whether every assigned character whose UTF-8 begins with these bytes passes."""
        return all(self(letter) for letter in _characters_from(prefix))


def _characters_from(prefix: bytes) -> list[str]:
    length = 2
    if prefix[0] >= 0xE0:
        length = 3
    if prefix[0] >= 0xF0:
        length = 4
    bits = 6 * (length - len(prefix))
    first = prefix[0] & (0x7F >> length)
    for byte in prefix[1:]:
        first = first << 6 | byte & 0x3F
    codes = range(first << bits, min((first + 1) << bits, 0x110000))
    letters = (chr(code) for code in codes if not 0xD800 <= code <= 0xDFFF)
    return [letter for letter in letters if unicodedata.category(letter) not in ("Cn", "Co")]
