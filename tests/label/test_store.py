"""Nothing that people decide is lost or kept twice, whatever the order in which they click."""

import os
import sqlite3
import stat
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.errors import UserError
from coati.label.items import Response
from coati.label.store import CHOICES, Conflict, Store
from tests.label.world import Clock, click, items, store_with

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # thousands of commits wait long for a disk
NAMES = ("ana", "ben", "cy")
ACTIONS = st.tuples(
    st.sampled_from(("next", "label", "label", "skip", "undo", "again", "wait")),
    st.sampled_from(NAMES),
    st.sampled_from(CHOICES),
)


class Desk:
    """What one person sees and has decided, as the test keeps it."""

    def __init__(self, person):
        self.person = person
        self.seen = {}  # pair: shown id
        self.decided = {}  # pair: choice, in the order of the clicks
        self.open = None  # what is on the page
        self.last = None  # the last click, for sending it again


def act(store, desk, action, choice, number):
    """One click of a person on what their page shows, and the same in the test's books."""
    if action == "next" or (action in ("label", "skip") and desk.open is None):
        shown = store.next(desk.person)
        desk.open = shown
        if shown is not None:
            assert desk.seen.setdefault(shown.pair, shown.id) == shown.id, "shown anew"
            assert shown.pair not in desk.decided, "decided already"
    elif action in ("label", "skip"):
        decided = choice if action == "label" else "skip"
        sent = click(f"{desk.person.name}-{number}", desk.open.id, decided, comment=str(number))
        store.label(desk.person, sent)
        desk.decided[desk.open.pair] = decided
        desk.open, desk.last = None, sent
    elif action == "undo" and desk.decided:
        store.undo(desk.person, f"undo-{number}")
        pair, _ = desk.decided.popitem()
        desk.open = store.next(desk.person)
        assert desk.open is not None and desk.open.id <= desk.seen[pair]
    elif action == "undo":
        with pytest.raises(Conflict, match="nothing to undo"):
            store.undo(desk.person, f"undo-{number}")
    elif action == "again" and desk.last is not None:
        before = store.labels()
        store.label(desk.person, desk.last)
        assert store.labels() == before


@settings(max_examples=60)
@given(st.lists(ACTIONS, max_size=30), st.integers(1, 3), st.integers(1, 4))
def test_any_interleaving_loses_nothing_and_shows_nothing_twice(actions, overlap, count):
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        store, people = store_with(Path(folder), count, NAMES, overlap, hold=60.0, clock=clock)
        desks = {person.name: Desk(person) for person in people}
        waited = False
        for number, (action, name, choice) in enumerate(actions):
            if action == "wait":
                clock.now, waited = clock.now + 61.0, True
            else:
                act(store, desks[name], action, choice, number)
            expected = {
                (name, pair): decided
                for name, desk in desks.items()
                for pair, decided in desk.decided.items()
                if decided != "skip"
            }
            kept = store.labels()
            assert {(label.person, label.pair): label.side or label.choice for label in kept} == expected
            assert len(kept) == len(expected)
            if not waited:  # a pair whose time was over may go to one more
                assert all(found <= overlap for found in Counter(label.pair for label in kept).values())
        for desk in desks.values():  # everybody goes on to the end
            while (shown := store.next(desk.person)) is not None:
                assert shown.pair not in desk.decided
                store.label(desk.person, click(f"{desk.person.name}-end-{shown.id}", shown.id, "tie"))
                desk.decided[shown.pair] = "tie"
        skipped = Counter(pair for desk in desks.values() for pair, made in desk.decided.items() if made == "skip")
        found = Counter(label.pair for label in store.labels())
        for pair in range(1, count + 1):  # nothing is left for anybody
            assert found[pair] >= min(overlap, len(NAMES) - skipped[pair]) or waited


def test_undoing_goes_back_step_by_step_and_forward_in_the_order_shown(tmp_path):
    store, [ana] = store_with(tmp_path, 4, ("ana",))
    for i in range(3):
        store.label(ana, click(f"first-{i}", store.next(ana).id, "a", comment=f"comment {i}", rating_a=4))
    open_now = store.next(ana)
    store.undo(ana, "undo-0001")
    assert store.next(ana).pair == 3
    store.undo(ana, "undo-0002")
    store.undo(ana, "undo-0002")  # sent again
    shown = store.next(ana)
    assert shown.pair == 2
    assert shown.before["choice"] == "a" and shown.before["comment"] == "comment 1" and shown.before["rating_a"] == 4
    for pair in (2, 3):
        shown = store.next(ana)
        assert shown.pair == pair
        store.label(ana, click(f"second-{pair}", shown.id, "tie"))
    assert store.next(ana).id == open_now.id
    assert [label.pair for label in store.labels()] == [1, 2, 3]
    with store.connection() as db:
        [rows] = db.execute("SELECT COUNT(*) FROM labels").fetchone()
    assert rows == 3 + 2 + 2  # nothing was deleted


def test_two_windows_of_one_person_decide_a_pair_once(tmp_path):
    store, [ana] = store_with(tmp_path, 2, ("ana",))
    one, two = store.next(ana), store.next(ana)
    assert one == two
    store.label(ana, click("window-1", one.id, "a"))
    with pytest.raises(Conflict, match="labeled already"):
        store.label(ana, click("window-2", two.id, "b"))
    assert [label.side for label in store.labels()] == ["a"]


