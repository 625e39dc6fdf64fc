"""The report in Chromium, opened as a file: filter, sort, compare, keys, live updates, and what axe says of it.

It needs what tests/label/test_browser.py needs. The picture of docs/tracking.md is taken here: COATI_WRITE_PICTURES=1.
"""

import math
import os

import pytest

from coati.tracking import Tracker, TrackingConfig, write_report
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
SCRIPT = "<img src=x onerror=\"document.body.dataset.hacked = 'yes'\"><script>document.title = 'hacked'</script>"
REPLIES = (
    "Your order is on its way and arrives on Friday; I have sent you the link with which you can follow it.",
    "The refund is booked. It takes three days at most.",
    "It is late.",
    "Who knows?",
)
CALL = [
    {"role": "assistant", "content": "find(order=5)", "reward": 0.25, "tokens": 4},
    {"role": "tool", "content": f"on its way {SCRIPT}"},
]


def log_run(folder, worst: int) -> Tracker:
    """A run of two evaluations of six prompts; the first one's responses are the worse ones."""
    tracker = Tracker(folder, TrackingConfig(), algorithm="grpo", settings={"seed": worst})
    for step in range(1, 41):
        tracker.log({"reward": 1 - math.exp(-step / (4 + worst)), "kl": step * worst / 1000}, step)
        if step in (1, 40):
            rows = []
            for i in range(6):
                reply = (i + worst) % 4 if step == 1 else (i % 2) * (worst - 1)
                text = REPLIES[reply] + (SCRIPT if i == 5 else "")
                row = {"prompt": f"Where is order number {i + 1}?{SCRIPT * (i == 5)}", "response": text}
                if i == 4:
                    row["conversation"] = CALL + [{"role": "assistant", "content": text, "reward": 0.0, "tokens": 9}]
                rows.append(row | {"reward": 1 - reply / 4, "response_length": len(text.split())})
            tracker.log({"eval/reward": sum(row["reward"] for row in rows) / 6}, step)
            tracker.log_samples(rows, step)
    return tracker


@pytest.fixture
def folder(tmp_path):
    log_run(tmp_path / "runs" / "first", 1).finish("finished")
    log_run(tmp_path / "runs" / "second", 2).finish("finished")
    return tmp_path / "runs"


