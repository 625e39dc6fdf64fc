"""`coati serve-reward`: rewards behind the HTTP protocol that the reward type `http` speaks.

POST   /score       {"prompts", "responses", "columns", "input_ids", "response_masks"} -> {"rewards", "by_reward"}
GET    /health      200, or 503 while the server drains
GET    /metrics     for Prometheus

Requests that wait are scored together, up to `max_batch` responses at a time. HTTP is served by the event loop, and a
thread of its own scores.
"""

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coati.config import ListOf, Settings, option, parse_config, settings
from coati.errors import UserError
from coati.listening import listen
from coati.rewards import Reward, Scorer, ScoringConfig
from coati.rewards.config import AnyReward, ModelRewardSettings, ProcessRewardSettings, load_rewards
from coati.rollout.remote.server import TokenRequired
from coati.samples import Sample
from coati.serve.application import read_json
from coati.serve.metrics import metrics_page
from coati.serve.protocol import ApiError
from coati.serve.server import TOKEN, check_address, run

logger = logging.getLogger(__name__)
DESCRIPTION = "rewards behind HTTP, for runs elsewhere: a reward of type http reads them"
TOKENS_AT_A_TIME = 2**14  # of a reward model's forward pass, padding included


@settings
class ServeRewardConfig(Settings):
    """Settings of `coati serve-reward`."""

    rewards: ListOf[AnyReward] = option((), "what is served, written as for training; see docs/rewards.md")
    host: str = option("127.0.0.1", "address to listen on; this machine only if not given")
    port: int = option(8100, "0 for any that is free", ge=0, le=65535)
    token: str | None = option(None, f"that clients must send; the variable {TOKEN} if not given")
    max_batch: int = option(256, "responses that are scored together", ge=1)
    max_queue: int = option(4096, "responses that may wait; requests beyond get status 429", ge=1)
    max_body: int = option(64 * 2**20, "bytes of a request", ge=1)
    reward_workers: int = option(1, "processes for rewards that look at one response at a time; 0 for none", ge=0)
    reward_timeout: float = option(60.0, "seconds that such a process may take for a response", gt=0)
    reward_failure_score: float = option(0.0, "the score of a response that such a reward fails for")


class QueueFull(Exception):
    """No more responses may wait."""


class Closed(Exception):
    """The service takes no more."""


@dataclass
class Job:
    """The responses of a request, and who waits for their scores."""

    samples: list[Sample]
    done: "Future[dict[str, Any]]" = field(default_factory=Future)


