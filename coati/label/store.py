"""Items, people and their labels in one SQLite file. Every query of `coati label` is here.

Each click is one transaction that is on disk before the page hears of it (WAL, synchronous=FULL), and all that write
take turns (BEGIN IMMEDIATE), in this process and others. Labels are never changed or deleted: what counts is the last
row about a pair that somebody was shown, and undoing is a row too.
"""

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coati.errors import UserError
from coati.label.assignment import choose_pairs, is_swapped, margin, next_pair
from coati.label.items import Item, Response

CHOICES = ("a", "b", "tie", "both_bad")
RATINGS = (1, 2, 3, 4, 5)
OWNER = "(owner)"
APPLICATION, VERSION = 0x636F6174, 1  # in the file's header: "coat", and of the tables below
WAIT = 30.0  # seconds for others' transactions
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE items (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, messages TEXT NOT NULL,
    responses TEXT NOT NULL
);
CREATE TABLE pairs (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, first INTEGER NOT NULL, second INTEGER NOT NULL,
    margin REAL, UNIQUE (item, first, second)
);
CREATE TABLE people (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token TEXT NOT NULL UNIQUE, is_owner INTEGER NOT NULL
);
CREATE TABLE shown (
    id INTEGER PRIMARY KEY, person INTEGER NOT NULL REFERENCES people, pair INTEGER NOT NULL REFERENCES pairs,
    is_swapped INTEGER NOT NULL, at REAL NOT NULL, held_until REAL NOT NULL, UNIQUE (person, pair)
);
CREATE TABLE labels (
    id INTEGER PRIMARY KEY, shown INTEGER NOT NULL REFERENCES shown, click TEXT UNIQUE,
    choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'tie', 'both_bad', 'skip', 'undo', 'expired')),
    rating_a INTEGER CHECK (rating_a BETWEEN 1 AND 5), rating_b INTEGER CHECK (rating_b BETWEEN 1 AND 5),
    edited TEXT, comment TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL
);
CREATE INDEX pairs_in_order ON pairs (margin IS NULL, margin, id);
CREATE INDEX labels_of ON labels (shown);
CREATE VIEW latest AS
    SELECT shown.*, labels.id AS label, labels.choice, labels.rating_a, labels.rating_b, labels.edited,
        labels.comment, labels.seconds
    FROM shown LEFT JOIN labels ON labels.id = (SELECT MAX(id) FROM labels WHERE shown = shown.id);
"""
# Not in the first version's files, which are read as well.
DRAWN = """
CREATE TABLE IF NOT EXISTS drawn (
    prompt TEXT NOT NULL, model TEXT NOT NULL, place INTEGER NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (prompt, model, place)
)
"""
IS_LABELED = "choice IN ('a', 'b', 'tie', 'both_bad')"
IS_OPEN = "(choice IS NULL OR choice = 'undo')"


class Conflict(Exception):
    """What a page asked for doesn't fit what has happened since; it should show the state anew."""


@dataclass(frozen=True)
class Person:
    """Somebody with a link."""

    id: int
    name: str
    token: str
    is_owner: bool


@dataclass(frozen=True)
class Click:
    """What somebody has decided about a pair that they were shown.

    Attributes:
        id: chosen by the page, the same when it sends a click again.
        shown: the pair, as `Shown.id`.
        choice: one of `CHOICES`, or "skip".
        rating_a, rating_b: of the left and the right response, 1 to 5.
        edited: a better text of the chosen response.
    """

    id: str
    shown: int
    choice: str
    rating_a: int | None = None
    rating_b: int | None = None
    edited: str | None = None
    comment: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Shown:
    """A pair in front of a person.

    Attributes:
        messages: the prompt, role and content of each.
        responses: texts, left and right.
        before: what the person had chosen before undoing it: fields of `Click`.
    """

    id: int
    pair: int
    messages: list[dict[str, str]]
    responses: tuple[str, str]
    before: dict[str, Any]


