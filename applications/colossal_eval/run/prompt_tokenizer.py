"""What the tokenizer decides: ids of a prompt, what follows it, which letters are one token, whether it fits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class PromptTokenizer:
    """A tokenizer as the harness uses it.

    Args:
        max_length: tokens that the model reads, response included.
    """

    def __init__(self, tokenizer, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        plain, special = self._plain("a"), tokenizer("a")["input_ids"]
        # what the tokenizer puts before a text; what it may put behind (an EOS) would end the prompt
        self.start = tuple(special[: _find(special, plain)])
        self._encoded: dict[str, np.ndarray] = {}
        self._styles = lru_cache(maxsize=4096)(self._letter_styles)
        self._after = lru_cache(maxsize=1 << 16)(self._continuation)

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode(self, prompt: str) -> np.ndarray:
        """Ids of a prompt, int32, after the tokenizer's BOS unless the text (a chat template's) begins with it."""
        if prompt not in self._encoded:
            bos = self.tokenizer.bos_token
            start = () if bos and prompt.startswith(bos) else self.start
            self._encoded[prompt] = np.asarray([*start, *self._plain(prompt)], dtype=np.int32)
        return self._encoded[prompt]

    def forget(self) -> None:
        """Drop the prompts that are remembered."""
        self._encoded.clear()

    def fits(self, prompt: str, new_tokens: int) -> bool:
        """Whether the prompt and a response of so many tokens are no longer than what the model reads."""
        return len(self.encode(prompt)) + new_tokens <= self.max_length

    def count(self, text: str) -> int:
        """Tokens of a text by itself."""
        return len(self._plain(text))

    def continuation(self, prompt: str, text: str) -> tuple[int, ...]:
        """Ids of `text` after `prompt`; at least one.

        Tokenizers look no further back than a line: the prompt's last one decides. Where its tokens and those of `text`
        can't be told apart (a token reaches over the border), `text` is tokenized by itself.
        """
        return self._after(last_line(prompt), text)

    def _continuation(self, line: str, text: str) -> tuple[int, ...]:
        before, whole = self._plain(line), self._plain(line + text)
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self._plain(text)

    def letter_styles(self, prompt: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        """The ways to write a letter, of "A" and " A", that give every letter one token of its own after the prompt.

        Both are right answers, so their probabilities are added (`metrics.choice_log_probs`). Two ways that give the
        same tokens are one. If neither gives single tokens, " A" is scored as the several tokens that it is.
        """
        return self._styles(last_line(prompt), labels)

    def _letter_styles(self, line: str, labels: tuple[str, ...]) -> tuple[str, ...]:
        before, found = self._plain(line), {}
        for style in ("{}", " {}"):
            ids = [self._plain(line + style.format(label)) for label in labels]
            tokens = tuple(whole[-1] for whole in ids)
            alone = all(whole[:-1] == before for whole in ids) and len(set(tokens)) == len(labels)
            if alone and tokens not in found:
                found[tokens] = style
        return tuple(found.values()) or (" {}",)


def last_line(prompt: str) -> str:
    """The last line with something on it, and what follows it."""
    return prompt[prompt.rstrip().rfind("\n") + 1 :]


def _find(whole: list[int], part: tuple[int, ...]) -> int:
    for i in range(len(whole)):
        if tuple(whole[i : i + len(part)]) == part:
            return i
    return 0
