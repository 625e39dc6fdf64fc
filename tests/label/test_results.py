"""Outcomes, wins and agreement, by hand-made labels."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.intervals import wilson_interval
from coati.label.results import VALUES, Outcome, agreement, by_person, outcomes, wins_by_model
from coati.label.store import Label, Pair
from tests.oracles.agreement import cohens_kappa, krippendorffs_alpha


def labels(*rows: tuple[str, int, str], edits: dict[int, str] | None = None) -> list[Label]:
    """From person, pair and choice; edited texts by position."""
    sides = {"first": "a", "second": "b"}
    edits = edits or {}
    return [
        Label(i, person, pair, choice, sides.get(choice), edits.get(i), 2.0 + i)
        for i, (person, pair, choice) in enumerate(rows)
    ]


def pair(number: int, *models: str) -> Pair:
    return Pair(number, f"prompt {number}", ("one", "two"), (models[0], models[1]))


def test_an_outcome_needs_more_than_half():
    given = labels(
        *[("ana", 1, "first"), ("ben", 1, "first"), ("cy", 1, "second")],
        *[("ana", 2, "first"), ("ben", 2, "second")],
        *[("ana", 3, "tie"), ("ben", 3, "first"), ("cy", 3, "second")],
        *[("ana", 4, "both_bad"), ("ben", 5, "tie")],
    )
    choices = {pair: outcome.choice for pair, outcome in outcomes(given).items()}
    assert choices == {1: "first", 2: "split", 3: "split", 4: "both_bad", 5: "tie"}


def test_the_newest_edit_of_the_winner_counts():
    rows = [("ana", 1, "first"), ("ben", 1, "first"), ("cy", 1, "second")]
    found = outcomes(labels(*rows, edits={0: "older", 1: "newer", 2: "of the loser"}))
    assert found == {1: Outcome("first", "newer")}


def test_wins_are_between_two_models_and_have_an_interval():
    pairs = {
        1: pair(1, "A", "B"),
        2: pair(2, "B", "A"),
        3: pair(3, "A", "A"),
        4: pair(4, "A", ""),
        5: pair(5, "A", "C"),
    }
    decided = {1: "first", 2: "second", 3: "first", 4: "first", 5: "tie"}
    rows = wins_by_model({number: Outcome(choice) for number, choice in decided.items()}, pairs)
    assert [(row["model"], row["wins"], row["losses"], row["rest"]) for row in rows] == [
        ("A", 2, 0, 1),
        ("B", 0, 2, 0),
        ("C", 0, 0, 1),
    ]
    assert (rows[0]["low"], rows[0]["high"]) == wilson_interval(1.0, 2)
    assert rows[2]["share"] is rows[2]["low"] is None


def test_wilsons_interval_is_that_of_tables():
    """Of 5 in 10 and of 0 in 10, by the closed form with z = 1.96."""
    assert wilson_interval(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson_interval(0.0, 20)[0] == 0.0  # not a little less by rounding, which is shown as -0.0 %


def test_people_are_counted():
    rows = [("ana", 1, "first"), ("ana", 2, "second"), ("ana", 3, "tie"), ("ben", 1, "second")]
    ana, ben, cy = by_person(labels(*rows), {"ben": 2}, ["ana", "ben", "cy"])
    assert ana == {"name": "ana", "labels": 3, "skipped": 0, "seconds": 3.0, "left": 0.5}
    assert ben == {"name": "ben", "labels": 1, "skipped": 2, "seconds": 5.0, "left": 0.0}
    assert cy == {"name": "cy", "labels": 0, "skipped": 0, "seconds": None, "left": None}


UNITS = st.lists(
    st.dictionaries(st.sampled_from(("ana", "ben", "cy")), st.sampled_from(VALUES), min_size=1), min_size=1, max_size=12
)


@given(UNITS)
def test_agreement_equals_the_slow_definitions(units):
    rows = [(name, number, choice) for number, unit in enumerate(units) for name, choice in unit.items()]
    found = agreement(labels(*rows))
    compared = [unit for unit in units if len(unit) > 1]
    pairs = [a == b for unit in compared for a, b in permutations(unit.values(), 2)]
    assert found["pairs"] == len(compared)
    assert found["share"] == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)
    people = {name for unit in compared for name in unit}
    different = {choice for unit in compared for choice in unit.values()}
    if len(different) < 2:
        assert found["kappa"] is found["alpha"] is None and found["missing"]
        return
    if found["kappa"] is not None:
        assert len(people) == 2
        assert found["kappa"] == pytest.approx(
            cohens_kappa([tuple(unit[n] for n in sorted(people)) for unit in compared])
        )
    if found["alpha"] is not None:
        assert found["alpha"] == pytest.approx(krippendorffs_alpha([list(unit.values()) for unit in compared]))


def test_kappa_of_two_people():
    """0.4 of Cohen's kappa by hand: 70 of 100 agree, half would by chance."""
    pytest.importorskip("sklearn")
    choices = [("first", "first")] * 35 + [("second", "second")] * 35
    choices += [("first", "second")] * 15 + [("second", "first")] * 15
    rows = [(name, i, choice) for i, both in enumerate(choices) for name, choice in zip(("a", "b"), both, strict=True)]
    assert agreement(labels(*rows))["kappa"] == pytest.approx(0.4)


def test_alpha_of_people_who_agree_as_by_chance_and_in_all():
    pytest.importorskip("krippendorff", reason='it comes with pip install "coati[label]"')
    same = [(name, i, "first" if i % 2 else "tie") for i in range(6) for name in ("ana", "ben", "cy")]
    assert agreement(labels(*same))["alpha"] == pytest.approx(1.0)
    apart = [(name, i, choice) for i in range(6) for name, choice in (("ana", "first"), ("ben", "second"))]
    assert agreement(labels(*apart))["alpha"] == pytest.approx(1 - 1 / (6 / 11))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("coati.label.results.find_spec", lambda name: None)
    found = agreement(labels(("ana", 1, "first"), ("ben", 1, "second")))
    assert found["share"] == 0.0 and found["kappa"] is found["alpha"] is None
    assert found["missing"] == 'for kappa and alpha: pip install "coati[label]"'