@dataclass(frozen=True)
class Label:
    """A label that counts.

    Attributes:
        id: rises with time.
        choice: "first" or "second" (the pair's, wherever they stood), "tie" or "both_bad".
        side: "a" or "b", where the chosen response stood.
        edited: a better text of the chosen response.
    """

    id: int
    person: str
    pair: int
    choice: str
    side: str | None
    edited: str | None
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt; `prompt` as the items' file has it."""

    id: int
    prompt: Any
    texts: tuple[str, str]
    models: tuple[str, str]


class Store:
    """A file of labels.

    Args:
        path: of the file.
        hold: seconds for which a pair is kept for the person who was shown it.
        clock: seconds since the epoch.
    """

    def __init__(self, path: Path, hold: float = 1800.0, clock: Callable[[], float] = time.time):
        self.path, self.hold, self.clock = path, hold, clock

    @classmethod
    def prepare(cls, path: Path, seed: int | None = None, **how: Any) -> "Store":
        """The file, made if it isn't there. Only its owner may read it: it holds the secret parts of links.

        Args:
            seed: of a new file (0 if None); what is random follows from it.

        Raises:
            UserError: it can't be made, is no file of labels, or has another seed.
        """
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}; name another file with --labels") from None
        store = cls(path, **how)
        try:
            with store.connection() as db:
                if _is_empty(db):  # of others' files nothing is changed
                    db.execute("PRAGMA journal_mode = WAL")
            with store.transaction() as db:
                if _is_empty(db):
                    for statement in SCHEMA.split(";"):
                        db.execute(statement)
                    db.executemany("INSERT INTO settings VALUES (?, ?)", [("seed", seed or 0), ("overlap", 1)])
                    db.execute(f"PRAGMA application_id = {APPLICATION}")
                    db.execute(f"PRAGMA user_version = {VERSION}")
            store = cls.open(path, **how)
            with store.transaction() as db:
                db.execute(DRAWN)
        except sqlite3.DatabaseError as error:
            raise UserError(_unreadable(path, error)) from None
        there = store.seed()
        if seed not in (None, there):
            raise UserError(f"{path} was made with --seed {there}; leave --seed out, or name another file")
        return store

    @classmethod
    def open(cls, path: Path, **how: Any) -> "Store":
        """A file that is there.

        Raises:
            UserError: it isn't, or is no file of labels.
        """
        if not path.is_file():
            raise UserError(f"there is no file {path}; coati label ITEMS.jsonl --labels {path} makes it")
        store = cls(path, **how)
        try:
            with store.connection() as db:
                [application], [version] = (
                    db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
                )
        except sqlite3.DatabaseError as error:
            raise UserError(_unreadable(path, error)) from None
        if (application, version) != (APPLICATION, VERSION):
            raise UserError(f"{path} was not made by this version of coati label; name a file that was")
        return store

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            yield db
        finally:
            db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is on disk at its end, or nothing of it has happened."""
        with self.connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    # --- what there is to label, and who does it

    def seed(self) -> int:
        """What is random follows from it."""
        with self.connection() as db:
            return _setting(db, "seed")

    def drawn(self) -> dict[tuple[str, str, int], str]:
        """Responses that models have drawn, by the key of the prompt, the model's name and the place among its own."""
        with self.connection() as db:
            rows = db.execute("SELECT prompt, model, place, text FROM drawn").fetchall()
        return {(row["prompt"], row["model"], row["place"]): row["text"] for row in rows}

    def add_drawn(self, rows: Sequence[tuple[str, str, int, str]]) -> None:
        """Keeps responses, as `drawn` gives them; one that is there stays."""
        with self.transaction() as db:
            db.executemany("INSERT INTO drawn VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", rows)

    def keys(self) -> set[str]:
        """Of all items."""
        with self.connection() as db:
            return {row["key"] for row in db.execute("SELECT key FROM items")}

    def items(self) -> list[Item]:
        """All of them, in the order in which they came."""
        with self.connection() as db:
            rows = db.execute("SELECT * FROM items ORDER BY id").fetchall()
        found = []
        for row in rows:
            responses = tuple(Response(text, model) for text, model in json.loads(row["responses"]))
            found.append(Item(row["key"], json.loads(row["prompt"]), json.loads(row["messages"]), responses))
        return found

    def add_items(
        self, items: Sequence[Item], pairs_per_item: int = 1, scores: Mapping[str, Sequence[float]] | None = None
    ) -> int:
        """Adds items that aren't there yet; returns how many were new.

        Args:
            pairs_per_item: how many pairs of each item's responses are compared.
            scores: of responses, by the item's key: pairs of the least margin come first. They also set a new order of
                pairs that are there.

        Raises:
            UserError: an item is there with another prompt or other responses.
        """
        scores = scores or {}
        with self.transaction() as db:
            seed, new = _setting(db, "seed"), 0
            for item in items:
                prompt, messages = json.dumps(item.prompt), json.dumps(item.messages)
                responses = json.dumps([[response.text, response.model] for response in item.responses])
                there = db.execute("SELECT * FROM items WHERE key = ?", (item.key,)).fetchone()
                if there and (there["prompt"], there["responses"]) != (prompt, responses):
                    raise UserError(f"the item {item.key!r} is in {self.path} with another content; give it a new id")
                if not there:
                    values = (item.key, prompt, messages, responses)
                    cursor = db.execute(
                        "INSERT INTO items (key, prompt, messages, responses) VALUES (?, ?, ?, ?)", values
                    )
                    texts = [response.text for response in item.responses]
                    chosen = choose_pairs(texts, pairs_per_item, seed, item.key, scores.get(item.key))
                    rows = [(cursor.lastrowid, *pair) for pair in chosen]
                    db.executemany("INSERT INTO pairs (item, first, second) VALUES (?, ?, ?)", rows)
                    new += 1
            for key, values in scores.items():
                pairs = db.execute(
                    "SELECT pairs.* FROM pairs JOIN items ON items.id = item WHERE key = ?", (key,)
                ).fetchall()
                rows = [(margin(values, pair["first"], pair["second"]), pair["id"]) for pair in pairs]
                db.executemany("UPDATE pairs SET margin = ? WHERE id = ?", rows)
        return new

    def add_people(self, names: Sequence[str]) -> None:
        """Gives a link to each that has none, and to the owner."""
        with self.transaction() as db:
            for name in (OWNER, *names):
                db.execute(
                    "INSERT INTO people (name, token, is_owner) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING",
                    (name, secrets.token_urlsafe(24), name == OWNER),
                )

    def people(self) -> list[Person]:
        """All with a link, the owner first."""
        with self.connection() as db:
            rows = db.execute("SELECT * FROM people ORDER BY id").fetchall()
        return [Person(row["id"], row["name"], row["token"], bool(row["is_owner"])) for row in rows]

    def set_overlap(self, overlap: int) -> None:
        """How many people label each pair."""
        with self.transaction() as db:
            db.execute("UPDATE settings SET value = ? WHERE name = 'overlap'", (overlap,))

    def add_labels(self, labels: Sequence[Any]) -> int:
        """Adds `coati.label.imports.Imported`s of items that are here, each person with a link of their own. Who has
        been shown a pair keeps the label that is there. Returns how many were new."""
        self.add_people(list(dict.fromkeys(label.person for label in labels)))
        now, new = self.clock(), 0
        with self.transaction() as db:
            for label in labels:
                cursor = db.execute(
                    "INSERT INTO shown (person, pair, is_swapped, at, held_until) "
                    "SELECT people.id, pairs.id, 0, ?, ? FROM people, pairs JOIN items ON items.id = item "
                    "WHERE name = ? AND key = ? AND first = 0 AND second = 1 ON CONFLICT (person, pair) DO NOTHING",
                    (now, now, label.person, label.key),
                )
                if cursor.rowcount:
                    choice = {"first": "a", "second": "b"}.get(label.choice, label.choice)
                    _append(db, cursor.lastrowid, choice, now)
                    new += 1
        return new

    # --- clicks

    def next(self, person: Person) -> Shown | None:
        """The pair that the person should label now: one that is open already, or a new one, which is then theirs for
        `hold` seconds. None if nothing is left for them."""
        now = self.clock()
        with self.transaction() as db:
            overlap = _setting(db, "overlap")
            holders = _holders(db, now, person)
            mine = f"SELECT * FROM latest WHERE person = ? AND {IS_OPEN} ORDER BY id"
            for row in db.execute(mine, (person.id,)).fetchall():
                if row["held_until"] < now and holders.get(row["pair"], 0) >= overlap:  # others took it meanwhile
                    _append(db, row["id"], "expired", now)
                    continue
                db.execute("UPDATE shown SET held_until = ? WHERE id = ?", (now + self.hold, row["id"]))
                return _shown(db, row["id"])
            order = (row["id"] for row in db.execute("SELECT id FROM pairs ORDER BY margin IS NULL, margin, id"))
            seen = {row["pair"] for row in db.execute("SELECT pair FROM shown WHERE person = ?", (person.id,))}
            pair = next_pair(order, holders, seen, overlap)
            if pair is None:
                return None
            swapped = is_swapped(_setting(db, "seed"), pair, person.name)
            cursor = db.execute(
                "INSERT INTO shown (person, pair, is_swapped, at, held_until) VALUES (?, ?, ?, ?, ?)",
                (person.id, pair, swapped, now, now + self.hold),
            )
            return _shown(db, cursor.lastrowid)

    def label(self, person: Person, click: Click) -> None:
        """Keeps what the person decided. A click that was kept already changes nothing.

        Raises:
            Conflict: the pair isn't in front of this person, or another click has decided it.
        """
        with self.transaction() as db:
            if _is_kept(db, person, click.id):
                return
            row = db.execute("SELECT * FROM latest WHERE id = ? AND person = ?", (click.shown, person.id)).fetchone()
            if row is None:
                raise Conflict("this pair was not shown to you")
            if row["choice"] in (*CHOICES, "skip"):
                raise Conflict("this pair is labeled already, in another window perhaps")
            values = (click.rating_a, click.rating_b, click.edited, click.comment, click.seconds)
            _append(db, click.shown, click.choice, self.clock(), _click_key(person, click.id), *values)

    def undo(self, person: Person, click: str) -> None:
        """Opens the pair again that the person decided last. A click that was kept already changes nothing.

        Raises:
            Conflict: there is nothing to undo.
        """
        now = self.clock()
        with self.transaction() as db:
            if _is_kept(db, person, click):
                return
            row = db.execute(
                f"SELECT * FROM latest WHERE person = ? AND ({IS_LABELED} OR choice = 'skip') "
                "ORDER BY label DESC LIMIT 1",
                (person.id,),
            ).fetchone()
            if row is None:
                raise Conflict("there is nothing to undo")
            _append(db, row["id"], "undo", now, _click_key(person, click))
            db.execute("UPDATE shown SET held_until = ? WHERE id = ?", (now + self.hold, row["id"]))

    # --- what has come of it

    def progress(self, person: Person | None = None) -> dict[str, int]:
        """`labels` of `wanted` (pairs times overlap), `pairs`, `overlap`; with a person, `yours` and `skipped`."""
        with self.connection() as db:
            [pairs] = db.execute("SELECT COUNT(*) FROM pairs").fetchone()
            [labels] = db.execute(f"SELECT COUNT(*) FROM latest WHERE {IS_LABELED}").fetchone()
            overlap = _setting(db, "overlap")
            found = {"labels": labels, "wanted": pairs * overlap, "pairs": pairs, "overlap": overlap}
            if person:
                rows = db.execute(
                    f"SELECT COALESCE(SUM({IS_LABELED}), 0) AS yours, COALESCE(SUM(choice = 'skip'), 0) AS skipped "
                    "FROM latest WHERE person = ?",
                    (person.id,),
                )
                found |= dict(rows.fetchone())
        return found

    def skipped(self) -> dict[str, int]:
        """How many pairs each person has skipped."""
        with self.connection() as db:
            rows = db.execute(
                "SELECT name, COUNT(*) AS count FROM latest JOIN people ON people.id = person WHERE choice = 'skip' "
                "GROUP BY name"
            ).fetchall()
        return {row["name"]: row["count"] for row in rows}

    def labels(self) -> list[Label]:
        """All that count, in the order in which they came."""
        with self.connection() as db:
            rows = db.execute(
                "SELECT latest.*, people.name FROM latest JOIN people ON people.id = person "
                f"WHERE {IS_LABELED} ORDER BY label"
            ).fetchall()
        return [_label(row) for row in rows]

    def pairs(self) -> dict[int, Pair]:
        """All pairs, by id."""
        with self.connection() as db:
            rows = db.execute(
                "SELECT pairs.*, prompt, responses FROM pairs JOIN items ON items.id = item ORDER BY pairs.id"
            ).fetchall()
        found = {}
        for row in rows:
            responses = json.loads(row["responses"])
            texts, models = zip(responses[row["first"]], responses[row["second"]], strict=True)
            found[row["id"]] = Pair(row["id"], json.loads(row["prompt"]), texts, models)
        return found


