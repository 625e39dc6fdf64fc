"""Generation, episodes and rewards of a plan: the real engine on a model without weights, scores that need no texts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from coati.config.environment import EnvironmentConfig
from coati.judges.local import Rows, SharedModel
from coati.models.base import load_transformer
from coati.parallel.engine import DTYPES
from coati.planner.engine import PlannedEngine, give_shapes
from coati.planner.live import LiveMemory
from coati.rewards import Reward
from coati.rollout import Completion, FollowUps, GenerationConfig, Prompt, Request, RolloutEngine, has_kv_cache
from coati.rollout.engine.batch import ContinuousBatch
from coati.rollout.engine.reader import KEPT_SHARE, PromptReader
from coati.rollout.engine.rows import states_in
from coati.rollout.generator import OnDone, notify_done
from coati.rollout.sampler import OnSample, Sampled
from coati.rollout.vllm import vllm_memory
from coati.samples import Sample, Turn

FIRST_TOKEN = 3  # those before are the tokenizer's own


class PlannedGenerator:
    """Completes requests as far as they may go, each with another first token: responses of a group have to differ.

    Args:
        eos_id: no completion ends with it.
        batch_size: rows generated together.
    """

    def __init__(self, live: LiveMemory, engine: PlannedEngine, eos_id: int, batch_size: int):
        self.live, self.engine, self.eos_id, self.batch_size = live, engine, eos_id, batch_size
        self.vllm: list[Any] = []  # what it takes
        self.done: set[tuple[int, int]] = set()

    def generate(
        self,
        requests: Sequence[Request],
        sampling: GenerationConfig,
        on_done: OnDone | None = None,
        follow_ups: FollowUps | None = None,
    ) -> list[Completion]:
        """See `coati.rollout.Generator`. No request follows, but there is memory for what they would go on from."""
        self.live.begin_phase("generate")
        if sampling.rollout_engine == "vllm":
            self.start_vllm(sampling)
        else:
            self.run_engine(requests, sampling, 0 if follow_ups is None else follow_ups.longest)
        limits = [r.max_new_tokens or sampling.max_new_tokens for r in requests]
        completions = [Completion([FIRST_TOKEN + i, *[0] * (n - 1)], [0.0] * n, "length") for i, n in enumerate(limits)]
        for request, completion in zip(requests, completions, strict=True):
            if request.heads:
                head = (np.arange(request.heads, dtype=np.int32), np.zeros(request.heads, dtype=np.float32))
                completion.heads = [head] * len(completion.ids)
        return notify_done(completions, on_done)

    def start_vllm(self, sampling: GenerationConfig):
        """It stays once it has started; on a GPU it sleeps after each call."""
        if not self.vllm:
            dtype = DTYPES[self.engine.precision]
            for kind, nbytes in vllm_memory(self.engine.module, sampling, dtype, self.engine.memory.on_gpu).items():
                self.vllm.append(self.live.make(nbytes, ("vLLM", kind)))
        if self.engine.memory.on_gpu:
            self.vllm.clear()

    def run_engine(self, requests: Sequence[Request], sampling: GenerationConfig, kept: int):
        """The rows that fill the slots, and one that is read when a slot is free again: the others take no more. Beams
        are rows. Models that `RolloutEngine` doesn't support are skipped.

        Args:
            kept: tokens whose keys and values are kept of each row.
        """
        work = (len(requests), max((len(r.prompt) for r in requests), default=0))
        if work in self.done or not requests:
            return
        self.done.add(work)
        with self.engine.full() as model:
            if not has_kv_cache(model):
                return
            rows = [request for request in requests for _ in range(sampling.num_beams)][: self.batch_size + 1]
            plain = replace(sampling, num_beams=1, compile_generation=False)
            engine = FirstAndLastToken(
                model,
                plain,
                eos_ids=[self.eos_id],
                slots=self.batch_size,
                live=self.live,
                item=(self.engine.name, "KV cache"),
                kept_tokens=kept,
            )
            engine.generate(rows)


class PlannedPromptReader(PromptReader):
    """Tells `hold` of the keys and values that it makes."""

    def __init__(self, model, most_rows: int, most_tokens: int, hold: Callable[[Any], None]):
        super().__init__(model, most_rows, most_tokens)
        self.hold = hold

    def read_batch(self, *arguments, **options):
        cache, logits = super().read_batch(*arguments, **options)
        self.hold(cache)
        return cache, logits


class PlannedBatch(ContinuousBatch):
    """Of a `FirstAndLastToken`."""

    slots_held, waiting_rows = False, None

    def start_rows(self, new, slots):
        if not self.slots_held:
            self.slots_held = True
            self.engine.hold(self.state.cache)
            if self.engine.kept_tokens:
                self.waiting_rows = self.engine.make_waiting_rows(self.state.cache)
        super().start_rows(new, slots)

    def step(self):
        skipped = min(row.limit - row.drawn for row in self.rows) - 1
        for row in self.rows:
            row.drawn += skipped
            row.completion.ids += [0] * skipped
            row.completion.log_probs += [0.0] * skipped
        count = len(self.rows)
        self.state.cache.lengths[:count] += skipped
        self.state.drawn[:count] += skipped
        super().step()


class FirstAndLastToken(RolloutEngine):
    """Goes from the first token of each row to its last one. It draws token 0.

    Args:
        live, item: what keys and values are told to, and as what.
        kept_tokens: of each row that waits for an environment. As many wait as there are slots, and as many of them as
            are read together are copied.
        **options: of `RolloutEngine`.
    """

    batch_class = PlannedBatch

    def __init__(self, *arguments, live: LiveMemory, item: tuple[str, str], kept_tokens: int, **options):
        super().__init__(*arguments, **options)
        self.live, self.item, self.kept_tokens = live, item, kept_tokens
        self.reader = PlannedPromptReader(self.model, self.slots, self.reader.most_tokens, self.hold)
        self.draw_from = self.sampler
        self.sampler = self.draw_zeros

    def draw_zeros(self, logits, keys, counts, seen=None):
        self.draw_from(logits, keys, counts, seen)
        return torch.zeros(len(logits), dtype=torch.long), torch.zeros(len(logits))

    def gains_from_packing(self, steps):
        return False  # which is for CPUs, and models here have no weights to copy

    def hold(self, cache):
        self.live.hold(states_in(cache), self.item)

    def make_waiting_rows(self, cache):
        """What is kept of rows that wait, and copied of those that come back."""
        tokens = cache.slots * self.kept_tokens
        copied = min(tokens, KEPT_SHARE * self.reader.most_tokens)
        per_token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in states_in(cache))
        return self.live.make(per_token * (tokens + copied), self.item)


class PlannedEpisodes:
    """Episodes of the most turns and tokens, all different. See `coati.rollout.EpisodeSampler`."""

    plays_episodes = True

    def __init__(self, generator: PlannedGenerator, limits: EnvironmentConfig):
        self.generator, self.limits = generator, limits

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: GenerationConfig,
        version: int = 0,
        on_sample: OnSample | None = None,
    ) -> Sampled:
        """One episode per prompt."""
        room = self.limits.max_tokens - sampling.max_new_tokens
        starts = np.random.default_rng(0).integers(3, 1000, (len(prompts), room)).tolist()  # equal ones are read once
        follow_ups = FollowUps(lambda number: None, self.limits.max_tokens)
        self.generator.generate([Request(start, i) for i, start in enumerate(starts)], sampling, None, follow_ups)
        samples = [self.episode(prompt, i, sampling.max_new_tokens) for i, prompt in enumerate(prompts)]
        return Sampled(notify_done(samples, on_sample), {"environment": 0.0})

    def episode(self, prompt: Prompt, i: int, longest: int) -> Sample:
        """Turns of `longest` tokens, each after one token at least that is not sampled."""
        most = self.limits.max_tokens
        count = min(self.limits.max_turns, most // (longest + 1))
        first = most - count * longest - (count - 1)
        starts = [first + turn * (longest + 1) for turn in range(count)]
        mask = [False] * most
        for start in starts:
            mask[start : start + longest] = [True] * longest
        messages = [{"role": role, "content": ""} for _ in starts for role in ("user", "assistant")]
        return Sample(
            row=prompt.row,
            columns=prompt.columns,
            prompt="",
            response="",
            tokens=[FIRST_TOKEN + i] * most,
            response_mask=mask,
            log_probs=[0.0] * most,
            finish_reason="turns",
            turns=[Turn(start, start + longest, float(i % 2)) for start in starts],
            messages=messages,
        )


class PlannedReward(Reward):
    """Rewards by rule, functions and endpoints take no memory of the device. Neighbors get different scores."""

    name = "rules"

    def score(self, samples):
        return [float(i % 2) for i in range(len(samples))]


class PlannedReader(Reward):
    """A model of a reward's own: a sequence classifier, or a judge in this process.

    Args:
        name: of the model in the plan; auto_class: transformers' class of it.
        model_config: of transformers.
        batch_size: texts that it reads together.
        length: from the tokens of the policy's longest sample to those of a text.
    """

    def __init__(
        self,
        live: LiveMemory,
        name: str,
        auto_class: str,
        model_config,
        batch_size: int,
        length: Callable[[int], int],
    ):
        self.live, self.name, self.batch_size, self.length = live, name, batch_size, length
        with torch.device("meta"):
            self.model = load_transformer(auto_class, None, model_config, {})
        self.model.requires_grad_(False).eval()
        give_shapes(self.model, live.fake)
        live.hold([*self.model.parameters(), *self.model.buffers()], (name, "parameters"))

    @torch.no_grad()
    def score(self, samples):
        self.live.begin_phase("score")
        rows = min(self.batch_size, len(samples))
        ids = torch.zeros(rows, self.length(max(len(sample.tokens) for sample in samples)), dtype=torch.long)
        with self.live.attributed_to(self.name, 0):
            self.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return [0.0] * len(samples)


class PlannedSharedJudge(Reward):
    """A judge of which each process has a part.

    Args:
        read: its model; batch_size, length: as `PlannedReader`.
    """

    name = "judge"

    def __init__(self, read: SharedModel, batch_size: int, length: Callable[[int], int]):
        self.read, self.batch_size, self.length = read, batch_size, length

    def score(self, samples):
        longest = self.length(max(len(sample.tokens) for sample in samples))
        rows = min(self.batch_size, len(samples))
        self.read([Rows([[FIRST_TOKEN] * longest] * rows, [torch.tensor([FIRST_TOKEN])] * rows)])
        return [0.0] * len(samples)
