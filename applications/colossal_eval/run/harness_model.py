"""The lm-evaluation-harness model: one forward pass per question, batches distributed over all ranks, responses stored
as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from coati.errors import UserError
from coati.parallel.communication import Communicator
from coati.rollout.prompts import eos_ids, response_texts
from coati.tracking.config import TrackingConfig
from coati.tracking.progress import progress_bar
from colossal_eval.run.greedy_generation import respond
from colossal_eval.run.log_probs import Batch, BatchLimits, LogProbScorer, TokenRow, plan_batches, token_budget
from colossal_eval.run.model_loading import Loaded
from colossal_eval.run.prompt_tokenizer import PromptTokenizer
from colossal_eval.run.response_store import ResponseStore, digest

ROWS = 64  # of a batch of generated responses


@dataclass
class Work:
    """Rows that are read together, by one rank.

    Attributes:
        keys: of each row: the hash of all that its response depends on.
        about: of each row: the task and the question.
        run: gives their responses, in this order.
    """

    keys: list[str]
    about: list[dict]
    run: Callable[[], list]


class CoatiLM(LM):
    """A loaded model for lm-eval. To lm-eval it is a single process, which distributes the work over the ranks.

    Args:
        loaded: see `model_loading.load_model`.
        store: where responses are kept.
        communicator: of all ranks.
        batch_tokens: tokens of a batch, None to find it from the memory.
        settings: whatever else the responses depend on, such as the dtype.
    """

    def __init__(
        self,
        loaded: Loaded,
        store: ResponseStore,
        communicator: Communicator,
        tracking: TrackingConfig | None = None,
        batch_tokens: int | None = None,
        settings: dict | None = None,
    ):
        super().__init__()
        self.loaded, self.store, self.communicator = loaded, store, communicator
        self.tracking = tracking or TrackingConfig(progress="off")
        self.prompt_tokenizer = PromptTokenizer(loaded.tokenizer, loaded.max_length)
        self.scorer = LogProbScorer(loaded.actor)
        self.batch_tokens = min(communicator.gather(batch_tokens or token_budget(loaded.actor)))
        self._ends = eos_ids(loaded.tokenizer, loaded.actor)
        self.identity = [loaded.fingerprint, settings or {}]

    @property
    def tokenizer_name(self) -> str:
        return self.loaded.fingerprint

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """The messages as the tokenizer's own template writes them.

        Raises:
            UserError: it has none.
        """
        if not self.loaded.tokenizer.chat_template:
            raise UserError(f"{self.loaded.name}'s tokenizer has no chat template: leave out --chat_template")
        return self.loaded.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    # --- what lm-eval asks for

    def unanswered(self, requests: list[Instance]) -> list[None]:
        """Questions that do not fit are not asked."""
        return [None] * len(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probs in nats of continuations, and whether greedy decoding would give them; in the order asked."""
        rows, about, positions = self._rows(requests)
        groups = [list(group) for _, group in groupby(range(len(rows)), key=lambda i: about[i]["task"])]
        vocabulary = self.loaded.actor.transformer.get_output_embeddings().weight.shape[0]
        limits = BatchLimits(self.batch_tokens, vocabulary, self.scorer.shares_prefix, self.scorer.batches_rows)
        batches = plan_batches(rows, groups, limits)

        def work(batch: Batch) -> Work:
            chosen = [rows[i] for i in batch.rows]
            keys = [self._key("loglikelihood", row.ids.tolist(), row.targets) for row in chosen]
            return Work(keys, [about[i] for i in batch.rows], partial(self.scorer.score, chosen, batch.prefix))

        responses = self._respond([work(batch) for batch in batches], "Scoring")
        by_row = dict(zip([i for batch in batches for i in batch.rows], responses, strict=True))
        return [tuple(by_row[row][target]) for row, target in positions]

    def _rows(self, requests: list[Instance]) -> tuple[list[TokenRow], list[dict], list[tuple[int, int]]]:
        """One row for all single-token continuations of a prompt, one for each longer one; what they are about; and of
        each request its row and place in it."""
        numbers: dict[tuple, int] = {}
        targets: list[list[tuple[int, ...]]] = []
        about, ids, positions = [], [], []
        for request in requests:
            context, text = request.args
            target = self.prompt_tokenizer.continuation(context, text)
            row = numbers.setdefault((request.task_name, request.doc_id, context, target[:-1]), len(targets))
            if row == len(targets):
                targets.append([])
                about.append(_about(request))
                ids.append(
                    np.concatenate([self.prompt_tokenizer.encode(context), np.asarray(target[:-1], dtype=np.int32)])
                )
            if target not in targets[row]:
                targets[row].append(target)
            positions.append((row, targets[row].index(target)))
        rows = [TokenRow(i, len(t[0]), tuple(t)) for i, t in zip(ids, targets, strict=True)]
        return rows, about, positions

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy responses up to the first of the `until` texts or EOS, by coati's rollout engine; in the order asked.

        Raises:
            UserError: requests that sample.
        """
        prompts = [self.prompt_tokenizer.encode(request.args[0]) for request in requests]
        limits = [_limit(request) for request in requests]
        kinds = [(request.task_name, *limit) for request, limit in zip(requests, limits, strict=True)]
        order = sorted(range(len(requests)), key=lambda i: (kinds[i], len(prompts[i]), i))
        works = []
        for _, group in groupby(order, key=lambda i: kinds[i]):
            alike = list(group)
            for start in range(0, len(alike), ROWS):
                part = alike[start : start + ROWS]
                limit = limits[part[0]]
                keys = [self._key("generate", prompts[i].tolist(), limit) for i in part]
                run = partial(self._generate, [prompts[i] for i in part], *limit)
                works.append(Work(keys, [_about(requests[i]) for i in part], run))
        responses = self._respond(works, "Generating")
        return [text for _, text in sorted(zip(order, responses, strict=True))]

    def _generate(self, prompts: list[np.ndarray], max_new_tokens: int, until: tuple[str, ...]) -> list[str]:
        tokenizer = self.loaded.tokenizer
        responses = respond(self.scorer, tokenizer, prompts, max_new_tokens, list(until), self._ends)
        return [_cut(text, until) for text in response_texts(tokenizer, responses, self._ends)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probs of whole texts in nats, each token given as many before it as fit (lm-eval's windows)."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokenizer, works, counts = self.prompt_tokenizer, [], []
        first = tokenizer.start[0] if tokenizer.start else self._ends[0]
        for request in requests:
            ids = tokenizer.encode(request.args[0])[len(tokenizer.start) :].tolist()
            counts.append(0)
            for window in get_rolling_token_windows(ids, first, tokenizer.max_length - 1, 1):
                context, target = make_disjoint_window(window)
                row = TokenRow(np.asarray([*context, *target[:-1]], dtype=np.int32), len(target), (tuple(target),))
                key = self._key("rolling", row.ids.tolist(), row.targets)
                works.append(Work([key], [_about(request)], partial(self.scorer.score, [row], 0)))
                counts[-1] += 1
        log_probs = [log_prob for [(log_prob, _)] in self._respond(works, "Reading")]
        ends = np.cumsum(counts).tolist()
        return [sum(log_probs[end - count : end]) for count, end in zip(counts, ends, strict=True)]

    # --- distribution over the ranks

    def _key(self, *request) -> str:
        return digest(self.identity, *request)

    def _respond(self, works: list[Work], description: str) -> list:
        """The responses to all works' rows, in order. Missing works are distributed to the ranks in contiguous parts; a
        work is always done completely, so that its responses don't depend on what was stored."""
        communicator = self.communicator
        self.store.reused += sum(key in self.store for work in works for key in work.keys)
        missing = [work for work in works if any(key not in self.store for key in work.keys)]
        first = len(missing) * communicator.rank // communicator.world_size
        last = len(missing) * (communicator.rank + 1) // communicator.world_size
        new: list[dict] = []
        with progress_bar(last - first, f"{description} {self.loaded.name}", self.tracking) as bar:
            for work in missing[first:last]:
                before = self.scorer.usage.read
                records = [
                    {"key": key, "model": self.loaded.name, **about, "answer": response}
                    for key, about, response in zip(work.keys, work.about, work.run(), strict=True)
                    if key not in self.store
                ]
                self.store.append(records)
                new += records
                bar.advance(tokens=self.scorer.usage.read - before)
        for records in communicator.gather(new):
            self.store.merge(records)
        return [self.store[key] for work in works for key in work.keys]


def _about(request: Instance) -> dict:
    """The task and the question; other tasks' questions have no id but their place."""
    return {"task": request.task_name, "id": request.doc.get("id", request.doc_id)}


def _limit(request: Instance) -> tuple[int, tuple[str, ...]]:
    """How many tokens a response may have, and the texts that end it."""
    settings = request.args[1]
    if settings.get("do_sample") or settings.get("temperature", 0.0):
        raise UserError(f"the task {request.task_name} samples its responses: this model supports greedy decoding only")
    until = settings.get("until") or []
    if isinstance(until, str):
        until = [until]
    return int(settings.get("max_gen_toks", 256)), tuple(until)


def _cut(text: str, until: tuple[str, ...]) -> str:
    """The text up to the first of `until`."""
    ends = [text.find(stop) for stop in until if stop in text]
    return text[: min(ends, default=len(text))]