def test_nobody_labels_what_was_shown_to_another(tmp_path):
    store, [ana, ben] = store_with(tmp_path, 2, ("ana", "ben"))
    shown = store.next(ana)
    with pytest.raises(Conflict, match="not shown to you"):
        store.label(ben, click("of-ben", shown.id, "a"))
    store.label(ana, click("the-same-id", shown.id, "a"))
    store.label(ben, click("the-same-id", store.next(ben).id, "b"))  # ids are each person's own
    assert len(store.labels()) == 2


def test_a_pair_whose_time_is_over_goes_to_another_and_a_late_label_is_kept(tmp_path):
    clock = Clock()
    store, [ana, ben] = store_with(tmp_path, 1, ("ana", "ben"), hold=60.0, clock=clock)
    late = store.next(ana)
    clock.now += 59
    assert store.next(ben) is None
    clock.now += 2
    taken = store.next(ben)
    assert taken.pair == late.pair
    assert store.next(ana) is None  # it is in front of ben now
    store.label(ben, click("of-ben", taken.id, "a"))
    store.label(ana, click("of-ana", late.id, "b"))  # her page still showed it
    assert [label.person for label in store.labels()] == ["ben", "ana"]


def test_who_comes_back_gets_the_same_pair_where_nobody_took_it(tmp_path):
    clock = Clock()
    store, [ana] = store_with(tmp_path, 2, ("ana",), hold=60.0, clock=clock)
    shown = store.next(ana)
    clock.now += 1e6
    assert store.next(ana) == shown


@pytest.mark.parametrize("overlap", [1, 2])
def test_people_at_once_share_the_pairs(tmp_path, overlap):
    """In threads, each with connections of its own, as the server's."""
    store, people = store_with(tmp_path, 12, ("ana", "ben", "cy", "di"), overlap)

    def work(person):
        while (shown := store.next(person)) is not None:
            store.label(person, click(f"{person.name}-{shown.id}", shown.id, "a"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, people))
    found = Counter(label.pair for label in store.labels())
    assert found == {pair: overlap for pair in range(1, 13)}
    assert store.progress()["labels"] == 12 * overlap


def test_the_place_of_a_response_is_recorded(tmp_path):
    store, [ana] = store_with(tmp_path, 20, ("ana",))
    while (shown := store.next(ana)) is not None:
        left = "a" if shown.responses[0].startswith("response 0") else "b"
        store.label(ana, click(f"click-{shown.id}", shown.id, left))  # always the first model's
    labels = store.labels()
    assert {label.choice for label in labels} == {"first"}
    assert {label.side for label in labels} == {"a", "b"}


def test_least_margins_come_first_and_new_scores_change_the_order(tmp_path):
    store = Store.prepare(tmp_path / "labels.sqlite")
    store.add_items(items(4, responses=3), 1, {"item 2": [0.0, 3.0, 2.9], "item 1": [1.0, 1.5, 9.0]})
    store.add_people(["ana"])
    [_, ana] = store.people()
    first = store.next(ana)
    assert {*first.responses} == {"response 1 to 2", "response 2 to 2"}
    store.label(ana, click("click-1", first.id, "a"))
    assert store.add_items(items(4, responses=3), 1, {"item 3": [0.0, 0.0, 0.0]}) == 0
    assert store.next(ana).messages[0]["content"] == "prompt 3"


def test_items_that_are_there_stay_and_others_with_their_id_are_wrong(tmp_path):
    store, _ = store_with(tmp_path, 2, ("ana",))
    assert store.add_items(items(3)) == 1
    changed = replace(items(1)[0], responses=(Response("new"), Response("newer")))
    with pytest.raises(UserError, match=r"'item 0'.*another content"):
        store.add_items([*items(5), changed])
    assert store.progress()["pairs"] == 3  # nothing of a failed call


def test_links_stay_and_the_file_is_its_owners(tmp_path):
    store, people = store_with(tmp_path, 1, ("ana",))
    again = Store.prepare(tmp_path / "labels.sqlite")
    again.add_people(["ana", "ben"])
    assert again.people()[1] == people[0]
    tokens = [person.token for person in again.people()]
    assert len({*tokens}) == 3 and all(len(token) == 32 for token in tokens)
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600
    with store.connection() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_wrong_files_are_said(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        Store.open(tmp_path / "missing.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to look at " * 40)
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("CREATE TABLE things (id)").connection.close()
    for action in (Store.open, Store.prepare):
        with pytest.raises(UserError, match="can't be read as labels"):
            action(text)
        with pytest.raises(UserError, match="was not made by this version"):
            action(other)
    with sqlite3.connect(other) as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"  # as it was
    with pytest.raises(UserError, match="can't be written"):
        Store.prepare(tmp_path / "no" / "folder.sqlite")
    Store.prepare(tmp_path / "labels.sqlite", seed=4)
    with pytest.raises(UserError, match="--seed 4"):
        Store.prepare(tmp_path / "labels.sqlite", seed=5)
