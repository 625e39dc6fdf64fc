"""The text of a response that is still being sampled, and of its single tokens."""

import re
from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what a tokenizer writes for bytes that are no whole character


class TextStream:
    """Turns tokens into text piece by piece. The pieces join to the text of all tokens, up to the first stop text.

    What may still change waits: the bytes of half a character, and what a stop text may begin with.

    Args:
        decode: the text of token ids.
        stops: texts that end the response, and are not part of it.

    Attributes:
        stopped: whether a stop text has come.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, stops
        self.stopped = False
        self.ids: list[int] = []  # the last ones: those before have no influence on what follows
        self.new = 0  # where those begin that came after the last whole character
        self.given = 0  # characters of their text that were taken
        self.waiting = ""  # characters that were taken and may be the beginning of a stop text

    def add(self, tokens: Sequence[int]) -> str:
        """The text that further tokens make certain."""
        self.ids += tokens
        text = self.decode(self.ids)
        piece = self._take(text.rstrip(INCOMPLETE))
        if text and not text.endswith(INCOMPLETE):
            # some tokenizers write a first token, or bytes without those before, differently: so some context remains
            self.ids = self.ids[self.new :]
            self.new, self.given = len(self.ids), len(self.decode(self.ids))
        return piece

    def end(self) -> str:
        """The text that is left when there are no more tokens."""
        piece = "" if self.stopped else self._take(self.decode(self.ids))
        if self.stopped:
            return piece
        left, self.waiting = self.waiting, ""
        return piece + left

    def _take(self, text: str) -> str:
        self.waiting += text[self.given :]
        self.given = max(self.given, len(text))
        found = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self.waiting = self.waiting[: min(found)], ""
            return piece
        certain = len(self.waiting) - longest_beginning(self.waiting, self.stops)
        piece, self.waiting = self.waiting[:certain], self.waiting[certain:]
        return piece


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    lengths = range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def token_bytes(tokenizer) -> Callable[[int], bytes]:
    """A function that gives the UTF-8 bytes of a token, which may be a part of a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def bytes_of(id: int) -> bytes:
        if id in added:
            return added[id].encode()
        token = tokenizer.convert_ids_to_tokens(id)
        if token is None:  # a row that only pads the model's vocabulary
            return b""
        if byte_level and all(character in byte_of for character in token):
            return bytes(byte_of[character] for character in token)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    return bytes_of
