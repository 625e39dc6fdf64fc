"""Fills in the code that documentation quotes: `python tools/write_quotes.py`.

A mark in a page names the object whose source the code block below it is. A test holds that the committed pages are
what this writes:

    <!-- source: coati.trainers.ppo:PPOTrainer.step -->
    ```python quoted
    ...
    ```
"""

import functools
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

QUOTE = re.compile(r"(<!-- source: (\S+):(\S+) -->\n```python quoted\n).*?(```\n)", re.DOTALL)


def filled(page: str) -> str:
    """A page with the code of now in its quotes."""
    return QUOTE.sub(lambda found: found[1] + source_code(found[2], found[3]) + found[4], page)


def source_code(module: str, name: str) -> str:
    """The code of a class, method or function."""
    code = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    return textwrap.dedent(inspect.getsource(code))


def pages_with_quotes() -> list[Path]:
    return [path for path in sorted((ROOT / "docs").glob("*.md")) if QUOTE.search(path.read_text())]


if __name__ == "__main__":
    for path in pages_with_quotes():
        path.write_text(filled(path.read_text()))
