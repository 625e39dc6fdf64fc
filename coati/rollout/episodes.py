"""Episodes: a policy and environments take turns until each episode is done.

An environment is asked as soon as a response has ended, while others are still being generated, and its episode joins
them again for the next turn. What a response is depends on its seed and on what came before, not on the other episodes,
but the last bits of its log-probs do depend on which rows the engine computes together. So an episode does not go on at
the moment when its environment has answered, which would make a run depend on a clock and a resumed run another one: it
goes on after a fixed number of steps (`FollowUps.steps`). An environment that is quicker keeps nobody waiting; one that
is slower is waited for, and `waited` counts the seconds.

An engine that completes a whole batch at a time (vLLM, transformers) begins a turn when all of the turn before have
ended. Either way the policy's weights are gathered once for all turns, by every rank, also one without an episode.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coati.config.environment import EnvironmentConfig
from coati.config.generation import GenerationConfig
from coati.data.messages import Messages
from coati.errors import UserError
from coati.rollout.conversation import ConversationRenderer
from coati.rollout.environment import (
    Call,
    Environment,
    EnvironmentCalls,
    EpisodeFailed,
    Observation,
    check_messages,
    check_observation,
)
from coati.rollout.generator import Completion, FollowUps, Generator, Request, notify_done
from coati.rollout.prompts import response_text
from coati.rollout.sampler import OnSample, Prompt, Sampled
from coati.rollout.tool_calls import format_of, read_response
from coati.rollout.tools import ToolUse, describe_tools, has_tools
from coati.samples import Sample, Turn

logger = logging.getLogger(__name__)

LONGEST_TOKEN = 256  # characters; a text of more than fit into an episode isn't tokenized to find that out


@dataclass
class Episode:
    """One under way.

    Attributes:
        messages: the conversation so far, what was sampled decoded.
        tokens, mask, log_probs: as `Sample` has them; log_probs None where a response has none.
        finish_reason: empty while it goes on.
        waiting: for what its environment was asked; waited: seconds for which generation waited, too.
        states: of the last response, so that the next one goes on from it.
    """

    prompt: Prompt
    environment: Environment
    messages: Messages = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    log_probs: list[float] | None = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    finish_reason: str = ""
    error: str = ""
    waiting: Call | None = None
    waited: float = 0.0
    states: Any = None

    @property
    def goes_on(self) -> bool:
        return not self.finish_reason

    def append(self, ids: Sequence[int], log_probs: Sequence[float] | None = None, *, sampled: bool = False):
        """Tokens that were sampled, or that were not."""
        self.tokens += ids
        self.mask += [sampled] * len(ids)
        if sampled and log_probs is None:
            self.log_probs = None
        if self.log_probs is not None:
            self.log_probs += log_probs if sampled else [0.0] * len(ids)

    def earn(self, observation: Observation):
        """Takes the rewards for its turns."""
        *before, last = self.turns
        last.reward = observation.reward
        earlier = observation.earlier_rewards
        if earlier and len(earlier) != len(before):
            raise EpisodeFailed(f"earlier_rewards has {len(earlier)} numbers, {len(before)} turns were before this one")
        for turn, reward in zip(before, earlier, strict=False):
            turn.reward += reward

    def fail(self, error: Exception):
        self.finish_reason, self.error = "failed", str(error)


def rendering_of(
    environment: type,
    tokenizer,
    ends: Iterable[int],
    call_format: str = "auto",
    arguments: dict[str, Any] | None = None,
) -> tuple[ConversationRenderer, str | None]:
    """What writes conversations with an environment, and the format of calls; None for one without tools.

    Args:
        call_format: of `FORMATS`, or "auto" for the one in which the chat template writes calls.
        arguments: for the template.

    Raises:
        UserError: a tool that isn't described, or a template that writes no calls.
    """
    if not has_tools(environment):
        return ConversationRenderer(tokenizer, ends, arguments), None
    renderer = ConversationRenderer(tokenizer, ends, arguments, describe_tools(environment))
    return renderer, format_of(renderer.template, renderer.end_texts) if call_format == "auto" else call_format


class EpisodeSampler:
    """Plays episodes: what `ResponseSampler` is for single responses.

    Args:
        ends: tokens that end a response.
        environment: the class; every episode has an object of its own.
        call_format: of `FORMATS`, for an environment with tools, which the renderer describes to the policy.
    """

    plays_episodes = True

    def __init__(
        self,
        generator: Generator,
        tokenizer,
        ends: Iterable[int],
        environment: Callable[[], Environment],
        renderer: ConversationRenderer,
        limits: EnvironmentConfig,
        call_format: str | None = None,
    ):
        self.generator, self.tokenizer, self.ends = generator, tokenizer, list(ends)
        self.environment, self.renderer, self.limits = environment, renderer, limits
        self.call_format, self.calls = call_format, EnvironmentCalls(limits.timeout)

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: GenerationConfig,
        version: int = 0,
        on_sample: OnSample | None = None,
    ) -> Sampled:
        """See `Sampler`: an episode per prompt, whose columns are the row that it begins from. `seconds` has how long
        generation waited for environments.

        Raises:
            UserError: every episode's environment failed; it has the last error.
        """
        episodes = [Episode(prompt, self.new_environment()) for prompt in prompts]
        try:
            self.play(episodes, sampling)
        finally:
            self.close(episodes)
        failed = [episode for episode in episodes if episode.finish_reason == "failed"]
        if failed and len(failed) == len(episodes):
            raise UserError(f"the environment failed in all {len(failed)} episodes, the last with {failed[-1].error}")
        samples = notify_done([self.sample_of(episode, version) for episode in episodes], on_sample)
        return Sampled(samples, {"environment": sum(episode.waited for episode in episodes)})

    def new_environment(self) -> Environment:
        environment = self.environment()
        if self.call_format is None:
            return environment
        names = [tool["function"]["name"] for tool in self.renderer.template.tools]
        return ToolUse(environment, names, self.calls, self.limits.max_result_characters)

    def play(self, episodes: list[Episode], sampling: GenerationConfig):
        """Every episode to its end."""
        for episode in episodes:
            episode.waiting = self.calls.begin(episode.environment.reset, dict(episode.prompt.columns))
        for episode in episodes:
            self.begin(episode)
        responding = [episode for episode in episodes if episode.goes_on]  # by the numbers of their requests

        def heard(i: int, completion: Completion):
            self.hear(responding[i], completion)

        def next_turn(i: int) -> Request | None:
            episode = responding[i]
            self.observe(episode)
            if not episode.goes_on:
                return None
            responding.append(episode)
            return self.request(episode, sampling)

        requests = [self.request(episode, sampling) for episode in responding]
        turns = FollowUps(next_turn, self.limits.max_tokens, self.limits.answer_steps)
        self.generator.generate(requests, sampling, heard, turns)

    def begin(self, episode: Episode):
        """The first messages."""
        try:
            episode.messages = check_messages(self.answer(episode))
            if self.can_not_fit(episode.messages):
                raise EpisodeFailed("its first messages are too long: raise environment.max_tokens")
            ids = self.renderer.start(episode.messages)
            if len(ids) >= self.limits.max_tokens:
                raise EpisodeFailed(f"its first messages have {len(ids)} tokens: raise environment.max_tokens")
        except (EpisodeFailed, UserError) as error:
            return episode.fail(error)
        episode.append(ids)

    def answer(self, episode: Episode):
        """What the environment returned."""
        started = time.monotonic()
        try:
            return self.calls.result(episode.waiting)
        finally:
            episode.waited += time.monotonic() - started

    def request(self, episode: Episode, sampling: GenerationConfig) -> Request:
        """For the policy's next message."""
        turn, states, episode.states = len(episode.turns), episode.states, None
        limit = min(self.limits.max_tokens - len(episode.tokens), sampling.max_new_tokens)
        goes_on = turn + 1 < self.limits.max_turns
        return Request(episode.tokens[:], [*episode.prompt.seed, turn], limit, states=states, keep_states=goes_on)

    def hear(self, episode: Episode, completion: Completion):
        """Takes a response, and asks the environment about it unless it was truncated."""
        start = len(episode.tokens)
        episode.states, completion.states = completion.states, None  # who asked for them may drop them
        episode.append(completion.ids, completion.log_probs, sampled=True)
        episode.turns.append(Turn(start, len(episode.tokens)))
        text = response_text(self.tokenizer, completion.ids, self.ends).strip()
        episode.messages.append(read_response(text, self.call_format))
        if completion.finish_reason == "length":
            episode.finish_reason = "length"
            return
        episode.waiting = self.calls.begin(episode.environment.step, dict(episode.messages[-1]))

    def observe(self, episode: Episode):
        """Takes what the environment says to the last response."""
        if not episode.goes_on:
            return
        try:
            observation = check_observation(self.answer(episode))
            episode.earn(observation)
            episode.metrics |= observation.metrics
            if observation.done:
                episode.finish_reason = "done"
            else:
                self.tell(episode, observation.messages)
        except (EpisodeFailed, UserError) as error:  # a template may refuse what a policy has done, such as two calls
            episode.fail(error)
        if episode.goes_on and len(episode.turns) == self.limits.max_turns:
            episode.finish_reason = "turns"
        if not episode.goes_on:
            episode.states = None  # their memory is for the others'

    def tell(self, episode: Episode, messages: Messages):
        """Puts what the policy reads next after what there is, if there is room for it and a response."""
        *before, response = episode.messages
        episode.messages += messages
        if self.can_not_fit(messages):
            episode.finish_reason = "length"
            return
        is_ended = episode.tokens[-1] in self.renderer.ends
        episode.append(self.renderer.between(before, response, messages, is_ended))
        if len(episode.tokens) >= self.limits.max_tokens:
            episode.finish_reason = "length"

    def can_not_fit(self, messages: Messages) -> bool:
        """Whether a message is so long that there is no need to tokenize it."""
        return any(len(message["content"]) > LONGEST_TOKEN * self.limits.max_tokens for message in messages)

    def close(self, episodes: list[Episode]):
        """Has every environment clean up. What fails in it is of no consequence for its episode."""
        closing = [
            self.calls.begin(episode.environment.close) for episode in episodes if hasattr(episode.environment, "close")
        ]
        for future in closing:
            try:
                self.calls.result(future)
            except EpisodeFailed as error:
                logger.warning(f"closing an environment failed: {error}")

    def sample_of(self, episode: Episode, version: int) -> Sample:
        """An episode as a sample. It ends with the last response: what the environment said to that was not read."""
        first, last = (episode.turns[0].start, episode.turns[-1].end) if episode.turns else (None, None)
        tokens = episode.tokens[:last] or [self.ends[0]]  # an episode that has failed at once has none
        responses = [message["content"] for message in episode.messages if message["role"] == "assistant"]
        return Sample(
            row=episode.prompt.row,
            columns=episode.prompt.columns,
            prompt=self.tokenizer.decode(tokens[:first]),
            response=responses[-1] if episode.turns else "",
            tokens=tokens,
            response_mask=episode.mask[:last] or [False],
            log_probs=None if episode.log_probs is None else episode.log_probs[:last] or [0.0],
            finish_reason=episode.finish_reason,
            weights_version=version,
            turns=episode.turns,
            messages=episode.messages,
            metrics=episode.metrics,
        )
