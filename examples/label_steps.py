"""Labels of steps by sampling (Math-Shepherd, 2312.08935, section 3.3): from each step of its responses a policy
goes on several times, and the label is the share of these completions that the rewards find right.

    python examples/label_steps.py --model runs/sft/model --prompts gsm8k.jsonl --rewards gsm8k --output steps.jsonl

The rows are what `coati prm` learns from.
"""

import json
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.config import ListOf, Settings, option, parse_config, section, settings
from coati.config.generation import GenerationConfig
from coati.rewards.config import AnyReward, ScoringConfig, load_rewards
from coati.samples import Sample
from coati.steps import decode_with_starts, step_spans


@settings
class LabelStepsConfig(Settings):
    """Settings of the labeling of steps."""

    model: str = option(..., "the policy that responds, and completes from each step", path="model")
    prompts: str = option(..., "rows with prompts, and what the rewards read", path="data")
    rewards: ListOf[AnyReward] = option((), "what finds a solution right, such as math; see docs/rewards.md")
    output: str = option(..., "file of the labeled rows", path="output")
    rows: int | None = option(None, "at most so many prompts; all if not given", ge=1)
    responses: int = option(2, "responses to a prompt", ge=1)
    completions: int = option(8, "completions from each step", ge=1)
    hard: bool = option(False, "a step is right if one of its completions is, instead of their share")
    right_from: float = option(0.5, "the sum of rewards from which on a solution is right")
    step_separator: str = option("\n", "what stands between the steps of a response")
    seed: int = option(0, "of what is drawn")
    generation: GenerationConfig = section(GenerationConfig, "how responses and completions are drawn")


@dataclass(frozen=True)
class Step:
    """A step of a response: its text, and the sampled tokens before the next step."""

    text: str
    tokens: list[int]


def steps_of_response(ids: Sequence[int], tokenizer, separator: str) -> list[Step]:
    """The steps of sampled ids, without what ends the response. A token that goes on into the next step is left out, so
    that it is sampled again."""
    text, starts = decode_with_starts(ids, tokenizer)
    spans, starts = step_spans(text, separator), [*starts, len(text)]
    next_starts = [start for start, _ in spans[1:]] + [len(text)]
    steps = []
    for (first, end), following in zip(spans, next_starts, strict=False):
        count = bisect_left(starts, following)  # tokens that start before the next step
        if starts[count] > following:  # the last of them goes on into it
            count -= 1
        steps.append(Step(text[first:end], list(ids[:count])))
    return steps


