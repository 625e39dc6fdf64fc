"""The documentation site: its pages, its reference and the paper index are complete. `make docs` builds it."""

import importlib
import re
import runpy

import pytest
import yaml

from coati.commands import COMMANDS
from tests.conftest import ROOT

HOOKS = runpy.run_path(str(ROOT / "tools" / "docs_hooks.py"))
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_of(entry) -> list[str]:
    """The pages of a part of mkdocs.yml's `nav`: a page, or a mapping or list of them."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(part)]


def test_every_page_is_in_the_navigation_once():
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages_of(SETTINGS["nav"])) == sorted([*pages, *HOOKS["PAGES"]])


def test_every_readme_is_a_page():
    readmes = [path for folder in ("applications", "examples") for path in (ROOT / folder).rglob("README.md")]
    sources = {ROOT / source for source in HOOKS["FROM_OUTSIDE"]}
    assert readmes and set(readmes) <= sources
    assert all(source.is_file() for source in sources)


def test_the_site_needs_no_network():
    """No fonts from the net; what pages load lies in docs/."""
    assert SETTINGS["theme"]["font"] is False
    loaded = [*SETTINGS["extra_javascript"], *SETTINGS["extra_css"], *SETTINGS["extra"]["polyfills"]]
    assert all((ROOT / "docs" / file).is_file() for file in loaded)


@pytest.mark.parametrize("package", HOOKS["REFERENCE"])
def test_the_reference_finds_every_public_name(package):
    """The names that mkdocstrings is asked for exist where the hooks, which import nothing, say that they do."""
    page = HOOKS["reference_page"](package)
    places = re.findall(r"^::: (\S+)$", page, re.MULTILINE)[1:]
    public = getattr(importlib.import_module(f"coati.{package}"), "__all__", None)
    assert places
    if public and not HOOKS["REFERENCE"][package]:
        assert sorted(place.rpartition(".")[2] for place in places) == sorted(public)
    for place in places:
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name), place


@pytest.mark.parametrize("name", COMMANDS)
def test_every_method_is_in_the_paper_index(name):
    """With the paper that its `--help` names."""
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    shown = "`coati sft`" if name == "sft" else rf"`algorithm: {{type: {re.escape(name)}[,}}]"
    row, *variants = re.findall(rf"^\|.*{shown}.*\|$", text, re.MULTILINE)
    assert not variants or name in ("distill", "cispo")
    assert all(number in row for number in re.findall(r"\d{4}\.\d{5}", COMMANDS[name].title))