def _unreadable(path: Path, error: sqlite3.Error) -> str:
    return f"{path} can't be read as labels: {error}; name a file that coati label made"


def _is_empty(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0] == 0


def _setting(db: sqlite3.Connection, name: str) -> int:
    return db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0]


def _holders(db: sqlite3.Connection, now: float, person: Person) -> dict[int, int]:
    """By pair, how many other people have labeled it or hold it."""
    rows = db.execute(
        f"SELECT pair, COUNT(*) AS count FROM latest WHERE person != ? "
        f"AND ({IS_LABELED} OR {IS_OPEN} AND held_until >= ?) GROUP BY pair",
        (person.id, now),
    )
    return {row["pair"]: row["count"] for row in rows}


def _click_key(person: Person, click: str) -> str:
    return f"{person.id}/{click}"


def _is_kept(db: sqlite3.Connection, person: Person, click: str) -> bool:
    return bool(db.execute("SELECT 1 FROM labels WHERE click = ?", (_click_key(person, click),)).fetchone())


def _append(
    db: sqlite3.Connection,
    shown: int,
    choice: str,
    at: float,
    click: str | None = None,
    rating_a: int | None = None,
    rating_b: int | None = None,
    edited: str | None = None,
    comment: str = "",
    seconds: float = 0.0,
) -> None:
    values = (shown, click, choice, rating_a, rating_b, edited, comment, seconds, at)
    db.execute(
        "INSERT INTO labels (shown, click, choice, rating_a, rating_b, edited, comment, seconds, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    )


def _shown(db: sqlite3.Connection, shown: int) -> Shown:
    row = db.execute(
        "SELECT shown.id, pair, is_swapped, first, second, messages, responses FROM shown "
        "JOIN pairs ON pairs.id = pair JOIN items ON items.id = item WHERE shown.id = ?",
        (shown,),
    ).fetchone()
    texts = [json.loads(row["responses"])[row[name]][0] for name in ("first", "second")]
    if row["is_swapped"]:
        texts.reverse()
    before = db.execute(
        f"SELECT choice, rating_a, rating_b, edited, comment FROM labels WHERE shown = ? AND {IS_LABELED} "
        "ORDER BY id DESC LIMIT 1",
        (shown,),
    ).fetchone()
    messages = json.loads(row["messages"])
    return Shown(row["id"], row["pair"], messages, (texts[0], texts[1]), dict(before) if before else {})


def _label(row: sqlite3.Row) -> Label:
    side = row["choice"] if row["choice"] in ("a", "b") else None
    choice = row["choice"]
    if side:
        choice = "first" if (side == "a") != bool(row["is_swapped"]) else "second"
    return Label(row["label"], row["name"], row["pair"], choice, side, row["edited"], row["seconds"])
