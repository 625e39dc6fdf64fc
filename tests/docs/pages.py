"""The pages of the documentation, their fenced blocks, and what stands in them between backticks."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

# In the order in which their commands run: other pages resume what the first run has made.
FIRST = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "docs" / "first-run.md"]
FOLDERS = ("docs", "examples", "applications")
PAGES = FIRST + sorted({page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")} - set(FIRST))
FENCED = re.compile(r"^[ ]*```(?P<language>[^\n]*)\n(?P<text>.*?)^[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A fenced block, a line of one, or what stands between two backticks.

    Attributes:
        page: its path from the root.
        language: the block's info string; of what stands in a sentence, empty.
    """

    page: str
    text: str
    language: str = ""

    def __str__(self):
        return f"{self.page}: {self.text}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str | None = None) -> list[Piece]:
    """A page's fenced blocks; of one info string if it is given."""
    found = [Piece(name_of(page), match["text"], match["language"].strip()) for match in FENCED.finditer(text_of(page))]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", text_of(page))


def spans(page: Path) -> list[Piece]:
    """What stands between backticks in sentences and tables, each text once; a line break in it is a space."""
    texts = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]
    return [Piece(name_of(page), text) for text in dict.fromkeys(texts)]


def command_lines() -> list[Piece]:
    """The lines of all `bash` blocks, each once."""
    lines = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    lines.setdefault(line, Piece(block.page, line, "bash"))
    return list(lines.values())


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables in front of a command, and its words without comment and redirection."""
    words, variables = shlex.split(command.partition(" > ")[0], comments=True), {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


@cache
def explained_errors() -> list[str]:
    """The errors that docs/troubleshooting.md begins its paragraphs with."""
    text = text_of(ROOT / "docs" / "troubleshooting.md")
    return [
        error for head in re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE) for error in re.findall("`(.+?)`", head)
    ]
