"""The pages over HTTP: who gets in, what may be sent, what comes back."""

import asyncio
import json
import re

import pytest
from starlette.testclient import TestClient

import coati.label.application as app_module
from coati.label.application import PAGE, application, person_with
from coati.label.items import Item, Response
from tests.label.world import store_with

SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def world(tmp_path):
    """Store, client, and the folders of the owner's, ana's and ben's links."""
    store, people = store_with(tmp_path, 3, ("ana", "ben"), overlap=2)
    client = TestClient(application(store))
    return store, client, *(f"/{person.token}" for person in (store.people()[0], *people))


def body(shown: int, **changes):
    return {"id": "0123456789abcdef", "shown": shown, "choice": "a"} | changes


def test_without_a_token_nobody_gets_in(world):
    store, client, _, ana, _ = world
    wrong = ["", "/x", ana[:-1], ana + "x", "/%00", "/é", "/..", f"/{ana[1:]}"[:-2] + "//"]
    for start in wrong:
        for path in ("/", "/label.js", "/next", "/overview.json"):
            for method in ("GET", "POST"):
                answer = client.request(method, start + path, follow_redirects=False)
                assert answer.status_code == 401, (method, start + path)
                assert answer.json() == {"error": "this link is not valid; ask for a new one"}
    assert store.labels() == [] and store.progress()["pairs"] == 3


def test_every_token_is_compared_whole(world):
    store, *_ = world
    people = store.people()
    assert [person_with(person.token, people) for person in people] == people
    assert person_with("", people) is None and person_with("é" * 32, people) is None


def test_the_owner_sees_results_and_others_label(world):
    _, client, owner, ana, _ = world
    assert "overview.js" in client.get(owner + "/").text
    assert "label.js" in client.get(ana + "/").text
    assert client.get(owner + "/overview.json").json()["progress"]["wanted"] == 6
    assert client.get(ana + "/overview.json").status_code == 403
    assert client.post(owner + "/next").status_code == 403
    assert client.post(owner + "/label", json=body(1)).status_code == 403
    assert client.get(ana + "/../store.py").status_code in (401, 404)
    assert client.get(ana + "/store.py").status_code == 404


def test_a_click_is_kept_once_and_the_next_pair_comes_back(world):
    store, client, owner, ana, ben = world
    first = client.post(ana + "/next").json()
    assert first["name"] == "ana" and first["progress"]["yours"] == 0
    assert "model" not in str(first)  # which model a response is from
    sent = body(first["pair"]["id"], rating_a=5, comment="fine", edited="better", seconds=1.5)
    second = client.post(ana + "/label", json=sent).json()
    assert second["pair"]["id"] != first["pair"]["id"] and second["progress"]["yours"] == 1
    assert client.post(ana + "/label", json=sent).json() == second
    changed = sent | {"id": "another-click", "choice": "b"}
    assert client.post(ana + "/label", json=changed).status_code == 409
    assert client.post(ben + "/label", json=changed).status_code == 409
    [label] = store.labels()
    assert (label.side, label.edited, label.seconds) == ("a", "better", 1.5)
    undone = client.post(ana + "/undo", json={"id": "undo-0001"}).json()
    assert undone["pair"]["id"] == first["pair"]["id"]
    before = {"choice": "a", "rating_a": 5, "rating_b": None, "edited": "better", "comment": "fine"}
    assert undone["pair"]["before"] == before
    assert client.post(ana + "/undo", json={"id": "undo-0002"}).status_code == 409
    people = client.get(owner + "/overview.json").json()["people"]
    assert [(row["name"], row["labels"]) for row in people] == [("ana", 0), ("ben", 0)]


@pytest.mark.parametrize(
    "changes",
    [
        {"id": None},
        {"id": "short"},
        {"shown": "1"},
        {"shown": True},
        {"shown": -1},
        {"shown": 1 << 70},
        {"choice": "c"},
        {"choice": "undo"},
        {"choice": ["a"]},
        {"rating_a": 0},
        {"rating_b": 6},
        {"rating_b": True},
        {"rating_b": "3"},
        {"edited": ""},
        {"edited": "x", "choice": "tie"},
        {"edited": "\ud800"},
        {"comment": 3},
        {"comment": "x" * 10_001},
        {"comment": "\ud800"},
        {"seconds": -1},
        {"seconds": "1"},
        {"seconds": True},
    ],
)
def test_a_wrong_click_is_refused_and_nothing_kept(world, changes):
    store, client, _, ana, _ = world
    shown = client.post(ana + "/next").json()["pair"]["id"]
    answer = client.post(ana + "/label", content=json.dumps(body(shown) | changes))
    assert answer.status_code == 400 and answer.json()["error"]
    assert store.labels() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"seconds": NaN}', b"[" * 100_000])
def test_what_is_no_object_is_refused(world, content):
    _, client, _, ana, _ = world
    assert client.post(ana + "/label", content=content).status_code == 400


def test_a_body_has_a_limit_whatever_its_header_says(world):
    _, client, _, ana, _ = world
    assert client.post(ana + "/label", content=b"x" * ((1 << 20) + 1)).status_code == 413

    def chunks():
        for _ in range(20):
            yield b"x" * (1 << 16)

    assert client.post(ana + "/label", content=chunks()).status_code == 413


def test_a_body_that_does_not_come_ends_in_408(world, monkeypatch):
    """The limit is 0 seconds here; the rest of the request never comes."""
    store, _, _, ana, _ = world
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.0)
    sent = []

    async def receive():
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": ana + "/label", "headers": [], "query_string": b""}
    asyncio.run(application(store)(scope, receive, send))
    assert sent[0]["status"] == 408


def test_headers_keep_scripts_of_others_out(world):
    _, client, owner, ana, _ = world
    for path in (ana + "/", ana + "/label.js", ana + "/missing", "/wrong/", owner + "/overview.json"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert "http" not in policy and "*" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"


def test_texts_are_data_and_never_part_of_a_page(tmp_path):
    store, [ana] = store_with(tmp_path, 0, ("ana",))
    messages = [{"role": "user", "content": SCRIPT}]
    store.add_items([Item("x", SCRIPT, messages, (Response(SCRIPT + "1"), Response(SCRIPT + "2")))])
    client = TestClient(application(store))
    answer = client.post(f"/{ana.token}/next")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["pair"]["messages"] == messages
    assert "onerror" not in client.get(f"/{ana.token}/").text


def test_the_page_is_whole_and_from_here():
    """No inline script or style, no other host, nothing that reads HTML, and every file that it names is there."""
    for page in PAGE.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|<style|https?:", text)
        for name in re.findall(r'(?:src|href)="([^"]+)"', text):
            assert name in ("data:,", "colors.css") or (PAGE / name).is_file()
    for script in PAGE.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|https?:", text)
        ids = set(re.findall(r'\$\("([^"]+)"\)', text))
        page = PAGE / script.with_suffix(".html").name
        assert ids and all(f'id="{name}"' in page.read_text(encoding="utf-8") for name in ids)


def test_the_package_has_its_page():
    """Also where it is installed from a wheel."""
    from tests.conftest import ROOT

    assert '"coati.label": ["page/*"]' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert {path.name for path in PAGE.iterdir()} == {
        *("label.html", "label.css", "label.js"),
        *("overview.html", "overview.js"),
    }