class StepLabeler:
    """Completes solutions from their steps.

    Args:
        generator: of completions; scorer: the rewards; tokenizer: of the policy; ends: tokens that end a response.
    """

    def __init__(self, config: LabelStepsConfig, generator, scorer, tokenizer, ends: Sequence[int]):
        self.config, self.generator, self.scorer = config, generator, scorer
        self.tokenizer, self.ends = tokenizer, list(ends)

    def respond(
        self, prompts: Sequence[Sample], begun: Sequence[list[int]], seeds: Sequence[list[int]]
    ) -> list[Sample]:
        """Scored samples, each of a prompt (a sample without a response) and a response that begins with these ids."""
        from coati.rollout.generator import Request
        from coati.rollout.prompts import response_text

        longest = self.config.generation.max_new_tokens
        requests = [
            Request(prompt.tokens + ids, seed, max(longest - len(ids), 1))
            for prompt, ids, seed in zip(prompts, begun, seeds, strict=True)
        ]
        samples = []
        completions = self.generator.generate(requests, self.config.generation)
        for prompt, ids, completion in zip(prompts, begun, completions, strict=True):
            response = ids + completion.ids
            mask = [False] * len(prompt.tokens) + [True] * len(response)
            text = response_text(self.tokenizer, response, self.ends).strip()
            tokens = prompt.tokens + response
            how = dict(tokens=tokens, response_mask=mask, response=text, finish_reason=completion.finish_reason)
            samples.append(replace(prompt, **how))
        self.scorer.score(samples)
        return samples

    def label(self, prompts: Sequence[Sample]) -> list[tuple[list[str], list[float]]]:
        """The steps of a response to each prompt, and their labels. The last step of a response that ended is right if
        the response is; one that was truncated is left out."""
        c = self.config
        numbers = range(len(prompts))
        responses = self.respond(prompts, [[] for _ in prompts], [[c.seed, i] for i in numbers])
        rows: list[tuple[list[str], list[float]]] = []
        asked: list[tuple[int, list[int]]] = []
        for i, (prompt, sample) in enumerate(zip(prompts, responses, strict=True)):
            ids = [id for id in sample.tokens[len(prompt.tokens) :] if id not in self.ends]
            *open_steps, last = steps_of_response(ids, self.tokenizer, c.step_separator) or [None]
            closing = [] if last is None or sample.truncated else [last.text]
            rows.append(([step.text for step in open_steps] + closing, [float(self.is_right(sample))] * len(closing)))
            asked += [(i, step.tokens) for step in open_steps for _ in range(c.completions)]
        places = [i for i, _ in asked]
        seeds = [[c.seed, len(prompts) + k] for k in range(len(asked))]
        done = self.respond([prompts[i] for i in places], [ids for _, ids in asked], seeds)
        right = [self.is_right(sample) for sample in done]
        shares = [right[k : k + c.completions] for k in range(0, len(right), c.completions)]
        of_rows: list[list[float]] = [[] for _ in prompts]
        for i, share in zip(places[:: c.completions], shares, strict=True):
            of_rows[i].append(float(any(share)) if c.hard else sum(share) / c.completions)
        return [(texts, of_row + closing) for (texts, closing), of_row in zip(rows, of_rows, strict=True)]

    def is_right(self, sample: Sample) -> bool:
        return sample.total_reward >= self.config.right_from


def read_prompts(config: LabelStepsConfig, tokenizer) -> Iterator[tuple[list[dict], Sample]]:
    """The messages of each prompt, and the prompt as a sample without a response.

    Raises:
        UserError: a row is no prompt; it names file and line.
    """
    from coati.data import DataConfig, load_rows, parse_record, tokenize
    from coati.errors import UserError

    for line, row in load_rows(config.prompts):
        try:
            if isinstance(row, ValueError):
                raise row
            [record, *_] = parse_record(row, "prompt")
            prompt: Any = tokenize(record, tokenizer, DataConfig())
        except ValueError as error:
            raise UserError(f"{config.prompts}, line {line}: {error}") from None
        texts = dict(row=line, columns=prompt.columns, prompt=prompt.text, response="", finish_reason="")
        yield record.prompt, Sample(**texts, tokens=prompt.input_ids, response_mask=[], log_probs=None)


def main():
    config = parse_config(LabelStepsConfig, sys.argv[1:], __doc__.splitlines()[0])
    from transformers import AutoTokenizer

    from coati.data import prepare_tokenizer
    from coati.files import atomic_write
    from coati.models import Actor
    from coati.rollout import PolicyGenerator
    from coati.rollout.prompts import eos_ids

    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(config.model), learns_responses=False)
    actor = Actor(config.model).eval()
    scorer = load_rewards(config.rewards, ScoringConfig())
    batch_size = config.generation.generation_batch_size
    generator = PolicyGenerator.of_actor(actor, tokenizer, batch_size)
    labeler = StepLabeler(config, generator, scorer, tokenizer, eos_ids(tokenizer, actor))
    prompts = [one for one in islice(read_prompts(config, tokenizer), config.rows) for _ in range(config.responses)]
    labeled = labeler.label([sample for _, sample in prompts])
    rows = [
        {"prompt": messages, "steps": steps, "labels": labels}
        for (messages, _), (steps, labels) in zip(prompts, labeled, strict=True)
        if steps
    ]
    with atomic_write(Path(config.output)) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    values = [label for row in rows for label in row["labels"]]
    share = sum(values) / max(len(values), 1)
    print(f"{len(rows)} responses of {len(values)} steps, {share:.3f} right, in {config.output}")


if __name__ == "__main__":
    main()
