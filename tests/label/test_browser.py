"""The page in Chromium: labeling by keyboard, on a desktop's and a phone's screen, and what axe says of it.

It needs Playwright for Python and a Chromium, its own or the system's; of axe-playwright-python, axe's script. The
pictures of docs/labeling.md are taken here: COATI_WRITE_PICTURES=1.
"""

import json
import os

import pytest

from coati.cli import main
from coati.data import load_rows, parse_record
from coati.label.store import Store
from tests.conftest import ROOT
from tests.label.serving import served

pytestmark = pytest.mark.slow
SCRIPT = "<img src=x onerror=\"document.body.dataset.hacked = 'yes'\"><script>document.title = 'hacked'</script>"
DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture
def rows():
    """Twenty items whose better response is the longer one."""
    found = []
    for i in range(20):
        good = f"Yes, {i + 2} of them are left, and they ship today. Shall I set one aside for you?"
        bad = f"There should be {i + 2}."
        texts = [{"text": good, "model": "sft"}, {"text": bad, "model": "base"}]
        found.append({"prompt": f"Is the lamp number {i + 1} in stock? I need it this week.", "responses": texts})
    found[5]["prompt"] += SCRIPT
    found[5]["responses"][0]["text"] += SCRIPT
    return found


@pytest.fixture
def place(tmp_path, rows):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


class Page:
    """A browser's page of somebody; faults are what its console says."""

    def __init__(self, browser, link: str, scheme: str = "light", size=None, **how):
        self.context = browser.new_context(viewport=size or DESKTOP, color_scheme=scheme, **how)
        self.page = self.context.new_page()
        self.faults = []
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(link)
        self.shown = self.wait_for_another(None)

    def wait_for_another(self, before: str | None) -> str:
        self.page.wait_for_function("before => (document.body.dataset.shown ?? before) !== before", arg=before)
        return self.page.evaluate("document.body.dataset.shown")

    def press(self, *keys: str):
        """Keys of which the last one brings another pair."""
        for key in keys:
            self.page.keyboard.press(key)
        self.shown = self.wait_for_another(self.shown)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def better(self) -> str:
        """The side of the longer response."""
        left, right = (self.text(f"[data-side={side}] .text") for side in "ab")
        return "a" if len(left) > len(right) else "b"


def test_twenty_pairs_by_keyboard_through_a_reload_then_a_second_person_and_the_export(browser, place, rows):
    labels, errors = place / "labels.sqlite", place / "errors.txt"
    words = [place / "items.jsonl", "--labels", labels, "--people", "ana", "ben", "--overlap", 2]
    keys = {"a": ("1", "ArrowLeft"), "b": ("2", "ArrowRight")}
    with served(*words, errors=errors) as (_, links):
        ana = Page(browser, links["ana"])
        for i in range(20):
            side = ana.better()
            if i == 7:
                ana.page.reload()
                ana.wait_for_another(None)
                assert ana.page.evaluate("document.body.dataset.shown") == ana.shown  # the same pair
                assert "7 by you" in ana.text("#count")
            if i == 3:  # edited
                ana.page.keyboard.press("e")
                assert "press 1 for A" in ana.text("#status")
                ana.page.keyboard.press(keys[side][0])
                ana.page.keyboard.press("Control+a")
                ana.page.keyboard.type("Yes: 1, 2 or 3, as you like.")
                ana.press("Control+Enter")
            elif i == 4:  # with a comment, in which keys are letters; undone, and decided again
                ana.page.keyboard.press("c")
                ana.page.keyboard.type("us 1234")
                ana.page.keyboard.press("Escape")
                ana.press(keys[side][0])
                ana.press("u")
                assert ana.page.input_value("#comment") == "us 1234"
                assert "Undone" in ana.text("#status")
                ana.press(keys[side][1])
            elif i in (10, 11):
                ana.press("3" if i == 10 else "4")
            else:
                ana.press(keys[side][i % 2])
            assert i == 4 or "Saved" in ana.text("#status")
        assert ana.shown == "none" and ana.page.is_visible("#finished")
        assert ana.page.evaluate("document.title") == "Compare responses"
        assert ana.page.evaluate("document.body.dataset.hacked ?? 'no'") == "no"

        ben = Page(browser, links["ben"])
        ben.page.keyboard.press("?")
        assert ben.page.is_visible("#keys")
        ben.page.keyboard.press("Escape")
        ben.press("s")
        for _ in range(19):
            ben.press(keys[ben.better()][0])
        assert ben.shown == "none"
        owner = Page(browser, links["(owner)"])
        assert "39 of 40 labels" in owner.text("#count")
        assert "sft" in owner.text("#models") and "ana" in owner.text("#people")
        assert ana.faults == ben.faults == owner.faults == []
    output = place / "pairs.jsonl"
    assert main(["label", "export", str(labels), "--output", str(output)]) == 0
    exported = [row for _, row in load_rows(str(output))]
    expected = [
        {"prompt": row["prompt"], "chosen": row["responses"][0]["text"], "rejected": row["responses"][1]["text"]}
        for i, row in enumerate(rows)
        if i not in (10, 11)
    ]
    expected[3]["chosen"] = "Yes: 1, 2 or 3, as you like."
    assert sorted(exported, key=lambda row: row["prompt"]) == sorted(expected, key=lambda row: row["prompt"])
    assert all(parse_record(row, "preference") for row in exported)
    [edited] = [label for label in Store.open(labels).labels() if label.edited]
    assert edited.person == "ana" and "Traceback" not in errors.read_text()


