"""A reward behind an HTTP endpoint."""

import json
import logging
import time
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from coati.errors import UserError
from coati.rewards.base import Reward, columns_of

logger = logging.getLogger(__name__)
BUSY = (408, 425, 429)  # statuses below 500 that another try may fix


class HTTPReward(Reward):
    """POSTs `{"prompts": [...], "responses": [...], "columns": {name: [...]}}` and reads `{"rewards": [...]}`, one
    number per response, or null to skip one. `columns` holds the data's other fields,
    but for what JSON can't hold, and `truncated`.

    Args:
        timeout: seconds that the endpoint may be silent.
        retries: further tries after no answer in time, no connection, or a status of 408, 425, 429 or 500 and above.
        wait: seconds before the first retry; twice as long before each of the next.
        batch_size: responses per request.
        headers: HTTP headers, for a key.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        wait: float = 1.0,
        batch_size: int = 64,
        headers: dict[str, str] | None = None,
        name: str | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"reward URL {url!r}: it must start with http:// or https:// and name a host")
        self.url, self.timeout, self.retries, self.wait, self.batch_size = url, timeout, retries, wait, batch_size
        self.headers, self.name = {"Content-Type": "application/json"} | (headers or {}), name or parts.hostname

    def score(self, samples):
        """What the endpoint gives.

        Raises:
            UserError: the endpoint fails in all tries, or refuses the request, or replies with anything else than one
                number or null per response.
        """
        columns = {name: values for name, values in columns_of(samples).items() if _fits_json(values)}
        rewards: list[float | None] = []
        for start in range(0, len(samples), self.batch_size):
            rows = slice(start, start + self.batch_size)
            request = {
                "prompts": [sample.prompt for sample in samples[rows]],
                "responses": [sample.response for sample in samples[rows]],
                "columns": {name: values[rows] for name, values in columns.items()},
            }
            rewards += self._read(self._post(json.dumps(request).encode()), len(samples[rows]))
        return rewards

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self.retries + 1):
            try:
                with urlopen(Request(self.url, body, self.headers), timeout=self.timeout) as reply:
                    return reply.read()
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) and error.code < 500 and error.code not in BUSY:
                    raise UserError(f"reward URL {self.url} refused the request: {error}") from error
                cause = error
            if attempt < self.retries:
                pause = self.wait * 2**attempt
                logger.warning(f"reward URL {self.url}: {cause}; try {attempt + 2} in {pause:g} s")
                time.sleep(pause)
        raise UserError(
            f"reward URL {self.url} failed {self.retries + 1} times, the last with: {cause}; start the server, or "
            f"give its entry in the rewards a longer timeout (now {self.timeout:g} s) or more retries"
        ) from cause

    def _read(self, reply: bytes, count: int) -> list[float | None]:
        try:
            rewards = json.loads(reply)["rewards"]
            good = len(rewards) == count and all(type(reward) in (int, float, type(None)) for reward in rewards)
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(
                f'reward URL {self.url} replied {reply[:80]!r}: it must reply {{"rewards": [...]}} with one number '
                f"for each of {count} responses"
            )
        return rewards


def _fits_json(values) -> bool:
    try:
        json.dumps(values)
    except (TypeError, ValueError):
        return False
    return True