class Page:
    """The report in a browser; faults are what its console says."""

    def __init__(self, browser, path, **how):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        self.page, self.faults = context.new_page(), []
        self.page.on("console", lambda message: message.type == "error" and self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def press(self, *keys: str):
        for key in keys:
            self.page.keyboard.press(key)

    def choose(self, selector: str, label: str):
        self.page.select_option(selector, label=label)

    def cells(self, column: int) -> list[str]:
        """The texts of a column of the samples' table."""
        return self.page.locator(f"#samples-table tbody td:nth-child({column})").all_inner_texts()

    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.id")


def test_samples_are_filtered_sorted_and_compared_by_keyboard(browser, folder):
    found = Page(browser, write_report([folder], folder / "report.html"))
    page = found.page
    page.focus("#to-samples a")
    found.press("Enter", "Tab")
    assert found.focused() == "view-compare"
    assert page.locator("#samples-table th[scope=colgroup]").all_inner_texts() == ["first, step 40", "second, step 40"]
    assert found.cells(2)[:2] == ["Where is order number 1?", "Where is order number 2?"]
    assert (found.cells(3)[1], found.cells(6)[1]) == (REPLIES[0], REPLIES[1])

    page.focus("#side-1")  # the same run's first step in place of the other run
    page.keyboard.type("first, step 1")
    page.get_by_role("columnheader", name="first, step 1", exact=True).wait_for()
    assert found.focused() == "side-1"
    assert found.cells(6)[0] == REPLIES[1] and found.cells(7)[:3] == ["0.75", "0.5", "0.25"]

    page.focus("#sort-reward-1")
    found.press("Enter")
    assert [float(value) for value in found.cells(7)] == [1, 0.75, 0.75, 0.5, 0.5, 0.25]
    assert page.get_attribute("#samples-table th:has(#sort-reward-1)", "aria-sort") == "descending"
    assert found.focused() == "sort-reward-1"
    found.press("Enter")
    assert [float(value) for value in found.cells(7)] == [0.25, 0.5, 0.5, 0.75, 0.75, 1]
    page.focus("#sort-length-1")
    found.press("Enter")
    lengths = [int(value) for value in found.cells(8)]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2

    page.focus("#filter")
    page.keyboard.type("NUMBER 3")
    assert found.cells(2) == ["Where is order number 3?"] and "1 of 6 prompts" in page.inner_text("#found")
    page.fill("#filter", "who knows")
    assert found.cells(6) == [REPLIES[3]]
    page.fill("#filter", "")

    page.check("#view-list")
    assert len(found.cells(2)) == 24
    page.focus("#sort-step")
    found.press("Enter", "Enter")
    assert found.cells(3) == ["1"] * 12 + ["40"] * 12
    found.choose("#run", "second")
    assert set(found.cells(2)) == {"second"} and len(found.cells(2)) == 12
    assert found.faults == []


def test_a_row_opens_whole_and_arrows_go_through_the_rows(browser, folder):
    found = Page(browser, write_report([folder], folder / "report.html"))
    page = found.page
    page.focus("#open-4")
    found.press("Enter")
    assert page.inner_text("#sample-title") == "5 of 6"
    assert REPLIES[0] in page.inner_text("#sample-body") and "second, step 40" in page.inner_text("#sample-body")
    turns = page.locator("#sample-body section").first.locator(".turn").all_inner_texts()
    assert [turn.split()[0] for turn in turns] == ["assistant", "tool", "assistant"]
    assert "0.25" in turns[0] and "find(order=5)" in turns[0] and SCRIPT in turns[1]
    found.press("ArrowRight")
    assert page.inner_text("#sample-title") == "6 of 6" and SCRIPT in page.inner_text("#sample-body")
    found.press("ArrowRight")  # there is none
    assert page.inner_text("#sample-title") == "6 of 6"
    found.press("Escape")
    assert not page.is_visible("#sample") and found.focused() == "open-5"
    assert page.evaluate("document.body.dataset.hacked ?? 'no'") == "no" and "hacked" not in page.title()
    assert found.faults == []


def test_values_of_curves_are_read_with_arrow_keys_and_runs_are_left_out(browser, folder):
    found = Page(browser, write_report([folder], folder / "report.html"))
    page = found.page
    page.locator("figure svg").first.focus()
    found.press("Home", "ArrowRight")
    values = page.locator("figure output").first
    assert values.inner_text().splitlines() == ["first reward, step 2: 0.3297", "second reward, step 2: 0.2835"]
    page.get_by_label("second", exact=True).uncheck()
    page.locator("figure svg").first.focus()
    found.press("Home")
    assert "second" not in values.inner_text() and "first eval/reward, step 1: 0.625" in values.inner_text()
    assert page.locator("figure").first.locator("path.of-1").first.is_hidden()
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert not page.get_by_label("second", exact=True).is_checked()


def test_a_page_that_is_watched_shows_what_is_new_and_keeps_what_the_reader_chose(browser, tmp_path):
    tracker, output = log_run(tmp_path / "run", 1), tmp_path / "report.html"
    found = Page(browser, write_report([tmp_path / "run"], output, seconds=0.1))
    page = found.page
    page.click("#pause")
    assert page.inner_text("#pause") == "Continue updates"
    page.fill("#filter", "order")
    page.click("#sort-reward-1")
    page.locator("summary", has_text="Settings").click()
    page.focus("#filter")
    page.evaluate("window.scrollTo(0, 700)")
    before = page.evaluate("window.scrollY")
    page.evaluate("document.body.dataset.old = 'yes'")
    tracker.log_samples([{"prompt": "a new order", "response": "new", "reward": 9.0, "response_length": 1}], 41)
    write_report([tmp_path / "run"], output, seconds=600)
    page.evaluate("document.getElementById('pause').click()")  # as a mouse would, but it moves neither focus nor page

    page.wait_for_selector("body[data-ready]:not([data-old])")
    assert page.inner_text("#pause") == "Pause updates"
    assert page.locator("#side-1 option").all_inner_texts() == ["nothing", "step 1", "step 40", "step 41"]
    assert page.input_value("#filter") == "order" and found.focused() == "filter"
    assert page.get_attribute("#samples-table th:has(#sort-reward-1)", "aria-sort") == "descending"
    assert page.evaluate("document.querySelector('details[id^=settings]').open")
    assert before > 0 and page.evaluate("window.scrollY") == before
    assert found.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_fault(browser, folder, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    options = {"resultTypes": ["violations"], "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    size = {"width": width, "height": 850}
    output = write_report([folder], folder / "report.html", seconds=600)
    found = Page(browser, output, color_scheme=scheme, viewport=size)
    page = found.page

    def check(state: str):
        violations = axe.Axe().run(page, options=options).response["violations"]
        told = [(fault["id"], [node["html"][:200] for node in fault["nodes"]]) for fault in violations]
        assert told == [], state

    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    check("side by side")
    page.check("#view-list")
    check("every sample")
    page.click("#open-0")
    check("a sample")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 21, 27)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") or width == 390


@pytest.mark.skipif("COATI_WRITE_PICTURES" not in os.environ, reason="COATI_WRITE_PICTURES=1 writes it to docs/")
def test_picture_for_the_docs(browser, folder):
    found = Page(browser, write_report([folder], folder / "report.html"), viewport={"width": 1240, "height": 560})
    found.choose("#side-0", "first, step 1")
    found.choose("#side-1", "first, step 40")
    found.page.fill("#filter", "order")
    found.page.click("#sort-reward-0")
    found.page.evaluate("document.getElementById('explorer').scrollIntoView()")
    found.page.screenshot(path=ROOT / "docs" / "report-samples.png")
    assert (ROOT / "docs" / "report-samples.png").stat().st_size < 150_000
