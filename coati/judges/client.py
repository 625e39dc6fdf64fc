"""The client of an OpenAI-compatible endpoint that is asked for verdicts, many at a time.

It works in an event loop on a thread of its own, so that whoever asks goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, TypeVar

from coati.errors import UserError
from coati.judges.cache import VerdictCache

T = TypeVar("T")
PASSING = (408, 409, 425, 429)  # statuses below 500 that another attempt may fix
REFUSING = (401, 403, 404)  # the key, or the judge's name
PAUSE = 1.0  # seconds before the second attempt, doubled with each
LONGEST_PAUSE = 30.0
LONGEST_RETRY_AFTER = 300.0  # seconds that an endpoint may ask to wait


@dataclass(frozen=True)
class Question:
    """What a judge is asked.

    Attributes:
        messages: the conversation, `{"role": ..., "content": ...}` each.
        kind: names how the verdict is read; questions of other kinds are other questions.
        read: the verdict in a reply, a value of JSON; None if the reply has none.
        opening: how the line of the verdict begins.
        choices: what may follow it, with the number that each is worth; none if it can't be listed.
    """

    messages: Sequence[Mapping[str, str]]
    kind: str
    read: Callable[[str], Any]
    opening: str = ""
    choices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a judge said.

    Attributes:
        value: the verdict, None if all attempts have failed.
        text: the reply that it was read of; "" of one that was kept from before.
        errors: what went wrong in each attempt that failed.
        mass: of a judge in this process, how probable it found all choices together.
    """

    value: Any
    text: str = ""
    errors: tuple[str, ...] = ()
    mass: float | None = None


def check_openai():
    """Raises a UserError if the package openai is missing."""
    if find_spec("openai") is None:
        raise UserError("judges need the package openai: pip install 'coati[judge]'")