class RewardService:
    """Scores what is submitted, in a thread of its own.

    Attributes:
        open: requests that are being answered; draining: whether new ones are refused.
        scored, failed: responses that were, and requests that could not be.
    """

    def __init__(self, scorer: Scorer, max_batch: int = 256, max_queue: int = 4096, max_body: int = 2**26):
        self.scorer, self.max_batch, self.max_queue, self.max_body = scorer, max_batch, max_queue, max_body
        self.open, self.draining = 0, False
        self.scored = self.failed = 0
        self.condition = threading.Condition()
        self.waiting: deque[Job] = deque()
        self.closed = False
        self.thread = threading.Thread(target=self.run, daemon=True, name="rewards")
        self.thread.start()

    def submit(self, samples: list[Sample]) -> Job:
        """Puts a request at the end of those that wait.

        Raises:
            QueueFull: too many responses wait.
            Closed: `close` was called.
        """
        job = Job(samples)
        with self.condition:
            if self.closed:
                raise Closed
            if self.waiting and self.number_waiting() + len(samples) > self.max_queue:
                raise QueueFull
            self.waiting.append(job)
            self.condition.notify()
        return job

    def number_waiting(self) -> int:
        return sum(len(job.samples) for job in self.waiting)

    def close(self):
        """Takes no more, and ends the thread after what was submitted."""
        with self.condition:
            self.closed = True
            self.condition.notify()

    def run(self):
        while (jobs := self.next_jobs()) is not None:
            try:
                self.score(jobs)
            except Exception as error:
                if len(jobs) == 1:
                    self.fail(jobs[0], error)
                    continue
                for job in jobs:  # the fault of one is not that of the others
                    try:
                        self.score([job])
                    except Exception as of_job:
                        self.fail(job, of_job)

    def next_jobs(self) -> list[Job] | None:
        """As many of those that wait as are scored together; None for the end."""
        with self.condition:
            while not self.waiting and not self.closed:
                self.condition.wait()
            if not self.waiting:
                return None
            jobs = [self.waiting.popleft()]
            size = len(jobs[0].samples)
            while self.waiting and size + len(self.waiting[0].samples) <= self.max_batch:
                jobs.append(self.waiting.popleft())
                size += len(jobs[-1].samples)
            return jobs

    def score(self, jobs: Sequence[Job]):
        samples = [sample for job in jobs for sample in job.samples]
        self.scorer.score(samples)
        self.scored += len(samples)
        for job in jobs:
            job.done.set_result(told(job.samples))

    def fail(self, job: Job, error: Exception):
        self.failed += 1
        if not isinstance(error, UserError):
            logger.error("scoring has failed", exc_info=error)
        job.done.set_exception(error)

    # --- routes

    async def post_score(self, request: Request) -> Response:
        self.open += 1
        try:
            if self.draining:
                return refusal(503, "the server is shutting down")
            samples = read_samples(await read_json(request, self.max_body))
            job = self.submit(samples)
            return JSONResponse(await asyncio.wrap_future(job.done) if samples else told([]))
        except ApiError as error:
            return refusal(error.status, error.message)
        except QueueFull:
            return refusal(429, f"{self.max_queue} responses are waiting: try again later")
        except Closed:
            return refusal(503, "the server is shutting down")
        except UserError as error:
            return refusal(400, str(error))
        except Exception as error:  # it was logged where it was raised
            return refusal(500, f"{type(error).__name__}: the server's log says more")
        finally:
            self.open -= 1

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "draining" if self.draining else "ok"}, 503 if self.draining else 200)

    async def metrics(self, request: Request) -> Response:
        return metrics_page(self)

    def collect(self) -> Iterator[Metric]:
        """Figures for Prometheus."""
        yield GaugeMetricFamily("coati_reward_responses_waiting", "responses that wait", self.number_waiting())
        yield GaugeMetricFamily("coati_reward_requests_open", "requests in progress", self.open)
        yield CounterMetricFamily("coati_reward_responses", "responses that were scored", self.scored)
        yield CounterMetricFamily("coati_reward_requests_failed", "requests that could not be scored", self.failed)


def told(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a request gets: the weighted sums, null for a response that no reward applies to; and each reward's."""
    names = list(samples[0].rewards) if samples else []
    sums = [sample.score if any(r is not None for r in sample.rewards.values()) else None for sample in samples]
    return {"rewards": sums, "by_reward": {name: [sample.rewards[name] for sample in samples] for name in names}}


def refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, {"retry-after": "1"} if status in (429, 503) else None)


