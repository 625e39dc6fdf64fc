"""A reward behind an HTTP endpoint, or behind several that give the same."""

import json
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from coati.errors import UserError
from coati.rewards.base import Reward, columns_of

logger = logging.getLogger(__name__)
BUSY = (408, 425, 429)  # statuses below 500 that another try may fix
REST = 30.0  # seconds in which a URL that has failed is asked last


class HTTPReward(Reward):
    """POSTs `{"prompts": [...], "responses": [...], "columns": {name: [...]}}` and reads `{"rewards": [...]}`, one
    number per response, or null to skip one. `columns` holds the data's other fields,
    but for what JSON can't hold, and `truncated`.

    Requests go to several URLs in turn, one to each at a time. One that fails goes to the next URL at once.

    Args:
        url: the endpoint, or several that give the same.
        timeout: seconds that an endpoint may be silent.
        retries: further tries after no answer in time, no connection, or a status of 408, 425, 429 or 500 and above, at
            every URL.
        wait: seconds before the first retry; twice as long before each of the next.
        batch_size: responses per request.
        headers: HTTP headers, for a key.
        send_ids: requests have the samples' `input_ids` and `response_masks` too, for endpoints that read tokens.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        timeout: float = 60.0,
        retries: int = 3,
        wait: float = 1.0,
        batch_size: int = 64,
        headers: dict[str, str] | None = None,
        name: str | None = None,
        send_ids: bool = False,
    ):
        self.urls = [url] if isinstance(url, str) else list(url)
        hosts = [urlsplit(one).hostname for one in self.urls]
        for one, host in zip(self.urls, hosts, strict=True):
            if urlsplit(one).scheme not in ("http", "https") or not host:
                raise UserError(f"reward URL {one!r}: it must start with http:// or https:// and name a host")
        self.timeout, self.retries, self.wait, self.batch_size = timeout, retries, wait, batch_size
        self.headers, self.name = {"Content-Type": "application/json"} | (headers or {}), name or hosts[0]
        self.send_ids = send_ids
        self.failed_at: dict[str, float] = {}  # when a URL has failed last

    def score(self, samples):
        """What the endpoint gives.

        Raises:
            UserError: all endpoints fail in all tries, or one refuses the request, or replies with anything else than
                one number or null per response.
        """
        columns = {name: values for name, values in columns_of(samples).items() if _fits_json(values)}

        def ask(start: int) -> list[float | None]:
            rows = slice(start, start + self.batch_size)
            request: dict[str, Any] = {
                "prompts": [sample.prompt for sample in samples[rows]],
                "responses": [sample.response for sample in samples[rows]],
                "columns": {name: values[rows] for name, values in columns.items()},
            }
            if self.send_ids:
                request["input_ids"] = [list(sample.tokens) for sample in samples[rows]]
                request["response_masks"] = [list(sample.response_mask) for sample in samples[rows]]
            return self._post(json.dumps(request).encode(), len(samples[rows]), start // self.batch_size)

        pool = ThreadPoolExecutor(len(self.urls))
        try:
            parts = pool.map(ask, range(0, len(samples), self.batch_size))
            return [reward for part in parts for reward in part]
        finally:
            pool.shutdown(cancel_futures=True)

    def _post(self, body: bytes, count: int, turn: int) -> list[float | None]:
        """Rewards of a request's responses.

        Args:
            turn: number of the request, which says which URL it begins with.
        """
        for attempt in range(self.retries + 1):
            for url in self._in_turn(turn):
                try:
                    with urlopen(Request(url, body, self.headers), timeout=self.timeout) as reply:
                        return self._read(url, reply.read(), count)
                except (OSError, HTTPException) as error:
                    if isinstance(error, HTTPError) and error.code < 500 and error.code not in BUSY:
                        raise UserError(f"reward URL {url} refused the request: {error}") from error
                    self.failed_at[url] = time.monotonic()
                    last, cause = url, error
                if len(self.urls) > 1:
                    logger.warning(f"reward URL {url}: {cause}")
            if attempt < self.retries:
                pause = self.wait * 2**attempt
                logger.warning(f"reward URL {last}: {cause}; try {attempt + 2} in {pause:g} s")
                time.sleep(pause)
        raise UserError(
            f"reward URL {last} failed {self.retries + 1} times, the last with: {cause}; start the server, or "
            f"give its entry in the rewards a longer timeout (now {self.timeout:g} s) or more retries"
        ) from cause

    def _in_turn(self, turn: int) -> list[str]:
        """The URLs in the order in which a request tries them: those that have just failed come last."""
        urls = self.urls[turn % len(self.urls) :] + self.urls[: turn % len(self.urls)]
        now = time.monotonic()
        return sorted(urls, key=lambda url: now - self.failed_at.get(url, -math.inf) < REST)

    def _read(self, url: str, reply: bytes, count: int) -> list[float | None]:
        try:
            rewards = json.loads(reply)["rewards"]
            good = len(rewards) == count and all(type(reward) in (int, float, type(None)) for reward in rewards)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(
                f'reward URL {url} replied {reply[:80]!r}: it must reply {{"rewards": [...]}} with one number '
                f"for each of {count} responses"
            )
        return rewards


def _fits_json(values) -> bool:
    try:
        json.dumps(values)
    except (TypeError, ValueError):
        return False
    return True
