"""The HTTP side of `coati serve`: OpenAI's API, as an ASGI application.

GET    /v1/models                names of the models
POST   /v1/chat/completions      a conversation goes on
POST   /v1/completions           prompts go on, or are scored
GET    /health                   200, or 503 while the server drains
GET    /metrics                  for Prometheus
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from coati.rollout.remote.server import TokenRequired
from coati.serve.metrics import metrics_page
from coati.serve.protocol import (
    ApiError,
    Choice,
    Wanted,
    chat_choice,
    chat_delta,
    completion_choice,
    new_head,
    read_chat,
    read_completion,
    refused,
    usage_of,
)
from coati.serve.worker import Closed, Failure, QueueFull, Scoring, Stream, Worker

STARTED = int(time.time())


class Service:
    """Answers requests with the models of workers.

    Args:
        workers: by the models' names.
        max_body: of a request, in bytes.

    Attributes:
        open: requests that are being answered.
        draining: whether new ones are refused.
    """

    def __init__(self, workers: dict[str, Worker], max_body: int):
        self.workers, self.max_body = workers, max_body
        self.open, self.draining = 0, False
        self.counts: dict[tuple[str, int], int] = {}

    def close(self):
        """Ends the workers' threads after what was submitted."""
        for worker in self.workers.values():
            worker.close()

    # --- routes

    async def models(self, request: Request) -> Response:
        entries = [
            {"id": name, "object": "model", "created": STARTED, "owned_by": "coati", "max_model_len": worker.max_length}
            for name, worker in self.workers.items()
        ]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": entries})
        found = [entry for entry in entries if entry["id"] == name]
        return JSONResponse(found[0]) if found else refusal(self.no_such_model(name))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "draining" if self.draining else "ok"}, 503 if self.draining else 200)

    async def metrics(self, request: Request) -> Response:
        return metrics_page(self)

    async def chat(self, request: Request) -> Response:
        return await self.answer("/v1/chat/completions", request, self.begin_chat)

    async def completions(self, request: Request) -> Response:
        return await self.answer("/v1/completions", request, self.begin_completions)

    # --- a request from its body to its response

    async def answer(self, route: str, request: Request, begin: Callable) -> Response:
        """Reads a request and begins it; whatever happens to it, its slots are free afterwards."""
        try:
            if self.draining:
                raise ApiError(503, "The server is shutting down")
            job = await begin(await read_json(request, self.max_body))
            if job.wanted.stream:
                response: Response = JobStream(job, self.count, route)
            else:
                response = JSONResponse(await self.whole(job, request))
        except ApiError as error:
            response = refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if not isinstance(response, JobStream):
            self.count(route, response.status_code)
        return response

    def count(self, route: str, status: int):
        self.counts[route, status] = self.counts.get((route, status), 0) + 1

    async def whole(self, job: "Job", request: Request) -> dict[str, Any]:
        """The response of a request that is not a stream; ends early where the client leaves."""
        with job:
            work, left = asyncio.ensure_future(job.result()), asyncio.ensure_future(disconnected(request))
            try:
                await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                return work.result()
            finally:
                work.cancel()
                left.cancel()

    def worker_of(self, name: str) -> Worker:
        if name not in self.workers:
            raise self.no_such_model(name)
        return self.workers[name]

    def no_such_model(self, name: str) -> ApiError:
        return ApiError(
            404, f"The model {name!r} does not exist: /v1/models lists those that do", "model", "model_not_found"
        )

    async def begin_chat(self, body: Any) -> "Job":
        chat = read_chat(body)
        worker = self.worker_of(chat.wanted.model)
        prompt = await asyncio.to_thread(worker.chat_prompt, chat.messages)
        return ChatJob(self, worker, chat.wanted, [prompt])

    async def begin_completions(self, body: Any) -> "Job":
        completion = read_completion(body)
        worker = self.worker_of(completion.wanted.model)
        prompts = []
        for prompt in completion.prompts:
            prompts.append(await asyncio.to_thread(worker.encode, prompt) if isinstance(prompt, str) else prompt)
        texts = [prompt if isinstance(prompt, str) else None for prompt in completion.prompts]
        return CompletionJob(self, worker, completion.wanted, prompts, texts if completion.echo else None)

    def collect(self) -> Iterator[Metric]:
        """Figures for Prometheus."""
        figures = [
            (GaugeMetricFamily, "coati_requests_waiting", "choices that wait for a slot", lambda w: len(w.waiting)),
            (GaugeMetricFamily, "coati_requests_running", "choices being generated", lambda w: len(w.running)),
            (GaugeMetricFamily, "coati_slots", "choices that can be generated together", lambda w: w.slots),
            (CounterMetricFamily, "coati_prompt_tokens", "tokens of prompts", lambda w: w.prompt_tokens),
            (CounterMetricFamily, "coati_generated_tokens", "tokens of ended responses", lambda w: w.generated_tokens),
        ]
        for family, name, text, value in figures:
            of_models = family(name, text, labels=["model"])
            for model, worker in self.workers.items():
                of_models.add_metric([model], value(worker))
            yield of_models
        yield GaugeMetricFamily("coati_http_requests_open", "requests in progress", self.open)
        requests = CounterMetricFamily("coati_http_requests", "requests by their status", labels=["route", "status"])
        for (route, status), count in self.counts.items():
            requests.add_metric([route, str(status)], count)
        yield requests


