"""Prompts in, samples out: what a policy says to prompts, with its tokens and their log-probs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.rollout.generator import Completion, Generator, Request
from coati.rollout.prompts import response_text
from coati.samples import Sample


@dataclass(frozen=True)
class Prompt:
    """A prompt of an iteration.

    Attributes:
        row: number of the data's row; seed: of the response's noise.
        input_ids, text, columns: of the row, as `coati.data.PromptSample` has them.
        begun: how many of the last of `input_ids` are of the response already.
        max_new_tokens: how many more it may have, if not as many as the sampling says.
    """

    row: int
    seed: Sequence[int]
    input_ids: list[int]
    text: str
    columns: dict[str, Any]
    begun: int = 0
    max_new_tokens: int | None = None

    @classmethod
    def from_sample(cls, sample: Sample) -> "Prompt":
        """The prompt of a sample, without a seed."""
        first = sample.response_mask.index(True)
        return cls(sample.row, [0], sample.tokens[:first], sample.prompt, sample.columns)


def prompts_of_texts(
    texts: Sequence[str], tokenizer, columns: Sequence[dict[str, Any]] | None = None, seed: int = 0
) -> list[Prompt]:
    """Prompts from texts as the model reads them (a chat template is already applied); the seed of row i is [seed, i].

    Args:
        columns: further fields, per text.

    Raises:
        UserError: a text is empty.
    """
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if not all(rows):
        raise UserError(f"prompt {rows.index([])} is empty")
    columns = columns or [{}] * len(texts)
    return [
        Prompt(i, [seed, i], ids, text, of_row)
        for i, (ids, text, of_row) in enumerate(zip(rows, texts, columns, strict=True))
    ]


OnSample = Callable[[int, Sample], Any]


@dataclass(frozen=True)
class Sampled:
    """Samples without rewards, in the order of their prompts, and the seconds that parts of the work took by name."""

    samples: list[Sample]
    seconds: dict[str, float] = field(default_factory=dict)


class Sampler(Protocol):
    """Has a policy respond to prompts, or play episodes with an environment.

    Attributes:
        plays_episodes: whether it does the latter.
    """

    plays_episodes: bool

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: GenerationConfig,
        version: int = 0,
        on_sample: OnSample | None = None,
    ) -> Sampled:
        """One sample per prompt.

        Args:
            sampling: how tokens are drawn.
            version: of the weights that sample.
            on_sample: called with a prompt's place and its sample as soon as that is known to have ended.
        """


class ResponseSampler:
    """One response per prompt.

    Args:
        tokenizer: of the policy.
        ends: tokens that end a response, which are no part of its text.
        heads, with_routing: what requests ask for, see `Request`.
    """

    plays_episodes = False

    def __init__(
        self, generator: Generator, tokenizer, ends: Iterable[int], heads: int = 0, with_routing: bool = False
    ):
        self.generator, self.tokenizer, self.ends = generator, tokenizer, list(ends)
        self.heads, self.with_routing = heads, with_routing

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: GenerationConfig,
        version: int = 0,
        on_sample: OnSample | None = None,
    ) -> Sampled:
        """See `Sampler`."""
        samples: list[Sample | None] = [None] * len(prompts)

        def finish(i: int, completion: Completion):
            samples[i] = self._sample(prompts[i], completion, version)
            if on_sample is not None:
                on_sample(i, samples[i])

        asked = dict(heads=self.heads, with_routing=self.with_routing)
        requests = [
            Request(prompt.input_ids, prompt.seed, prompt.max_new_tokens, begun=prompt.begun, **asked)
            for prompt in prompts
        ]
        self.generator.generate(requests, sampling, finish)
        return Sampled(samples)

    def _sample(self, prompt: Prompt, completion: Completion, version: int) -> Sample:
        """A sample whose response mask and log-probs are of what was drawn now; its text is of the whole response."""
        asked, sampled = len(prompt.input_ids), len(completion.ids)
        known = completion.log_probs is not None
        response = [*prompt.input_ids[asked - prompt.begun :], *completion.ids]
        return Sample(
            row=prompt.row,
            columns=prompt.columns,
            prompt=prompt.text,
            response=response_text(self.tokenizer, response, self.ends).strip(),
            tokens=[*prompt.input_ids, *completion.ids],
            response_mask=[False] * asked + [True] * sampled,
            log_probs=[0.0] * asked + completion.log_probs if known else None,
            heads=completion.heads,
            routing=completion.routing,
            finish_reason=completion.finish_reason,
            weights_version=version,
        )