def test_a_click_while_the_server_is_away_is_kept_when_it_is_back(browser, place):
    labels, errors = place / "labels.sqlite", place / "errors.txt"
    with served(place / "items.jsonl", "--labels", labels, "--people", "ana", errors=errors) as (_, links):
        ana = Page(browser, links["ana"])
        away = True
        ana.page.route("**/label", lambda route: route.abort() if away else route.continue_())
        ana.page.keyboard.press("1")
        ana.page.wait_for_selector("#problem:visible")
        ana.page.keyboard.press("2")  # no other click takes its place
        assert Store.open(labels).labels() == []
        away = False
        ana.press("Enter")  # on "Try again", which has the focus
        assert [label.side for label in Store.open(labels).labels()] == ["a"]
        assert not ana.page.is_visible("#problem")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_fault(browser, place, scheme, size):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    words = [place / "items.jsonl", "--labels", place / "labels.sqlite", "--people", "ana", "--pairs", 1]
    options = {"resultTypes": ["violations"], "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    with served(*words, errors=place / "errors.txt") as (_, links):
        ana = Page(browser, links["ana"], scheme, size)
        owner = Page(browser, links["(owner)"], scheme, size)

        def check(page, state: str):
            found = axe.Axe().run(page, options=options).response["violations"]
            told = [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in found]
            assert told == [], state

        check(ana.page, "a pair")
        ana.page.keyboard.press("e")
        ana.page.keyboard.press("1")
        check(ana.page, "an editor")
        ana.page.keyboard.press("Escape")
        ana.page.keyboard.press("?")
        check(ana.page, "keys")
        ana.page.click("text=Close")
        ana.page.route("**/undo", lambda route: route.abort())
        ana.page.keyboard.press("u")
        ana.page.wait_for_selector("#problem:visible")
        check(ana.page, "a problem")
        check(owner.page, "the overview")
        for page in (ana.page, owner.page):
            wide, small = page.evaluate(
                """() => [
                    document.documentElement.scrollWidth - window.innerWidth,
                    [...document.querySelectorAll("body, body *")].filter(
                        (one) => one.checkVisibility() && parseFloat(getComputedStyle(one).fontSize) < 16
                    ).map((one) => one.outerHTML.slice(0, 100)),
                ]"""
            )
            assert wide <= 0 and small == []
        height = (
            "() => [...document.querySelectorAll('button')].filter((b) => b.checkVisibility() && b.offsetHeight < 44)"
        )
        assert ana.page.evaluate(f"({height})().length") == 0


@pytest.mark.skipif("COATI_WRITE_PICTURES" not in os.environ, reason="COATI_WRITE_PICTURES=1 writes them to docs/")
def test_pictures_for_the_docs(browser, place, rows):
    plain = [row for i, row in enumerate(rows) if i != 5]
    (place / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    words = [place / "items.jsonl", "--labels", place / "labels.sqlite", "--people", "ana", "ben", "--overlap", 2]
    with served(*words, errors=place / "errors.txt") as (_, links):
        for name in ("ana", "ben"):
            page = Page(browser, links[name])
            for i in range(12 if name == "ana" else 9):
                better, other = ("1", "2") if page.better() == "a" else ("2", "1")
                page.press({3: "3", 5: other, 8: other if name == "ana" else "4"}.get(i, better))
        Page(browser, links["ana"], size={"width": 1200, "height": 720}).page.screenshot(path=ROOT / "docs/label.png")
        phone = Page(browser, links["ana"], "dark", PHONE)
        phone.page.screenshot(path=ROOT / "docs/label-phone.png")
        owner = Page(browser, links["(owner)"], size={"width": 1200, "height": 780})
        owner.page.screenshot(path=ROOT / "docs/label-overview.png")
    for name in ("label", "label-phone", "label-overview"):
        assert (ROOT / "docs" / f"{name}.png").stat().st_size < 150_000
