"""Environments whose methods are tools.

A class without `step` gives its public methods to the policy, described by their docstrings and type hints:

    class Shop:
        def reset(self, row):
            self.prices = row["prices"]
            return row["question"]

        def price(self, item: str) -> float:
            \"""What an item costs.

            Args:
                item: its name.
            \"""
            return self.prices[item]

A tool returns what the policy reads: a text, what JSON can hold, or an `Observation` with a text to give a reward or to
end the episode. An error that it raises is read as well. A message without calls ends the episode, unless the class has
`answer(message)`, which returns an `Observation`.

A class that learns its tools from elsewhere has a class method `tools()`, which returns descriptions as chat templates
take them, and `call(name, arguments)` in place of methods.
"""

import inspect
import json
from collections import Counter
from itertools import zip_longest
from typing import Any

from pydantic import ValidationError, validate_call

from coati.errors import UserError
from coati.rollout.environment import EnvironmentCalls, Observation, check_observation

NO_TOOLS = ("reset", "answer", "close", "tools", "call")


def has_tools(environment: type) -> bool:
    """Whether an environment's class has tools in place of `step`."""
    return not hasattr(environment, "step")


def describe_tools(environment: type) -> list[dict[str, Any]]:
    """Tools as chat templates take them, `{"type": "function", "function": {...}}`.

    Raises:
        UserError: there are none, or one isn't described.
    """
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    if hasattr(environment, "tools"):
        return environment.tools()
    methods = [method for name, method in inspect.getmembers(environment, inspect.isfunction) if is_tool(name)]
    if not methods:
        raise UserError(f"environment {environment.__name__} has no method step, and no public method as a tool")
    try:
        return [get_json_schema(method) for method in methods]
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise UserError(
            f"environment {environment.__name__}: {error}. Public methods are tools: describe this one and its "
            "arguments (with Args:), or begin its name with an underscore"
        ) from None


def is_tool(name: str) -> bool:
    return not name.startswith("_") and name not in NO_TOOLS


class ToolUse:
    """An environment with tools, as one that answers messages.

    Args:
        environment: an object of the user's class.
        names: of its tools; nothing else of it can be called.
        calls: runs methods that are `async`.
        max_characters: of a tool's result. The policy reads that more was cut.
    """

    def __init__(self, environment: Any, names: list[str], calls: EnvironmentCalls, max_characters: int):
        self.environment, self.names, self.calls, self.max_characters = environment, names, calls, max_characters
        self.reset = environment.reset
        if hasattr(environment, "close"):
            self.close = environment.close
        self.counts = Counter(tool_calls=0, tool_errors=0, malformed_calls=0)

    def step(self, message: dict[str, Any]) -> Observation:
        """Makes a message's calls, one after the other."""
        if "malformed_call" in message:
            self.counts["malformed_calls"] += 1
            observation = Observation(f"error: {message['malformed_call']}")
        elif "tool_calls" in message:
            observation = self.make_calls(message["tool_calls"])
        elif hasattr(self.environment, "answer"):
            observation = check_observation(self.calls.run(self.environment.answer, message))
        else:
            observation = Observation(done=True)
        observation.metrics = {**self.counts, **observation.metrics}
        return observation

    def make_calls(self, tool_calls: list[dict[str, Any]]) -> Observation:
        """Every tool's result as a message. The first one that ends the episode is the last."""
        made = Observation([])
        for tool_call in tool_calls:
            function = tool_call["function"]
            self.counts["tool_calls"] += 1
            result = self.result_of(function["name"], function["arguments"])
            made.messages.append(
                {
                    "role": "tool",
                    "name": function["name"],
                    "tool_call_id": tool_call["id"],
                    "content": self.shortened(result.messages),
                }
            )
            made.reward += result.reward
            both = zip_longest(made.earlier_rewards, result.earlier_rewards, fillvalue=0.0)
            made.earlier_rewards = [sum(pair) for pair in both]
            made.metrics |= result.metrics
            if result.done:
                made.done = True
                break
        return made

    def result_of(self, name: str, arguments: dict[str, Any]) -> Observation:
        """What a tool returned, as an observation with a text. Its errors are the policy's to read."""
        try:
            if name not in self.names:
                raise LookupError(f"no tool is called {name}, there are {', '.join(self.names)}")
            if hasattr(self.environment, "tools"):
                result = self.calls.run(self.environment.call, name, arguments)
            else:
                result = self.calls.run(validate_call(getattr(self.environment, name)), **arguments)
        except Exception as error:
            self.counts["tool_errors"] += 1
            return Observation(f"error: {description_of(error)}")
        if isinstance(result, Observation):
            if not isinstance(result.messages, str):
                raise TypeError(f"the tool {name} returned an Observation whose messages are not a text")
            return result
        return Observation(result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str))

    def shortened(self, text: str) -> str:
        if len(text) <= self.max_characters:
            return text
        return f"{text[: self.max_characters]} ... (cut, {len(text)} characters in all)"


def description_of(error: Exception) -> str:
    """One line for the policy."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