def read_samples(body: Any) -> list[Sample]:
    """The responses of a request.

    Raises:
        ApiError: it is none such; it names the field.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the request is no object")
    prompts, responses = (texts_of(body, name) for name in ("prompts", "responses"))
    columns = body.get("columns", {})
    if not isinstance(columns, dict):
        raise ApiError(400, "columns is no object")
    tokens, masks = body.get("input_ids"), body.get("response_masks")
    for name, values in {"prompts": prompts, "input_ids": tokens, "response_masks": masks, **columns}.items():
        if name in ("input_ids", "response_masks") and values is None:
            continue
        if not isinstance(values, list) or len(values) != len(responses):
            raise ApiError(400, f"{name} has no entry for each of {len(responses)} responses")
    if (tokens is None) != (masks is None):
        raise ApiError(400, "input_ids and response_masks belong together")
    samples = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        of_row = {name: values[i] for name, values in columns.items()}
        is_truncated = bool(of_row.pop("truncated", False))
        ids, mask = ([], []) if tokens is None else (tokens[i], masks[i])
        if not is_row(ids, mask):
            raise ApiError(400, f"input_ids[{i}] and response_masks[{i}] are no token ids with a boolean for each")
        finish_reason = "length" if is_truncated else "eos"
        samples.append(Sample(i, of_row, prompt, response, ids, mask, None, finish_reason))
    return samples


def texts_of(body: dict[str, Any], name: str) -> list[str]:
    texts = body.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{name} is no list of texts")
    return texts


def is_row(ids: Any, mask: Any) -> bool:
    """Whether these are token ids, with a boolean for each."""
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        return False
    return all(type(id) is int and id >= 0 for id in ids) and all(type(value) is bool for value in mask)


def application(service: RewardService, token: str | None) -> Starlette:
    """The ASGI application; with a token, every request must carry it."""
    routes = [
        Route("/score", service.post_score, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TokenRequired, token=token)] if token else [])


# --- reward models


class ServedModelReward(Reward):
    """A reward that reads tokens, with those of its tokenizer where a request has none.

    Args:
        reward: of a model.
    """

    def __init__(self, reward: Reward, tokenizer):
        self.reward, self.tokenizer = reward, tokenizer
        self.name, self.on_tokens = reward.name, reward.on_tokens

    def score(self, samples):
        for sample in samples:
            if not sample.tokens:
                texts = (sample.prompt, sample.response)
                asked, ids = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
                ids += [] if sample.truncated else [self.tokenizer.eos_token_id]
                sample.tokens = asked + ids
                sample.response_mask = [False] * len(asked) + [True] * len(ids)
        return self.reward.score(samples)


def load_model_reward(
    folder: str, settings: ModelRewardSettings | ProcessRewardSettings | None = None, device: str = "cpu"
) -> Reward:
    """A reward model, or a process reward model, in this process; see `load_here`. It reads the ids of a request;
    without them, those that its tokenizer has for the prompt and for the response, with EOS after one that ended.

    Raises:
        UserError: the folder can't be loaded.
    """
    import torch
    from transformers import AutoTokenizer

    from coati.data import prepare_tokenizer
    from coati.rewards.process import load_here

    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(folder), learns_responses=False)
    reward = load_here(folder, settings, tokenizer, torch.device(device), split_by_length)
    return ServedModelReward(reward, tokenizer)


def split_by_length(lengths: list[int]) -> list[list[int]]:
    """Rows of like length together, as many as `TOKENS_AT_A_TIME` allows."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[parts[-1][0]] if parts else 0
        if parts and (len(parts[-1]) + 1) * longest <= TOKENS_AT_A_TIME:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


# --- the command


def main(argv: list[str]) -> int:
    """Serves until SIGTERM or Ctrl-C, finishes what was begun, and returns 0.

    Raises:
        UserError: settings, a reward or an address that can't be served.
    """
    config = parse_config(ServeRewardConfig, argv, DESCRIPTION, of_file=("rewards",))  # a training run's file will do
    token = config.token if config.token is not None else os.environ.get(TOKEN)
    check_address(config.host, token)
    if not config.rewards:
        raise UserError("no reward: give `rewards`, such as --rewards math or --rewards '{type: model, path: FOLDER}'")
    import torch

    with listen(config.host, config.port) as listener:
        scoring = ScoringConfig(
            reward_workers=config.reward_workers,
            reward_timeout=config.reward_timeout,
            reward_failure_score=config.reward_failure_score,
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        scorer = load_rewards(config.rewards, scoring, partial(load_model_reward, device=device), device)
        if on_tokens := [name for name, (reward, _) in scorer.rewards.items() if reward.on_tokens]:
            raise UserError(f"the reward {on_tokens[0]} is one of tokens, which this protocol has no place for")
        service = RewardService(scorer, config.max_batch, config.max_queue, config.max_body)
        host, port = listener.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(scorer.rewards)} at http://{place}:{port}/score", flush=True)
        run(application(service, token), service, listener)
    return 0
