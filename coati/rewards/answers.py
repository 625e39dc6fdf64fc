r"""Reading the answer out of generated text, for verifiers here and for the benchmarks of colossal_eval.

What counts as an answer is a choice, from strict to loose (`Style`). Each reads what those before it read, and more:

- boxed: what stands in \boxed{}.
- marked: what follows "####", "The answer is", "Answer:", "答案是"; letters also in "B is correct" and "故选 B".
- stated: the text's last line, if it is an answer alone or ends in what something "is" or equals; letters also where
  they open the text or end it in brackets.
- anywhere: the last number, or the one letter in brackets, wherever it stands, and whether the text is finished or not.

The last statement counts. A text that was cut off has stated only what stands in a box or a finished sentence. Where a
text can be read in two ways nothing is read: it is better to miss a right answer than to pay for a wrong one.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Literal

Style = Literal["boxed", "marked", "stated", "anywhere"]

# --- where a text states its answer

_IS = r"\b(?:is|are|was|were|(?:must|should|would|will|has to) be|equals)\b"
_MARK = re.compile(
    # "answer to the question is"; "A:" begins a line; "#### 2. Add them" is a heading
    rf"(?:answers?(?:\s+(?:to|for)\s[^.:\n]{{0,60}}?)?\s*(?:{_IS}|[:：=])|答案(?:应该|应当|应)?[是为:：]"
    r"|^[ \t]*A[ \t]*[:：]|####(?!\s*\d+[.)][ \t]+\w))"
    r"(?:[\s:：*_\"'`“”‘’≈]|\\approx|(?:about|approximately|exactly|equal to|just|now|simply|therefore|thus)\b)*"
    # no mark before a word: "the answer is correct"
    r"(?=\S)(?![^\W\d_]{2})",
    re.IGNORECASE | re.MULTILINE,
)
# "1." counts a line only before a number, or it may be one itself: "the answer is\n18. She ..."
_ITEM = re.compile(r"^[ \t]*(?:[-*•][ \t]+|\d{1,2}[.)][ \t]+(?=[-$\\]?\d))")
# what is quoted is said by somebody else: `they ask for "\boxed{answer}"`
_QUOTE = re.compile(r"\"[^\"\n]+\"|“[^”\n]+”|「[^」\n]+」|`[^`\n]+`|(?<!\w)'[^'\n]+'(?!\w)|^[ \t]*>.*$", re.MULTILINE)
_DOUBT = re.compile(
    r"\b(?:if|whether|suppose|assum\w*|not|never|wrong|false|incorrect|doubt\w*)\b|n['’]t\b", re.IGNORECASE
)
_MATH = r"\$\$.+?\$\$|\$(?!\s)[^$\n]+?(?<!\s)\$(?!\d)|\\\((?:(?!\\\().)+?\\\)|\\\[(?:(?!\\\[).)+?\\\]"
# what ends an answer: a remark on it. Further numbers don't: "18, 20" and "18, or 20" are two answers, thus none
_REMARK = (
    r"\n|[。，]|[;；](?!\s*[-\d$\\])|\.(?=\s|$)|[,:!](?=\s*$|\s+(?!(?:and|or)\b)[^\W\d])|\s[(（](?=[^\W\d_]{2})"
    r"|\b(?:since|because|as|so|but|when|where|which|that)\b"
)
_ANSWER = re.compile(rf"(?:{_MATH}|(?!{_REMARK}).)*", re.DOTALL | re.IGNORECASE)
# what takes an answer back that stands before it: ", or 19", "(or 19)", ", no wait, 19", ", which is wrong"
_TAKEN_BACK = re.compile(
    r"[\s,;(（-]*(?:I\s+\w+,?\s+|maybe\s+|perhaps\s+)?(?:or|no|wait|actually|sorry|scratch)\b"
    r"|[\s,;(（]*(?:which|that|but|though)\b[^.\n]*\b(?:wrong|incorrect|false)\b"
    r"|[^.\n]*\b(?:else|otherwise)\b",
    re.IGNORECASE,
)
_CLAIM = re.compile(rf".*(?:{_IS}|\b(?:it|that)['’]s\b|[:：](?=\s))", re.IGNORECASE)


def stated_answer(text: str, style: Style = "stated", truncated: bool = False) -> str:
    """What the text states as its answer, without the remarks that follow; "" if it states none.

    Args:
        truncated: the text was cut off.
    """
    text = _own_words(text)
    box = _last_box(text)
    end = box[1] if box else 0
    if style != "boxed":
        finished = _finished(text, end) if truncated else text
        marks = [mark for mark in _MARK.finditer(finished, end) if not _doubted(text[: mark.start()])]
        if marks:
            answer = _ANSWER.match(finished, marks[-1].end())
            return "" if _TAKEN_BACK.match(finished, answer.end()) else answer[0].strip()
    if box:
        return box[2]
    return "" if truncated or style in ("boxed", "marked") else _last_line(text)


def _own_words(text: str) -> str:
    """The text without the statements that it quotes, unless it is nothing else, and without the mark of a list's only
    item; those of several become bullets, which no number begins with."""
    spoken = _QUOTE.sub(lambda quote: "" if _is_statement(quote[0]) else quote[0], text)
    lines = (spoken if re.search(r"\w", spoken) else text).split("\n")
    filled = [i for i, line in enumerate(lines) if line.strip()]
    is_item = [False, *(_ITEM.match(lines[i]) is not None for i in filled), False]
    for n, i in enumerate(filled, start=1):
        if is_item[n]:
            of_several = is_item[n - 1] or is_item[n + 1]
            lines[i] = _ITEM.sub("• " if of_several else "", lines[i])
    return "\n".join(lines)


def _is_statement(quote: str) -> bool:
    """Whether words with a box or a mark are quoted, and not an answer alone."""
    words = re.sub(r"\\(?:boxed|fbox)\s*\{[^{}]*\}", "", quote)
    has_box, has_mark = words != quote, _MARK.search(quote) is not None
    return (has_box or has_mark) and re.search(r"\w", words) is not None


def _last_box(text: str) -> tuple[int, int, str] | None:
    r"""Start, end and content of the last \boxed{}; several that are listed are one, with commas between them.

    A box that is never closed is empty and ends the text.
    """
    boxes, opened = [], []
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*\{)|\\.|[{}]", text, re.DOTALL):
        if token[1] or token[0] == "{":
            opened.append(token)
        elif token[0] == "}" and opened and (opening := opened.pop())[1]:
            while boxes and boxes[-1][0] > opening.start():  # boxes inside this one
                boxes.pop()
            boxes.append((opening.start(), token.end(), text[opening.end() : token.start()]))
    boxes += [(token.start(), len(text), "") for token in opened if token[1]]
    if not boxes:
        return None
    first, end, content = boxes.pop()
    while boxes and text[boxes[-1][1] : first].strip(" \t\n$,;、") in ("", "and", "or", "和", "或"):
        first, _, before = boxes.pop()
        content = f"{before}, {content}"
    while inner := re.fullmatch(r"\s*\\(?:boxed|fbox)\s*\{([^{}]*)\}\s*", content):
        content = inner[1]
    return first, end, content.strip()


def _finished(text: str, box_end: int) -> str:
    """The text up to the end of its last whole sentence, line or box."""
    return text[: max([box_end, *(m.end() for m in re.finditer(r"\n|[。！？]|[.!?](?=\s)", text))])]


def _doubted(before: str) -> bool:
    """Whether what follows is no statement: "if the answer is", "I don't think the answer is"."""
    return _DOUBT.search(re.split(r"[.,;:!?\n。，]", before[-200:])[-1]) is not None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.search(r"\w", line)] or [""]
    sentence = re.split(r"(?<=[.!?。])\s+(?=[^\W\d])", lines[-1])[-1].strip().rstrip(" .。*_`")
    if sentence.endswith(("?", "？")) or _DOUBT.search(sentence):
        return ""
    if claim := _CLAIM.match(sentence):
        return sentence[claim.end() :].strip()
    words = re.findall(r"(?<![\\{])\b[^\W\d_]{2,}", sentence)
    return sentence if "=" in sentence or len(words) <= 3 else ""


# --- numbers

_COMMANDS = re.compile(
    r"\\(?:text(?:bf|it|rm|tt)?|math(?:rm|bf|it|sf|tt)|mbox|boldsymbol|operatorname|displaystyle|left|right|bf|rm)"
    r"(?![a-zA-Z])\s*"
)
_THOUSANDS = re.compile(r"(?<=\d)(?:,?\\[!,;: ]|\{,\}|[ ~\u00a0\u2009\u202f])(?=\d{3}(?![\d/]))")
_NUMBER = (
    r"(?P<sign>[-+]?)\s*[€£¥₹]?\s*"
    r"(?:(?:(?P<whole>\d+)\s+(?:and\s+)?)?(?P<top>[-+]?\d+)\s*/\s*(?P<bottom>\d+)"
    r"|(?P<decimal>(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,2}(?!\w))?))"
)
_CHANGES = re.compile(
    r"\b(?:or|hundred|thousand|[mb]illion|trillion|dozen|half|third|quarter|squared|cubed|pi|plus|minus|times|divided"
    r"|choose)s?\b|[万亿千百⁰¹²³⁴-⁹]|[\d=+*^_<>~\\|?!…]|\.\.",
    re.IGNORECASE,
)
# what may stand before an "=" at its end: the variable, or the function, that is given a value
_NAME = re.compile(r"(?<![^\s])(?:\\[a-zA-Z]+|[a-zA-Z])(?:_\w+|\([^()]*\))?\s*$")
# what makes an equation of it, "2y = 18", or a list, "x = 5, y = 18"
_NO_VALUE = re.compile(
    r"(?<![a-zA-Z\\])(?![aAI](?![a-zA-Z]))[a-zA-Z](?![a-zA-Z'’])|\\(?!times|cdot|div)[a-zA-Z]|\d\s*[,;](?!\d{3})"
)


def extract_number(text: str, style: Style = "anywhere", truncated: bool = False) -> Fraction | None:
    """The number that the text gives as its answer, None if it gives none, or not clearly.

    Args:
        truncated: the text was cut off.
    """
    number = to_number(stated_answer(text, style, truncated and style != "anywhere"))
    if number is not None or style != "anywhere":
        return number
    matches = [*re.finditer(rf"(?<![\w.]){_NUMBER}", plain(text))]
    return _value(matches[-1]) if matches else None


def to_number(answer: str) -> Fraction | None:
    r"""The value of "1,234.50", "$3", "3 1/2", "\frac34", "18 dollars a day", "x = 5" or "50%", which is 50.

    None if the answer is no number, or several, or an equation, or a sum that is left to do: "67 - 67", "16/2".
    """
    *before, last = re.split(r"(?<![!<>=])=(?!=)|≈", plain(answer))
    if before:
        named = _NAME.sub("", before[0])
        if named != before[0] and re.search(r"[\d)+*/^-]\s*$", named):
            return None
        before = [re.sub(r"(?<=\d)\s*[xX]\s*(?=[\d.])", "*", part) for part in (named, *before[1:])]
        if any(_NO_VALUE.search(part) for part in before) or any(re.search(r"\b(?:and|or)\b", p) for p in before[1:]):
            return None
    last = re.sub(r"^\((.*)\)$", r"\1", last.strip().strip("\"'“”"))
    number = re.match(_NUMBER, last)
    return _value(number) if number and _is_unit(last[number.end() :]) else None


def _value(number: re.Match) -> Fraction | None:
    if len(number[0]) > 1000:  # Python reads no longer ones
        return None
    sign = -1 if number["sign"] == "-" else 1
    if number["decimal"]:
        return sign * Fraction(number["decimal"].replace(",", ""))
    top, bottom, whole = int(number["top"]), int(number["bottom"]), int(number["whole"] or 0)
    if bottom == 0 or top % bottom == 0 or (number["whole"] and not 0 < top < bottom):
        return None
    return sign * (whole + Fraction(top, bottom))


def _is_unit(text: str) -> bool:
    """Whether what follows a number leaves it as it is: "dollars a day", "%", "cm^2"; not "million", "x", "+ 3"."""
    text = re.sub(r"(?<=[a-zA-Z])(?:\s?\^\s?[23]|[23²³])(?!\w)", "", text).replace(" a ", " ")
    letters = re.findall(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", text)
    return not _CHANGES.search(text) and not _DOUBT.search(text) and set(letters) <= set("gmhlLsCF")


def plain(text: str) -> str:
    """The text without LaTeX's dress: fractions as 3/4, thousands with commas, no dollar signs, braces or emphasis."""
    text = _COMMANDS.sub("", re.sub(r"<<[^<>]*>>", "", text))
    text = re.sub(r"\\[dtc]?frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)", r" \1/\2", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\\degree", "°", _THOUSANDS.sub(",", text))
    text = re.sub(r"\\([$%#&_])", r"\1", text)
    text = re.sub(r"\\[,;:! ]|\\q?quad|~", " ", text)
    return re.sub(r"\\[()\[\]]|[${}`]|\*\*|__", "", text).replace("−", "-").replace("–", "-")


# --- letters

_LETTER_MARK = (
    r"(?:(?:answers?|choices?|options?)\s*(?:is|are|was|must be|should be|would be|has to be|[:：=])|####"
    r"|answers?(?=\s*[(（]?[A-Z][)）]?[\s.。]*$)|\bI(?:['’](?:ll|d)|\s+will|\s+would)?\s+(?:choose|pick|select|go with)"
    r"|答案(?:应该|应当|应)?[是为选:：]*|(?:正确|应|故|因此|所以)?(?:选择|选项|选)[是为:：]*|正确的?(?:答案|选项)?是)"
    r"(?:\s|[:：*_\"'`“”‘’\[(（【]|therefore|thus|option|choice|either|选项|选)*"
)
_IS_CORRECT = r"[)）\]]?\s+(?:is|are)\s+(?:the\s+|both\s+|clearly\s+|therefore\s+)?(?:correct|right|best|answer)\b"
_ARTICLE = r"A\s+(?!because|since|as\b|and\b|or\b|is\b|which|with)[a-z]"


def extract_letters(text: str, labels: list[str], style: Style = "stated", truncated: bool = False) -> list[str]:
    """The letters that the text gives as its answer, in alphabetical order; empty if it gives none, or not clearly.

    Args:
        truncated: the text was cut off.
    """
    letter = f"(?-i:(?!{_ARTICLE})[{labels[0]}-{labels[-1]}])"
    group = rf"(?<![A-Za-z])({letter}(?:[ ,，、&/]*(?:(?:and\b|和|及|与) *)?{letter}){{0,25}})(?![A-Za-z])"
    opening = rf"\s*[(（\[【*\"'“]*{group}\s*(?:[)）\]】.．、,，:：;；。*\"'”]|\n|$)"
    truncated = truncated and style != "anywhere"
    text = _own_words(text)
    box = _last_box(text)
    if style == "boxed":
        return _letters(re.match(opening, plain(box[2])), labels) if box else []
    text = _finished(text, box[1] if box else 0) if truncated else text
    text = plain(f"{text[: box[0]]} Answer: {box[2]} .\n{text[box[1] :]}" if box else text)
    marked = re.finditer(rf"{_LETTER_MARK}{group}|{group}{_IS_CORRECT}", text, re.IGNORECASE | re.MULTILINE)
    matches = [mark for mark in marked if not _doubted(text[: mark.start()])]
    if matches or truncated or style == "marked":
        return _letters(matches[-1] if matches else None, labels)
    alone = rf"^[ \t(（*]*(?:(?:option|choice)[ \t(（*]*)?{group}[ \t)）.。*]*$"
    if at_start := re.match(opening, text):
        in_own_lines = {line[1] for line in re.finditer(alone, text, re.IGNORECASE | re.MULTILINE)}
        return _letters(at_start, labels) if in_own_lines <= {at_start[1]} else []
    for form in (alone, rf"[(（\[【]\s*{group}\s*[)）\]】]"):
        matches = [*re.finditer(form, text, re.IGNORECASE | re.MULTILINE)]
        if len({match[1] for match in matches}) == 1:
            last = matches[-1]
            at_the_end = not re.search(r"\w", text[last.end() :]) and not _doubted(text[: last.start()])
            return _letters(last, labels) if at_the_end or style == "anywhere" else []
    return []


def _letters(match: re.Match | None, labels: list[str]) -> list[str]:
    r"""Those of a match; none where they are left open ("A or B", "A?") or begin the list of choices ("A. x\nB. y")."""
    if match is None:
        return []
    letters, after = match[match.lastindex], match.string[match.end(match.lastindex) :]
    rest = re.sub(r"^[)）\]】*_]+", "", after)
    if re.match(r"\s*[,，]?\s*(?:或|[?？])", rest) or _TAKEN_BACK.match(rest):
        return []
    if letters == labels[0] and _are_listed(labels[1:3], after):
        return []
    return [label for label in labels if label in letters]


def _are_listed(labels: list[str], after: str) -> bool:
    """Whether what follows a letter lists the next ones as it does this one: one in a line of its own, or both."""
    style = re.escape(re.match(r"[)）\]】.．、:：]*", after)[0])
    first, second = (rf"(^[ \t(（\[【]*)?(?<![A-Za-z]){label}{style}(?![A-Za-z])" for label in labels)
    next_one = re.search(first, after, re.MULTILINE)
    return next_one is not None and (next_one[1] is not None or (style != "" and re.search(second, after) is not None))