class Judge:
    """Asks an endpoint, `concurrency` requests at a time. A request waits for its turn, and keeps it while it pauses
    between attempts, so that an endpoint that is overloaded is asked less.

    Errors that pass are followed by another attempt, after 1, 2, 4, ... up to 30 seconds, or after as long as the
    endpoint says (`Retry-After`): status 408, 409, 425, 429 or 500 and above, no connection, no reply in time, a reply
    that is no JSON or has no text, that was cut at `max_tokens`, or without a verdict. Any other status fails at once.

    Args:
        model: the judge's name at the endpoint.
        endpoint: the API's URL, such as `http://localhost:8000/v1`; None for the variable OPENAI_BASE_URL, else
            OpenAI's.
        api_key_variable: the environment variable that holds the key; servers that need none get the word none.
        max_tokens: of a reply.
        attempts: requests for a question before it counts as failed.
        timeout: seconds for one reply.
        cache: verdicts that are known, and where new ones are kept. Those that have failed are not.

    Raises:
        UserError: the package openai is missing, or `endpoint` is no URL.
    """

    def __init__(
        self,
        model: str,
        *,
        endpoint: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        max_tokens: int = 1024,
        concurrency: int = 8,
        attempts: int = 4,
        timeout: float = 120.0,
        cache: VerdictCache | None = None,
    ):
        check_openai()
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UserError(f"endpoint {endpoint!r} of the judge {model}: it must start with http:// or https://")
        from openai import AsyncOpenAI

        self.model, self.temperature, self.max_tokens = model, temperature, max_tokens
        self.attempts, self.timeout, self.cache = attempts, timeout, cache
        key = os.environ.get(api_key_variable, "none")  # the client insists on one
        self.client = AsyncOpenAI(base_url=endpoint, api_key=key, timeout=None, max_retries=0)
        self.endpoint = str(self.client.base_url)
        self.turns = asyncio.Semaphore(concurrency)
        self.asking: dict[str, asyncio.Task[Verdict]] = {}
        self.refusal = ""
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="judge").start()
        self.close = weakref.finalize(self, _stop, self.loop, self.client)

    def submit(self, question: Question) -> Future[Verdict]:
        """Has a question asked. The future raises a UserError if the endpoint refuses the key or doesn't know the
        judge, and so do all later ones."""
        return self.submit_all([question], lambda verdicts: verdicts[0])

    @property
    def place(self) -> str:
        """Where it is asked, for messages."""
        return f"the judge {self.model} at {self.endpoint}"

    def check(self, question: Question):
        """An endpoint can be asked anything."""

    def answer(self, questions: Sequence[Question]) -> list[Verdict]:
        """Has questions asked, and waits for the verdicts. Raises a UserError as those of `submit`."""
        return self.submit_all(questions, list).result()

    def submit_all(self, questions: Sequence[Question], conclude: Callable[[list[Verdict]], T]) -> Future[T]:
        """Has several questions asked at once; the future is what `conclude` makes of their verdicts."""
        return asyncio.run_coroutine_threadsafe(self._conclude(questions, conclude), self.loop)

    def key(self, question: Question) -> str:
        """Names a question's content in the cache, whatever endpoint it is asked at."""
        content = {
            "model": self.model,
            "messages": [dict(message) for message in question.messages],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "kind": question.kind,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # --- in the event loop

    async def _conclude(self, questions: Sequence[Question], conclude: Callable[[list[Verdict]], T]) -> T:
        return conclude(await asyncio.gather(*(self._verdict(question) for question in questions)))

    async def _verdict(self, question: Question) -> Verdict:
        """A verdict that is known, or will be, or must be asked for."""
        key = self.key(question)
        if self.cache is not None and key in self.cache:
            return Verdict(self.cache[key])
        if key not in self.asking:
            self.asking[key] = asyncio.create_task(self._ask(key, question))
            self.asking[key].add_done_callback(lambda _: self.asking.pop(key))
        return await asyncio.shield(self.asking[key])

    async def _ask(self, key: str, question: Question) -> Verdict:
        import openai

        errors: list[str] = []
        async with self.turns:
            for attempt in range(self.attempts):
                if self.refusal:
                    raise UserError(self.refusal)
                pause = min(2.0**attempt * PAUSE, LONGEST_PAUSE)
                try:
                    text = await asyncio.wait_for(self._reply(question), self.timeout)
                    value = question.read(text)
                    if value is None:
                        raise ValueError(f"no verdict in {text[-200:]!r}")
                except openai.APIStatusError as error:
                    errors.append(_described(error))
                    if error.status_code in REFUSING:
                        self.refusal = f"the endpoint {self.endpoint} refuses the judge {self.model}: {error}"
                        raise UserError(self.refusal) from error
                    if error.status_code not in PASSING and error.status_code < 500:
                        break
                    pause = max(pause, retry_after(error.response.headers))
                except asyncio.TimeoutError:
                    errors.append(f"TimeoutError: no reply within {self.timeout:g} s")
                except (openai.OpenAIError, ValueError) as error:
                    errors.append(_described(error))
                else:
                    if self.cache is not None:
                        self.cache.append(key, value, model=self.model, kind=question.kind, text=text)
                    return Verdict(value, text, tuple(errors))
                if attempt + 1 < self.attempts:
                    await asyncio.sleep(pause)
        return Verdict(None, errors=tuple(errors))

    async def _reply(self, question: Question) -> str:
        """A reply's text.

        Raises:
            openai.OpenAIError, ValueError: there is none, or only a part of one, whose last number may be cut.
        """
        raw = await self.client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=list(question.messages),
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )
        body = json.loads(raw.content)
        try:
            choice = body["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (AttributeError, IndexError, KeyError, TypeError):
            text, reason = None, None
        if not isinstance(text, str) or not text:
            raise ValueError(f"the endpoint gave no text: {json.dumps(body)[:200]}")
        if reason == "length":
            raise ValueError(f"the reply was cut at max_tokens {self.max_tokens}")
        return text


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a reply asks to wait (RFC 9110, 10.2.3: a number of them, or a date); 0 if it doesn't say."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(seconds, LONGEST_RETRY_AFTER) if seconds > 0 else 0.0


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _stop(loop: asyncio.AbstractEventLoop, client: Any):
    """Ends what is asked and the loop's thread, without waiting for them."""
    asyncio.run_coroutine_threadsafe(_end(client), loop)


async def _end(client: Any):
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()
    asyncio.get_running_loop().stop()
