"""The HTTP side of `coati label`.

    GET   /TOKEN/                the page, for a person; the overview, for the owner
    GET   /TOKEN/label.js, ...   its files
    POST  /TOKEN/next            the pair in front of the person, and the progress
    POST  /TOKEN/label           keeps a click; then as next
    POST  /TOKEN/undo            opens the last pair again; then as next
    GET   /TOKEN/overview.json   what has come of it; the owner's

Everything else, and everything without the token of somebody, is 401.
"""

import asyncio
import hmac
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from coati.label.items import is_unicode, text_fault
from coati.label.results import agreement, by_person, outcomes, wins_by_model
from coati.label.store import CHOICES, RATINGS, Click, Conflict, Person, Store
from coati.tracking.style import COLORS

PAGE = Path(__file__).parent / "page"
FILES = ("label.css", "label.js", "overview.js")
BODY = 1 << 20  # bytes of a request
BODY_SECONDS = 20.0  # in which it must have come
MOST_COMMENT = 10_000  # characters
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def application(store: Store) -> Starlette:
    """The pages of a file of labels, as an ASGI application."""

    async def page(request: Request) -> Response:
        person: Person = request.state.person
        return FileResponse(PAGE / ("overview.html" if person.is_owner else "label.html"))

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if name == "colors.css":
            return Response(COLORS, media_type="text/css")
        if name not in FILES:
            raise HTTPException(404, "there is no such page")
        return FileResponse(PAGE / name)

    async def next(request: Request) -> Response:
        return await run_in_threadpool(state_of, store, annotator(request))

    async def label(request: Request) -> Response:
        person, click = annotator(request), read_click(await read_object(request))
        await run_in_threadpool(store.label, person, click)
        return await run_in_threadpool(state_of, store, person)

    async def undo(request: Request) -> Response:
        person, body = annotator(request), await read_object(request)
        await run_in_threadpool(store.undo, person, read_id(body))
        return await run_in_threadpool(state_of, store, person)

    async def overview(request: Request) -> Response:
        if not request.state.person.is_owner:
            raise HTTPException(403, "the overview is the owner's")
        return JSONResponse(await run_in_threadpool(overview_of, store))

    routes = [
        Route("/{token}/", page),
        Route("/{token}/next", next, methods=["POST"]),
        Route("/{token}/label", label, methods=["POST"]),
        Route("/{token}/undo", undo, methods=["POST"]),
        Route("/{token}/overview.json", overview),
        Route("/{token}/{file}", file),
    ]
    handlers: Any = {HTTPException: refused, Conflict: conflict}
    middleware = [Middleware(SafeHeaders), Middleware(TokenRequired, store=store)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class SafeHeaders:
    """Adds `HEADERS` to every response."""

    def __init__(self, app: Any):
        self.app = app
        self.headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


class TokenRequired:
    """Answers 401 unless the path begins with somebody's token."""

    def __init__(self, app: Any, store: Store):
        self.app, self.store = app, store

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            people = await run_in_threadpool(self.store.people)
            person = person_with(scope["path"].split("/")[1], people)
            if person is None:
                response = JSONResponse({"error": "this link is not valid; ask for a new one"}, 401)
                return await response(scope, receive, send)
            scope.setdefault("state", {})["person"] = person
        await self.app(scope, receive, send)


def person_with(token: str, people: Sequence[Person]) -> Person | None:
    """Whose token it is, in a time that doesn't depend on how much of it is right."""
    given = token.encode(errors="replace")
    matches = [person for person in people if hmac.compare_digest(person.token.encode(), given)]
    return matches[0] if matches else None


def annotator(request: Request) -> Person:
    if request.state.person.is_owner:
        raise HTTPException(403, "the owner's link shows the overview; give yourself a link with --people to label")
    return request.state.person


async def refused(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def conflict(request: Request, error: Conflict) -> Response:
    return JSONResponse({"error": str(error)}, 409)


async def read_object(request: Request) -> dict[str, Any]:
    """The request's body, a JSON object."""
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > BODY:
                raise HTTPException(413, f"more than {BODY} bytes", {"Connection": "close"})

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
        value = json.loads(bytes(body))
    except asyncio.TimeoutError:
        raise HTTPException(408, "the request came too slowly", {"Connection": "close"}) from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not valid JSON") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "the request is no object")
    return value


def read_id(body: dict[str, Any]) -> str:
    click = body.get("id")
    if not isinstance(click, str) or not 8 <= len(click) <= 64 or not click.isascii():
        raise HTTPException(400, "`id` is not 8 to 64 characters")
    return click


def read_click(body: dict[str, Any]) -> Click:
    """A click, checked."""
    shown, choice, edited, comment = (body.get(name) for name in ("shown", "choice", "edited", "comment"))
    if type(shown) is not int or not 0 < shown < 1 << 62:  # a bool is an int, too
        raise HTTPException(400, "`shown` is no number of a pair")
    if choice not in (*CHOICES, "skip"):
        raise HTTPException(400, f"`choice` is none of {', '.join(CHOICES)} and skip")
    if edited is not None:
        if choice not in ("a", "b"):
            raise HTTPException(400, "`edited` goes with the choice a or b")
        if fault := text_fault(edited):
            raise HTTPException(400, f"the edited response can't be kept: {fault}")
    comment = "" if comment is None else comment
    if not isinstance(comment, str) or len(comment) > MOST_COMMENT or not is_unicode(comment):
        raise HTTPException(400, f"`comment` is no text of up to {MOST_COMMENT} characters")
    ratings = [body.get("rating_a"), body.get("rating_b")]
    if any(rating is not None and (type(rating) is not int or rating not in RATINGS) for rating in ratings):
        raise HTTPException(400, "a rating is none of 1 to 5")
    seconds = body.get("seconds", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds <= 1e6:
        raise HTTPException(400, "`seconds` is no number from 0 to a million")
    return Click(read_id(body), shown, choice, *ratings, edited, comment, float(seconds))


def state_of(store: Store, person: Person) -> Response:
    """What the page of a person shows. It doesn't say which models the responses are from."""
    shown = store.next(person)
    pair = None if shown is None else asdict(shown)
    return JSONResponse({"name": person.name, "pair": pair, "progress": store.progress(person)})


def overview_of(store: Store) -> dict[str, Any]:
    """What the owner's page shows."""
    labels, pairs = store.labels(), store.pairs()
    decided = outcomes(labels)
    counts = {name: 0 for name in ("decided", "tie", "both_bad", "split")}
    for outcome in decided.values():
        counts["decided" if outcome.choice in ("first", "second") else outcome.choice] += 1
    names = [person.name for person in store.people() if not person.is_owner]
    return {
        "progress": store.progress(),
        "outcomes": counts,
        "people": by_person(labels, store.skipped(), names),
        "agreement": agreement(labels),
        "models": wins_by_model(decided, pairs),
    }
