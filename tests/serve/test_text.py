"""Pieces of a response's text: they join to the whole, whatever the tokens are."""

from hypothesis import given
from hypothesis import strategies as st

from coati.serve.text import TextStream, longest_beginning


def decode(ids: list[int]) -> str:
    """As byte-level tokenizers do, with a token per byte."""
    return bytes(ids).decode(errors="replace")


def decode_with_fallback(ids: list[int]) -> str:
    """As SentencePiece does with bytes: one of them that fits nowhere spoils its neighbors."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


def pieces_of(ids: list[int], stops=(), decode=decode) -> tuple[list[str], bool]:
    stream, pieces = TextStream(decode, stops), []
    for token in ids:
        pieces.append(stream.add([token]))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.end()], stream.stopped


def text_until(ids: list[int], stops: tuple[str, ...]) -> tuple[str, bool]:
    """The slow twin: the whole text is decoded after every token."""
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count]).rstrip("\ufffd")
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
    return decode(ids), False


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(1, 5))
def test_pieces_join_to_the_whole_text_of_any_bytes(ids, together):
    pieces, stopped = pieces_of(ids)
    assert "".join(pieces) == decode(ids) and not stopped
    stream = TextStream(decode)
    pieces = [stream.add(ids[i : i + together]) for i in range(0, len(ids), together)]
    assert "".join([*pieces, stream.end()]) == decode(ids)


@given(st.text(alphabet="ab你🙂é", max_size=20))
def test_no_piece_shows_half_a_character(text):
    for how in (decode, decode_with_fallback):
        pieces, _ = pieces_of(list(text.encode()), decode=how)
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.text(alphabet="ab你", max_size=20), st.lists(st.text(alphabet="ab你", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_that_comes_in_parts_is_never_shown(text, stops):
    ids, stops = list(text.encode()), tuple(stops)
    pieces, stopped = pieces_of(ids, stops)
    assert ("".join(pieces), stopped) == text_until(ids, stops)


def test_text_comes_at_once_where_no_stop_text_may_begin():
    stream = TextStream(decode, ["END"])
    assert [stream.add([byte]) for byte in b"aENDS"[:4]] == ["a", "", "", ""] and stream.stopped
    stream = TextStream(decode, ["END"])
    assert [stream.add([byte]) for byte in b"aEMM"] == ["a", "", "EM", "M"]
    assert longest_beginning("xEN", ["END", "NE"]) == 2
    assert longest_beginning("xED", ["END"]) == 0
