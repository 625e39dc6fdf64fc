"""Exports of Argilla and Label Studio, as their sources write them, become items and labels."""

import json

import pytest

from coati.cli import main
from coati.label.store import Store


def argilla(prompt: str, one: str, two: str, **responses):
    """As `Record.to_dict` of Argilla 2."""
    fields = {"prompt": prompt, "one": one, "two": two}
    more = {"id": prompt, "metadata": {}, "suggestions": {}, "vectors": {}, "_server_id": None}
    return more | {"fields": fields, "responses": responses}


def studio(prompt: str, one: str, two: str, *annotations):
    """As Label Studio's JSON export has a task."""
    return {"id": 1, "data": {"prompt": prompt, "one": one, "two": two}, "annotations": list(annotations)}


def annotation(value: dict, person=1, kind="pairwise", **more):
    result = {"id": "x", "type": kind, "from_name": "pw", "to_name": "one", "value": value}
    return {"id": 5, "completed_by": person, "was_cancelled": False, "result": [result], "lead_time": 2.0} | more


def imported(folder, tool, rows, *words) -> int:
    (folder / "export.json").write_text(json.dumps(rows))
    arguments = [folder / "export.json", "--from", tool, "--labels", folder / "labels.sqlite"]
    arguments += ["--prompt", "prompt", "--responses", "one", "two", *words]
    return main(["label", "import", *map(str, arguments)])


def found(folder) -> dict[tuple[str, str], str]:
    """Choices by prompt and person."""
    store = Store.open(folder / "labels.sqlite")
    pairs = store.pairs()
    return {(pairs[label.pair].prompt, label.person): label.choice for label in store.labels()}


def test_rankings_and_options_of_argilla(tmp_path, capsys):
    rows = [
        argilla("a", "x", "y", best=[{"value": ["two", "one"], "user_id": "u"}, {"value": "one", "user_id": "v"}]),
        argilla("b", "x", "y", best=[{"value": [{"rank": 2, "value": "one"}, {"rank": 1, "value": "two"}]}]),
        argilla("c", "x", "y", best=[{"value": [{"rank": 1, "value": "one"}, {"rank": 1, "value": "two"}]}]),
        argilla("d", "x", "y", best=[{"value": "neither", "user_id": "u"}]),
        argilla("e", "x", "y", best=[{"value": "one", "user_id": "u", "status": "draft"}]),
        argilla("f", "x", "y"),
    ]
    words = ["--values", "both_bad=neither", "--models", "A", "B"]
    assert imported(tmp_path, "argilla", rows, *words) == 0
    assert found(tmp_path) == {
        ("a", "argilla:u"): "second",
        ("a", "argilla:v"): "first",
        ("b", "argilla:None"): "second",
        ("c", "argilla:None"): "tie",
        ("d", "argilla:u"): "both_bad",
    }
    assert "6 items, 6 of them new; 5 labels, 5 new" in capsys.readouterr().out
    assert imported(tmp_path, "argilla", rows, *words) == 0
    assert "6 items, 0 of them new; 5 labels, 0 new" in capsys.readouterr().out
    assert Store.open(tmp_path / "labels.sqlite").pairs()[1].models == ("A", "B")


def test_pairwise_and_choices_of_label_studio(tmp_path):
    rows = [
        studio("a", "x", "y", annotation({"selected": "left"}), annotation({"selected": "right"}, {"email": "b@c.d"})),
        studio("b", "x", "y", annotation({"choices": ["Equal"]}, kind="choices")),
        studio("c", "x", "y", annotation({"selected": "left"}, was_cancelled=True)),
        studio("d", "x", "y", annotation({}, result=[])),
    ]
    assert imported(tmp_path, "label_studio", rows, "--values", "tie=Equal") == 0
    assert found(tmp_path) == {
        ("a", "label_studio:1"): "first",
        ("a", "label_studio:b@c.d"): "second",
        ("b", "label_studio:1"): "tie",
    }


def test_people_go_on_where_the_import_ends(tmp_path):
    rows = [studio(name, "x", "y", annotation({"selected": "left"})) for name in "ab"]
    assert imported(tmp_path, "label_studio", rows) == 0
    store = Store.open(tmp_path / "labels.sqlite")
    store.add_people(["ana"])
    ana = store.people()[-1]
    assert store.next(ana) is None
    store.set_overlap(2)
    assert store.next(ana).responses in (("x", "y"), ("y", "x"))


GOOD = argilla("good", "x", "y", best=[{"value": "one", "user_id": "u"}])
GOOD_TASK = studio("good", "x", "y", annotation({"selected": "left"}))


@pytest.mark.parametrize(
    ("tool", "rows", "fault"),
    [
        ("argilla", [GOOD, GOOD_TASK], "export.json:2: no record of argilla"),
        ("argilla", [GOOD, {"fields": {"prompt": "a", "one": "x"}}], "export.json:2: no field 'two'"),
        ("argilla", [GOOD, argilla("", "x", "y")], "export.json:2: a prompt is empty"),
        ("argilla", [GOOD, argilla("a", "", "y")], "export.json:2: a response can't be shown"),
        ("argilla", [GOOD, argilla("a", "x", "y", best=[{"value": "three"}])], "export.json:2: 'three' is none of"),
        ("argilla", [GOOD, argilla("a", "x", "y", best=[{"value": 3}])], "export.json:2: a response is neither"),
        ("argilla", [GOOD, argilla("a", "x", "y", best=[{"value": []}])], "export.json:2: a response is neither"),
        ("argilla", [GOOD, argilla("a", "x", "y", best=["one"])], "export.json:2: a response has no `value`"),
        ("argilla", [GOOD, argilla("a", "x", "y", best=[], more=[])], "export.json:2: several questions, best, more"),
        ("argilla", [GOOD, GOOD], "two labels of argilla:u"),
        ("label_studio", [GOOD_TASK, GOOD], "export.json:2: no record of label_studio"),
        ("label_studio", [GOOD_TASK, {"data": GOOD_TASK["data"]}], "export.json:2: no `annotations`"),
        (
            "label_studio",
            [GOOD_TASK, studio("a", "x", "y", annotation({"choices": ["A", "B"]}, kind="choices"))],
            "export.json:2: an annotation has not one choice",
        ),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_made(tmp_path, capsys, tool, rows, fault):
    assert imported(tmp_path, tool, rows) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert not (tmp_path / "labels.sqlite").exists()


def test_words_for_values_are_checked(tmp_path, capsys):
    assert imported(tmp_path, "argilla", [GOOD], "--values", "third=A") == 2
    assert "--values has 'third=A'" in capsys.readouterr().err
