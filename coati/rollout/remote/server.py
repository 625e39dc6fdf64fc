"""A generator: takes jobs over HTTP, and does them one after the other with the weights that each names.

    POST   /jobs            a job (`Job`); one that is there already is the same job
    GET    /jobs/ID         its state; with ?seconds=10 as soon as it has ended, or after that time
    GET    /health          the version of the weights, and how many jobs wait

HTTP is served by a thread. The thread that made the service samples: with `run`.
"""

import hmac
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.rollout.remote.journal import read_samples, write_samples
from coati.rollout.sampler import Prompt, Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Prompts to sample from with certain weights.

    Attributes:
        id: the same for the same samples.
        version, weights, checksum: of the weights: number, file and their checksum.
        sampling: fields of a `GenerationConfig`.
        prompts: fields of `Prompt`s.
        file: where the samples go, see `coati.rollout.remote.journal`.
    """

    id: str
    version: int
    weights: str
    checksum: str
    sampling: dict[str, Any]
    prompts: list[dict[str, Any]]
    file: str

    @classmethod
    def of(
        cls,
        id: str,
        version: int,
        weights: Path,
        checksum: str,
        sampling: GenerationConfig,
        prompts: Sequence[Prompt],
        file: Path,
    ) -> "Job":
        """A job as JSON has it."""
        rows = [asdict(prompt) | {"seed": list(prompt.seed)} for prompt in prompts]
        return cls(id, version, str(weights), checksum, asdict(sampling), rows, str(file))


@dataclass
class Progress:
    """What a job has come to: `state` waiting, running, done or failed; then also why, and whether it is a mistake of
    the user's."""

    state: str = "waiting"
    error: str = ""
    is_users: bool = False


@dataclass
class Entry:
    """A job, what it has come to, and what tells that it has ended."""

    job: Job
    progress: Progress = field(default_factory=Progress)
    ended: "Future[None]" = field(default_factory=Future)


class Service:
    """Samples as it is asked to.

    Args:
        sampler: samples with the weights that `load` has loaded.
        load: loads the weights of a file that have a checksum, where those of another checksum, or "", are loaded.
        number: of this generator, for the journal.
    """

    def __init__(self, sampler: Sampler, load: Callable[[Path, str, str], None], number: int = 0):
        self.sampler, self.load, self.number = sampler, load, number
        self.jobs: dict[str, Entry] = {}
        self.waiting: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.version, self.loaded = -1, ""

    def submit(self, job: Job):
        """Puts a job at the end of those that wait."""
        with self.lock:
            if job.id not in self.jobs:
                self.jobs[job.id] = Entry(job)
                self.waiting.put(self.jobs[job.id])

    def run(self):
        """Does jobs, until `stop`."""
        while (entry := self.waiting.get()) is not None:
            progress = entry.progress
            progress.state = "running"
            try:
                self.do(entry.job)
                progress.state = "done"
            except UserError as error:
                progress.state, progress.error, progress.is_users = "failed", str(error), True
            except Exception:  # it is raised where the job came from
                progress.state, progress.error = "failed", traceback.format_exc()
            entry.ended.set_result(None)

    def stop(self):
        self.waiting.put(None)

    def do(self, job: Job):
        """One job, from weights to file."""
        prompts = [Prompt(**row) for row in job.prompts]
        path = Path(job.file)
        if read_samples(path, prompts) is not None:  # another generator was faster than it seemed
            return
        started = time.time()
        if self.loaded != job.checksum:
            before, self.loaded = self.loaded, ""  # what is there if that fails isn't known
            self.load(Path(job.weights), job.checksum, before)
            self.version, self.loaded = job.version, job.checksum
        loaded = time.time()
        sampled = self.sampler.sample(prompts, GenerationConfig(**job.sampling), job.version)
        seconds = {"load": loaded - started, "generate": time.time() - loaded} | sampled.seconds
        told = {"job": job.id, "version": job.version, "weights": job.checksum, "samples": len(prompts)}
        told |= {"generator": self.number, "started": started, "seconds": seconds}
        write_samples(path, told, prompts, sampled.samples)


def application(service: Service, token: str):
    """The HTTP side, as an ASGI application. Every request must carry the token."""
    import asyncio

    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def post_job(request: Request) -> JSONResponse:
        try:
            job = Job(**await request.json())
        except (TypeError, ValueError) as error:
            return JSONResponse({"error": str(error)}, 400)
        service.submit(job)
        return JSONResponse({}, 202)

    async def get_job(request: Request) -> JSONResponse:
        entry = service.jobs.get(request.path_params["id"])
        if entry is None:
            return JSONResponse({"error": "there is no such job"}, 404)
        ended = asyncio.wrap_future(entry.ended)
        await asyncio.wait([ended], timeout=float(request.query_params.get("seconds", 0)))
        return JSONResponse(asdict(entry.progress))

    async def health(request: Request) -> JSONResponse:
        waiting = sum(not entry.ended.done() for entry in service.jobs.values())
        return JSONResponse({"version": service.version, "jobs": waiting})

    routes = [
        Route("/jobs", post_job, methods=["POST"]),
        Route("/jobs/{id}", get_job),
        Route("/health", health),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TokenRequired, token=token)])


class TokenRequired:
    """Answers 401 to requests without `Authorization: Bearer TOKEN`.

    Args:
        refusal: the JSON that it answers.
    """

    def __init__(self, app, token: str, refusal: dict[str, Any] | None = None):
        self.app, self.expected = app, f"Bearer {token}".encode()
        self.refusal = refusal or {"error": "the token is missing or wrong"}

    async def __call__(self, scope, receive, send):
        from starlette.responses import JSONResponse

        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(given, self.expected):
            return await JSONResponse(self.refusal, 401)(scope, receive, send)
        await self.app(scope, receive, send)


def serve_in_thread(service: Service, host: str, token: str) -> int:
    """Serves a service from a thread; returns its port."""
    import socket

    import uvicorn

    listener = socket.create_server((host, 0))
    server = uvicorn.Server(uvicorn.Config(application(service, token), log_level="warning", access_log=False))
    threading.Thread(target=server.run, args=([listener],), daemon=True, name="generator").start()
    return listener.getsockname()[1]