class Job:
    """A request in progress. While it is entered, it is one of the service's open ones; when it is left, whatever of it
    is not finished is canceled.

    Args:
        prompts: of each, `wanted.n` choices are wanted.
    """

    def __init__(self, service: Service, worker: Worker, wanted: Wanted, prompts: list[list[int]]):
        self.service, self.worker, self.wanted, self.prompts = service, worker, wanted, prompts
        self.pieces: asyncio.Queue[Choice | Failure] = asyncio.Queue()
        self.streams: list[Stream] = []
        if wanted.max_tokens != 0:
            for i, prompt in enumerate(prompts):
                self.streams += worker.streams(prompt, wanted, self.emitter(self.pieces), i * wanted.n)
        self.scorings: list[Scoring] = []

    def emitter(self, pieces: asyncio.Queue) -> Callable:
        """Hands what comes from the worker's thread to this one."""
        loop = asyncio.get_running_loop()
        return lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)

    def submit(self):
        """Raises ApiError where the worker takes no more."""
        items, most = [*self.scorings, *self.streams], self.worker.max_queue + self.worker.slots
        if len(items) > most:
            raise refused("n", f"and the prompts make {len(items)} choices: this server takes {most} at a time")
        try:
            self.worker.submit(items)
        except QueueFull:
            raise ApiError(429, "Too many requests are waiting: try again later", code="queue_full") from None
        except Closed:
            raise ApiError(503, "The server is shutting down") from None

    def __enter__(self):
        self.submit()
        self.service.open += 1

    def __exit__(self, *_):
        self.worker.cancel([*self.scorings, *self.streams])
        self.service.open -= 1

    async def choices(self) -> AsyncIterator[Choice]:
        """Pieces of choices as they come."""
        left = len(self.streams)
        while left:
            piece = await self.pieces.get()
            if isinstance(piece, Failure):
                raise ApiError(500, f"The model has failed: {piece.message}")
            left -= piece.finish_reason is not None
            yield piece

    async def gathered(self) -> list[Choice]:
        """Whole choices."""
        whole = [Choice(i) for i in range(len(self.prompts) * self.wanted.n)]
        async for piece in self.choices():
            choice = whole[piece.index]
            choice.text += piece.text
            choice.tokens += piece.tokens
            choice.finish_reason = piece.finish_reason
        return whole

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(sum(map(len, self.prompts)), sum(stream.tokens for stream in self.streams))

    async def result(self) -> dict[str, Any]:
        """The JSON of the whole response."""
        raise NotImplementedError

    def chunk_head(self) -> dict[str, Any]:
        """What the chunks of a stream share."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """Choices of the chunks that come before there are tokens."""
        return []

    def chunk(self, piece: Choice) -> dict[str, Any]:
        """The choice of a chunk."""
        raise NotImplementedError


class ChatJob(Job):
    """A request to /v1/chat/completions."""

    async def result(self) -> dict[str, Any]:
        choices = [chat_choice(choice, self.wanted.log_probs) for choice in await self.gathered()]
        head = new_head("chat.completion", "chatcmpl", self.wanted.model)
        return {**head, "choices": choices, "usage": self.usage}

    def chunk_head(self) -> dict[str, Any]:
        return new_head("chat.completion.chunk", "chatcmpl", self.wanted.model)

    def opening(self) -> list[dict[str, Any]]:
        return [chat_delta(Choice(stream.index), False, is_first=True) for stream in self.streams]

    def chunk(self, piece: Choice) -> dict[str, Any]:
        return chat_delta(piece, self.wanted.log_probs, is_first=False)


class CompletionJob(Job):
    """A request to /v1/completions.

    Args:
        echoed: the prompts' texts, None for one that came as ids; None if they are not wanted back.
    """

    def __init__(
        self,
        service: Service,
        worker: Worker,
        wanted: Wanted,
        prompts: list[list[int]],
        echoed: Sequence[str | None] | None,
    ):
        super().__init__(service, worker, wanted, prompts)
        self.echoed, self.offsets = echoed, [0] * (len(prompts) * wanted.n)
        self.scored: asyncio.Queue[list | Failure] = asyncio.Queue()
        if echoed is not None and wanted.log_probs:
            emit = self.emitter(self.scored)
            self.scorings = [worker.scoring(prompt, wanted, emit, i) for i, prompt in enumerate(prompts)]

    async def result(self) -> dict[str, Any]:
        scores = []
        for _ in self.scorings:  # in the order of prompts, as they were submitted
            tokens = await self.scored.get()
            if isinstance(tokens, Failure):
                raise ApiError(500, f"The model has failed: {tokens.message}")
            scores.append(tokens)
        whole = await self.gathered()
        for choice in whole:
            prompt = choice.index // self.wanted.n
            choice.finish_reason = choice.finish_reason or "length"
            if self.echoed is not None:
                text = self.echoed[prompt]
                choice.text = (self.worker.decode(self.prompts[prompt]) if text is None else text) + choice.text
            if scores:
                choice.tokens = scores[prompt] + choice.tokens
        choices = [completion_choice(choice, self.wanted.log_probs) for choice in whole]
        head = new_head("text_completion", "cmpl", self.wanted.model)
        return {**head, "choices": choices, "usage": self.usage}

    def chunk_head(self) -> dict[str, Any]:
        return new_head("text_completion", "cmpl", self.wanted.model)

    def chunk(self, piece: Choice) -> dict[str, Any]:
        offset = self.offsets[piece.index]
        self.offsets[piece.index] += len(piece.text)
        return completion_choice(piece, self.wanted.log_probs and bool(piece.tokens), offset)


class JobStream(StreamingResponse):
    """A job's chunks as server-sent events. It is submitted before the status is sent, so that it may be refused."""

    def __init__(self, job: Job, count: Callable[[str, int], None], route: str):
        self.job, self.count, self.route = job, count, route
        super().__init__(self.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def __call__(self, scope, receive, send):
        try:
            with self.job:
                self.count(self.route, 200)
                await super().__call__(scope, receive, send)
        except ApiError as error:  # it was not taken
            self.count(self.route, error.status)
            await refusal(error)(scope, receive, send)

    async def events(self) -> AsyncIterator[str]:
        job = self.job
        head = job.chunk_head()
        usage = {"usage": None} if job.wanted.with_usage else {}
        try:
            for choice in job.opening():
                yield event({**head, "choices": [choice], **usage})
            async for piece in job.choices():
                yield event({**head, "choices": [job.chunk(piece)], **usage})
            if job.wanted.with_usage:
                yield event({**head, "choices": [], "usage": job.usage})
        except ApiError as error:
            yield event(error.body())
        yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def refusal(error: ApiError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


async def read_json(request: Request, max_body: int) -> Any:
    """A request's body.

    Raises:
        ApiError: it is too long, or no JSON.
    """
    too_long = ApiError(413, f"The body is longer than {max_body} bytes (--max_body)", code="body_too_long")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > max_body:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body:
            raise too_long
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is no valid JSON") from None


async def disconnected(request: Request):
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def failed(request: Request, error: Exception) -> Response:
    return refusal(ApiError(500, "The server has failed: its log says how"))


async def not_found(request: Request, error: Exception) -> Response:
    return refusal(ApiError(404, f"There is no {request.method} {request.url.path} here"))


def application(service: Service, token: str | None) -> Starlette:
    """The ASGI application; with a token, every request must carry it."""
    routes = [
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    wrong = ApiError(401, "The API key is missing or wrong", code="invalid_api_key").body()
    middleware = [Middleware(TokenRequired, token=token, refusal=wrong)] if token else []
    handlers = {404: not_found, 405: not_found, 500: failed}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
