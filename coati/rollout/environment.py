"""Environments: what a policy talks to over several turns.

An environment is a class of the user's own, without a base class. One object is made per episode:

    class GuessTheNumber:
        def reset(self, row):                  # the row's fields -> what begins the conversation
            self.secret = row["secret"]
            return "Guess my number, from 1 to 100."

        def step(self, message):               # the policy's message -> what it leads to
            guess = int(message["content"])
            if guess == self.secret:
                return Observation(reward=1.0, done=True)
            return Observation("Higher." if guess < self.secret else "Lower.")

Both may be `async`, and may raise: the episode ends there, and counts as failed. `close()`, if there is one, is called
at the end of every episode. Episodes of one row should be alike: what is random belongs into the row. A class without
`step` has tools, see `coati.rollout.tools`.
"""

import asyncio
import inspect
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from coati.data.messages import Messages, read_messages
from coati.errors import UserError
from coati.rewards.function import import_function

PATIENCE = 1.0  # seconds, for an event loop to do nothing


@dataclass
class Observation:
    """What a step leads to.

    Attributes:
        messages: what the policy reads next, a text for one message by the user (or by the tool that returned it); none
            only where the episode is done.
        reward: for the message that led here; an episode's is their sum.
        done: the episode ends.
        metrics: numbers whose means are logged as `environment/NAME`, of the last step that gives them.
        earlier_rewards: for each message of the policy before that one, which are added to what these had: a game that
            is decided at its end rewards all its moves there. Empty for none.
    """

    messages: Messages | str = field(default_factory=list)
    reward: float = 0.0
    done: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    earlier_rewards: list[float] = field(default_factory=list)


class Environment(Protocol):
    """See the module's docstring."""

    def reset(self, row: dict[str, Any]) -> Messages | str:
        """Begins an episode.

        Args:
            row: the fields of a row of the data.
        """

    def step(self, message: dict[str, Any]) -> Observation:
        """Answers a message of the policy's, `{"role": "assistant", "content": text}`."""


def load_environment(location: str) -> type:
    """The class at `FILE.py:Class` or `module:Class`.

    Raises:
        UserError: there is none, or it has no `reset`.
    """
    environment = import_function(location, "environment")
    if not inspect.isclass(environment):
        raise UserError(f"environment {location!r} is no class")
    if not hasattr(environment, "reset"):
        raise UserError(f"environment {location!r} has no method reset")
    return environment


class EpisodeFailed(Exception):
    """An environment raised, took too long, or returned something else than it should."""


@dataclass(frozen=True)
class Call:
    """One in progress.

    Attributes:
        deadline: by `time.monotonic`, in seconds.
    """

    future: Future
    deadline: float


class EnvironmentCalls:
    """Calls environments side by side: async methods in one event loop, others in threads of their own.

    A call that takes longer than `timeout` seconds has failed, however late it is asked about. Its thread can't be
    stopped; it is a daemon, which no process waits for at its end, and what it returns later is dropped. So it is with
    the thread of an event loop that an async method blocks: later calls have another loop.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.loop: asyncio.AbstractEventLoop | None = None

    def begin(self, method: Callable, *arguments) -> Call:
        """Starts a call; `result` waits for it."""
        deadline = time.monotonic() + self.timeout
        if inspect.iscoroutinefunction(method):
            return Call(asyncio.run_coroutine_threadsafe(method(*arguments), self._running_loop()), deadline)
        future: Future = Future()
        future.set_running_or_notify_cancel()  # so that a late result is dropped and no error of its own

        def call():
            try:
                future.set_result(method(*arguments))
            except BaseException as error:  # of a thread of its own: it belongs to the episode
                future.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        return Call(future, deadline)

    def result(self, call: Call) -> Any:
        """What a call has returned.

        Raises:
            EpisodeFailed: it raised, or took too long.
        """
        future = call.future
        wait([future], max(call.deadline - time.monotonic(), 0.0))
        if not future.done():
            future.cancel()
            self._leave_blocked_loop()
            raise EpisodeFailed(f"no result within {self.timeout:g} s")
        error = future.exception()
        if error is not None:  # an exit, too: it is the environment's, not the run's
            raise EpisodeFailed(repr(error)) from error
        return future.result()

    def run(self, method: Callable, *arguments, **named) -> Any:
        """What a method returns or raises, from within another call."""
        if not inspect.iscoroutinefunction(method):
            return method(*arguments, **named)
        future = asyncio.run_coroutine_threadsafe(method(*arguments, **named), self._running_loop())
        try:
            return future.result(self.timeout)
        finally:
            future.cancel()

    def _leave_blocked_loop(self):
        if self.loop is None:
            return
        sign_of_life = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self.loop)
        wait([sign_of_life], PATIENCE)
        if not sign_of_life.done():
            sign_of_life.cancel()
            self.loop = None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        return self.loop


def check_messages(messages: Any) -> Messages:
    """Messages that an environment gave, in one shape.

    Args:
        messages: a text is one by the user.

    Raises:
        EpisodeFailed: they are none.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        checked, _ = read_messages(messages, "messages")
    except ValueError as error:
        raise EpisodeFailed(str(error)) from None
    if not checked or checked[-1]["role"] == "assistant":
        raise EpisodeFailed("the last message must be for the policy, not by it")
    return checked


def check_observation(found: Any) -> Observation:
    """What a step returned.

    Raises:
        EpisodeFailed: it is no observation, has no finite reward, or nothing to go on with.
    """
    if not isinstance(found, Observation):
        raise EpisodeFailed(f"step returned {str(found)[:80]!r}, not an Observation")
    earlier = [check_reward(reward) for reward in found.earlier_rewards]
    messages = [] if found.done else check_messages(found.messages)
    return Observation(messages, check_reward(found.reward), bool(found.done), dict(found.metrics), earlier)


def check_reward(found: Any) -> float:
    """A finite number.

    Raises:
        EpisodeFailed: it is none.
    """
    try:
        reward = float(found)
    except (TypeError, ValueError):
        raise EpisodeFailed(f"a reward of {str(found)[:80]!r}") from None
    if not math.isfinite(reward):
        raise EpisodeFailed(f"a reward of {reward}")
    return reward
