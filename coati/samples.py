"""Samples of a rollout, token by token. Free of torch, as the processes that score samples are."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Turn:
    """A message that the policy sampled in an episode.

    Attributes:
        start, end: its tokens, as places in the sample's; the end is exclusive.
        reward: what the environment gave for it.
    """

    start: int
    end: int
    reward: float = 0.0


@dataclass
class Sample:
    """A prompt and the policy's response; of an episode with an environment, all turns of both.

    Per-token lists are aligned with `tokens`.

    Attributes:
        row: number of the data's row that the prompt is from; columns: the row's other fields.
        prompt, response: the texts, without what ends a response; of an episode, its last response.
        tokens: ids of the prompt and of all that came after it.
        response_mask: True on the tokens that the policy sampled (EOS included), which may be in several parts.
        log_probs: of the sampled tokens, at the sampling temperature and before top-k and the like; 0 elsewhere. None
            where the generator gives none (beam search).
        heads: for each of the sampled tokens, the ids and the log-probs of those that were most likely there, two
            arrays `[heads]`; empty where they were not asked for.
        routing: the experts that tokens of a mixture went to, int16 `[tokens - 1, layers, k]` (the last token is not
            read); None where that was not asked for.
        finish_reason: "eos", "stop" (a stop text or id) or "length"; of an episode "done", "length" (of its tokens, or
            of a response), "turns" (no more are allowed) or "failed" (its environment has).
        weights_version: the iteration whose weights sampled it, or its last part.
        parts: of a response that several versions have drawn, each part's end, as a place in `tokens`, and version.
        rewards: each reward by name, unweighted; per-token rewards are summed; None where it was skipped.
        details: what rewards told beside their scores, by `NAME/DETAIL`.
        failed: of the rewards that may fail for one sample, whether they could not score it.
        score: the weighted sum of the rewards of whole responses.
        token_rewards: the weighted sum of the rewards of tokens; None without any.
        turns: of an episode, what was sampled; messages: its conversation; metrics: numbers that its environment gave.
    """

    row: int
    columns: dict[str, Any]
    prompt: str
    response: str
    tokens: list[int]
    response_mask: list[bool]
    log_probs: list[float] | None
    finish_reason: str
    weights_version: int = 0
    parts: list[list[int]] = field(default_factory=list)
    heads: list[tuple[Any, Any]] = field(default_factory=list)
    routing: Any = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    failed: dict[str, bool] = field(default_factory=dict)
    score: float = 0.0
    token_rewards: list[float] | None = None
    turns: list[Turn] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_texts(cls, prompt: str, response: str, **columns: Any) -> "Sample":
        """Texts without tokens, for rewards that read texts."""
        return cls(0, columns, prompt, response, tokens=[], response_mask=[], log_probs=None, finish_reason="eos")

    @property
    def truncated(self) -> bool:
        """Whether the response was truncated at its maximum length, or the episode ended before it was done."""
        return self.finish_reason in ("length", "turns", "failed")

    @property
    def response_length(self) -> int:
        """Sampled tokens."""
        return sum(self.response_mask)

    @property
    def total_reward(self) -> float:
        """All rewards, of the whole response and of its tokens."""
        return self.score + sum(self.token_rewards or ())


@dataclass
class SampleGroup:
    """The samples of one prompt."""

    samples: list[Sample]

    @property
    def all_equal(self) -> bool:
        """Whether all have the same reward, so that no advantage differs from 0."""
        return len({sample.total_reward for sample in self.samples}) == 1
