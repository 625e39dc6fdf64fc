"""The example of the whole loop: its simulated labeler, its prompts, a session on the page, and the loop itself."""

import json
from pathlib import Path

import pytest

import examples.feedback.run as loop
from coati.label.store import OWNER, Store
from examples.feedback import labeler, page
from examples.feedback.labeler import choice_of, faults, label_all
from examples.feedback.prompts import ABOUT_TASKS, ABOUT_THINGS, SIZES, make_prompts
from examples.smollm2.tasks import write_rows

QUESTION = "What is a volcano? Answer in two sentences."
GOOD = (
    "A volcano is an opening in the Earth's crust through which molten rock, ash and gas escape from a magma chamber "
    "below the surface."
)
BAD = {
    "": "cut off",
    "  \n": "cut off",
    ".": "too short",
    "Yes.": "too short",
    QUESTION: "the question again",
    "A volcano is a volcano, and a volcano is what a volcano is.": "the question again",
    GOOD[:-1]: "cut off",
    GOOD + " It is": "cut off",
    GOOD + "\n\n1. Magma rises from below.\n2.": "cut off",
    GOOD + " " + GOOD: "repeats itself",
    GOOD + " Rocks and ash fall" + ", and rocks and ash fall" * 3 + ".": "repeats itself",
    "volcano " * 24 + "volcano.": "repeats itself",
    "Gravity is the force that pulls objects with mass toward each other everywhere in the universe.": "off topic",
    "I'm ready to assist you with your need! We can have a productive chat with you today.": "off topic",
}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("response", BAD)
def test_the_labeler_finds_what_is_wrong_and_chooses_no_such_response(response):
    assert BAD[response] in faults(QUESTION, response)
    assert choice_of(QUESTION, GOOD, response) == "a"
    assert choice_of(QUESTION, response, GOOD) == "b"
    assert choice_of(QUESTION, response, "") == choice_of(QUESTION, "", response) == "both_bad"


def test_the_labeler_wants_a_brief_response_and_names_no_difference_that_is_none():
    assert faults(QUESTION, GOOD) == []
    short = "A volcano is a mountain that throws out lava and ash."
    long = GOOD + " Some erupt every few years, others have been quiet for many centuries and may not wake again."
    assert faults(QUESTION, short) == faults(QUESTION, long) == []
    for worse in (short, long):
        assert choice_of(QUESTION, worse, GOOD) == "b" and choice_of(QUESTION, GOOD, worse) == "a"
    assert choice_of(QUESTION, GOOD, GOOD.replace("molten rock", "hot molten rock")) == "tie"


def test_no_subject_is_in_two_sets_and_the_same_seed_gives_the_same_prompts(tmp_path):
    files, again = make_prompts(tmp_path / "one", 0), make_prompts(tmp_path / "two", 0)
    assert all(again[name].read_bytes() == path.read_bytes() for name, path in files.items())
    found = {}
    for name, path in files.items():
        prompts = [row["prompt"] for row in rows_of(path)]
        assert len({*prompts}) == len(prompts) == SIZES[name]
        found[name] = {subject_of(prompt) for prompt in prompts}
    assert len(set().union(*found.values())) == sum(map(len, found.values())) == sum(SIZES.values()) / 2


def subject_of(prompt: str) -> str:
    [subject] = [
        prompt.removeprefix(before).removesuffix(after)
        for before, after in (question.split("{}") for question in (*ABOUT_THINGS, *ABOUT_TASKS))
        if prompt.startswith(before) and prompt.endswith(after)
    ]
    return subject


def test_what_the_labeler_chooses_on_the_page_is_in_the_overview_and_the_export(tmp_path):
    bad = [text for text in BAD if text.strip()]
    pairs = [[{"text": GOOD, "model": "good"}, {"text": text, "model": "bad"}] for text in bad]
    pairs.append([{"text": GOOD, "model": "good"}, {"text": GOOD.replace("rock", "stone"), "model": "bad"}])
    items = [{"id": str(i), "prompt": QUESTION, "responses": pair} for i, pair in enumerate(pairs)]
    files = [tmp_path / name for name in ("items.jsonl", "labels.sqlite", "rows.jsonl")]
    write_rows(files[0], items)
    words = [str(files[0]), "--labels", str(files[1]), "--people", page.PERSON, "--port", "0"]
    with page.served(words, threads=1) as links:
        assert label_all(links[page.PERSON]) == len(pairs)
        overview = page.finished_overview(links[OWNER])
    assert overview["outcomes"] == {"decided": len(bad), "tie": 1, "both_bad": 0, "split": 0}
    first = overview["models"][0]
    assert (first["model"], first["wins"], first["losses"], first["rest"]) == ("good", len(bad), 0, 1)
    page.export(files[1], files[2])
    assert {(row["chosen"], row["rejected"]) for row in rows_of(files[2])} == {(GOOD, text) for text in bad}


@pytest.mark.slow
def test_the_loop_goes_from_labels_to_a_blind_comparison(tiny_world, tmp_path, monkeypatch, capfd):
    """A tiny random model, which writes no sentences, for a labeler who only wants many words. What is finished isn't
    done again."""
    monkeypatch.setattr(labeler, "choice_of", lambda question, left, right: "a" if len(left) > len(right) else "b")
    monkeypatch.setattr(loop, "SAMPLING", loop.SAMPLING | {"max_new_tokens": 16})  # a context of 128 bytes
    sizes = {"labels": 8, "held_out": 8, "responses": 8, "blind": 12}
    loop.walk(Path(tiny_world["policy"]), tmp_path, 0, by_hand=False, processes=1, sizes=sizes)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["blind"]["progress"]["labels"] == found["responses"]["first"]["n"] == 12
    assert {row["model"] for row in found["blind"]["models"]} == {"first", "trained"}
    assert found["labeled pairs"] == len(Store.open(tmp_path / "labels.sqlite").pairs()) == 8
    for row in rows_of(tmp_path / "ranked.jsonl"):
        assert row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"]
    assert "the trained model wins" in loop.figures(found)
    before = (tmp_path / "ranked.jsonl").stat().st_mtime_ns
    (tmp_path / "summary.json").unlink()
    loop.walk(Path(tiny_world["policy"]), tmp_path, 0, by_hand=False, processes=1, sizes=sizes)
    assert capfd.readouterr().out.count("is finished already") == 2
    assert (tmp_path / "ranked.jsonl").stat().st_mtime_ns == before
