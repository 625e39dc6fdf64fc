"""`coati play`: an episode with an environment, step by step. A person is the policy, or looks at what a model did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from coati.config.environment import EnvironmentConfig
from coati.data import prepare_tokenizer
from coati.errors import UserError
from coati.models import Actor
from coati.rollout import (
    EpisodeSampler,
    Observation,
    PolicyGenerator,
    Prompt,
    check_conversations,
    describe_tools,
    has_tools,
    load_environment,
    rendering_of,
)
from coati.rollout.environment import EnvironmentCalls, EpisodeFailed, check_messages, check_observation
from coati.rollout.prompts import eos_ids
from coati.rollout.tool_calls import read_response
from coati.rollout.tools import ToolUse

SPOKEN = "pythonic"  # how a person calls tools: the shortest to type


def read_row(path: Path, number: int) -> dict[str, Any]:
    """A row of a .jsonl file.

    Raises:
        UserError: the file doesn't have it, or it is no object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        row = json.loads(lines[number])
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except IndexError:
        raise UserError(f"{path} has no row {number}: there are {len(lines)}, counted from 0") from None
    except ValueError as error:
        raise UserError(f"{path}, row {number}: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, row {number} is no object")
    return row


def play(
    location: str, row: dict[str, Any], limits: EnvironmentConfig, ask: Callable[[], str], show: Callable[[str], Any]
):
    """Plays one episode with a person.

    Args:
        location: of the environment, `FILE.py:Class` or `module:Class`.
        ask: returns what the person says.
        show: prints a line.

    Raises:
        UserError: there is no such environment, or it has failed.
    """
    kind, calls = load_environment(location), EnvironmentCalls(limits.timeout)
    environment, call_format = kind(), None
    if has_tools(kind):
        tools = [tool["function"] for tool in describe_tools(kind)]
        call_format = SPOKEN if limits.call_format == "auto" else limits.call_format
        environment = ToolUse(environment, [tool["name"] for tool in tools], calls, limits.max_result_characters)
        for tool in tools:
            show(f"tool      {tool['name']}({', '.join(tool['parameters']['properties'])}): {tool['description']}")
        show(
            f"calls     [{tools[0]['name']}(...)]"
            if call_format == SPOKEN
            else f"calls     as {call_format} writes them"
        )
    try:
        show_messages(check_messages(calls.result(calls.begin(environment.reset, dict(row)))), show)
        total = 0.0
        for _ in range(limits.max_turns):
            message = read_response(ask(), call_format)
            observation = check_observation(calls.result(calls.begin(environment.step, message)))
            total += observation.reward + sum(observation.earlier_rewards)
            show(told(observation))
            if observation.done:
                show(f"done      rewards of {total:g} in all")
                return
            show_messages(observation.messages, show)
        show(f"end       after {limits.max_turns} turns (--max_turns), rewards of {total:g} in all")
    except EpisodeFailed as error:
        raise UserError(f"environment {location!r} failed: {error}") from None
    except (EOFError, KeyboardInterrupt):
        show("\nleft")
    finally:
        if hasattr(environment, "close"):
            calls.result(calls.begin(environment.close))


def told(observation: Observation) -> str:
    metrics = "".join(f"  {name} {value:g}" for name, value in observation.metrics.items())
    earlier = ", ".join(f"{reward:g}" for reward in observation.earlier_rewards)
    return f"reward    {observation.reward:g}{f' (before: {earlier})' if earlier else ''}{metrics}"


def show_messages(messages: list[dict[str, Any]], show: Callable[[str], Any]):
    """A line for each, begun with who says it."""
    for message in messages:
        show(f"{message['role']:<10}{message['content']}".replace("\n", "\n" + " " * 10))


def episodes_of(environment: type, model: str, limits: EnvironmentConfig) -> EpisodeSampler:
    """What plays episodes with a model, on the GPU if there is one.

    Args:
        model: a folder or name.

    Raises:
        UserError: a template that can't write the conversation, see `rendering_of`.
    """
    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    actor = Actor(model).to(device).eval()
    ends = eos_ids(tokenizer, actor)
    renderer, call_format = rendering_of(environment, tokenizer, ends, limits.call_format)
    generator = PolicyGenerator.of_actor(actor, tokenizer)
    return EpisodeSampler(generator, tokenizer, ends, environment, renderer, limits, call_format)


def show_episode(
    location: str, row: dict[str, Any], model: str, limits: EnvironmentConfig, sampling, wait: Callable[[], Any], show
):
    """Has a model play one episode, and shows it turn by turn.

    Args:
        model: a model's folder or name; sampling: a `GenerationConfig`.
        wait: called before each of the model's messages.

    Raises:
        UserError: as `play`, or a model whose template can't write the conversation.
    """
    episodes = episodes_of(load_environment(location), model, limits)
    for note in check_conversations(episodes.renderer):
        show(note)
    [sample] = episodes.sample([Prompt(0, [0, 0], [], "", row)], sampling).samples
    turns = iter(sample.turns)
    for message in sample.messages:
        if message["role"] == "assistant":
            wait()
        show_messages([message], show)
        if message["role"] == "assistant":
            turn = next(turns)
            log_probs = sample.log_probs[turn.start : turn.end]
            mean = sum(log_probs) / len(log_probs)
            show(f"reward    {turn.reward:g}, {turn.end - turn.start} tokens, mean log-prob {mean:.2f}")
    metrics = "".join(f", {name} {value:g}" for name, value in sample.metrics.items())
    show(f"{sample.finish_reason:<10}rewards of {sum(turn.reward for turn in sample.turns):g} in all{metrics}")
