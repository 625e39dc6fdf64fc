"""The lm-evaluation-harness model: one forward a question, batches shared by all ranks, answers kept as they come."""

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
from colossal_eval.run.greedy_generation import answer
from colossal_eval.run.log_probs import Batch, Room, Row, Scorer, plan, token_budget
from colossal_eval.run.model_loading import Loaded
from colossal_eval.run.prompt_tokenizer import Text
from colossal_eval.run.response_store import AnswerStore, digest

ROWS = 64  # of a batch of generated answers


@dataclass
class Work:
    """Rows that are answered together, by one rank.

    Attributes:
        keys: of each row: the hash of all that its answer depends on.
        about: of each row: the task and the question.
        run: gives their answers, in this order.
    """

    keys: list[str]
    about: list[dict]
    run: Callable[[], list]


class CoatiLM(LM):
    """A loaded model for lm-eval. To lm-eval it is a single process: ranks share the work inside it.

    Args:
        loaded: see `models.load_model`.
        store: where answers are kept.
        communicator: of all ranks.
        batch_tokens: tokens of a batch, None to find it from the memory.
        settings: whatever else the answers depend on, such as the dtype.
    """

    def __init__(
        self,
        loaded: Loaded,
        store: AnswerStore,
        communicator: Communicator,
        tracking: TrackingConfig | None = None,
        batch_tokens: int | None = None,
        settings: dict | None = None,
    ):
        super().__init__()
        self.loaded, self.store, self.communicator = loaded, store, communicator
        self.tracking = tracking or TrackingConfig(progress="off")
        self.text = Text(loaded.tokenizer, loaded.max_length)
        self.scorer = Scorer(loaded.actor)
        self.batch_tokens = min(communicator.gather(batch_tokens or token_budget(loaded.actor)))
        self._ends = eos_ids(loaded.tokenizer, loaded.actor)
        self.identity = [loaded.fingerprint, settings or {}]
        self.letter_styles, self.fits, self.count = self.text.letter_styles, self.text.fits, self.text.count

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
        rows, about, places = self._rows(requests)
        groups = [list(group) for _, group in groupby(range(len(rows)), key=lambda i: about[i]["task"])]
        vocabulary = self.loaded.actor.transformer.get_output_embeddings().weight.shape[0]
        room = Room(self.batch_tokens, vocabulary, self.scorer.sharing, self.scorer.batching)
        batches = plan(rows, groups, room)

        def work(batch: Batch) -> Work:
            mine = [rows[i] for i in batch.rows]
            keys = [self._key("loglikelihood", row.ids.tolist(), row.targets) for row in mine]
            return Work(keys, [about[i] for i in batch.rows], lambda: self.scorer.score(mine, batch.prefix))

        answers = self._answer([work(batch) for batch in batches], "Scoring")
        by_row = dict(zip([i for batch in batches for i in batch.rows], answers, strict=True))
        return [tuple(by_row[row][target]) for row, target in places]

    def _rows(self, requests: list[Instance]) -> tuple[list[Row], list[dict], list[tuple[int, int]]]:
        """One row for all single-token continuations of a prompt, one for each longer one; what they are about; and of
        each request its row and place in it."""
        numbers: dict[tuple, int] = {}
        targets: list[list[tuple[int, ...]]] = []
        about, ids, places = [], [], []
        for request in requests:
            context, text = request.args
            target = self.text.continuation(context, text)
            row = numbers.setdefault((request.task_name, request.doc_id, context, target[:-1]), len(targets))
            if row == len(targets):
                targets.append([])
                about.append(_about(request))
                ids.append(np.concatenate([self.text.encode(context), np.asarray(target[:-1], dtype=np.int32)]))
            if target not in targets[row]:
                targets[row].append(target)
            places.append((row, targets[row].index(target)))
        rows = [Row(i, len(t[0]), tuple(t)) for i, t in zip(ids, targets, strict=True)]
        return rows, about, places

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers up to the first of the `until` texts or EOS, by coati's rollout engine; in the order asked.

        Raises:
            UserError: requests that sample.
        """
        works, order = [], []
        prompts = [self.text.encode(request.args[0]) for request in requests]
        kinds = [(request.task_name, *_limit(request)) for request in requests]
        asked = sorted(range(len(requests)), key=lambda i: (kinds[i], len(prompts[i]), i))
        for kind, group in groupby(asked, key=lambda i: kinds[i]):
            alike = list(group)
            for start in range(0, len(alike), ROWS):
                part = alike[start : start + ROWS]
                order += part
                keys = [self._key("generate", prompts[i].tolist(), kind[1:]) for i in part]
                run = partial(self._generate, [prompts[i] for i in part], kind[1:])
                works.append(Work(keys, [_about(requests[i]) for i in part], run))
        answers = self._answer(works, "Generating")
        return [text for _, text in sorted(zip(order, answers, strict=True))]

    def _generate(self, prompts: list[np.ndarray], limit: tuple[int, tuple[str, ...]]) -> list[str]:
        responses = answer(self.scorer, self.loaded.tokenizer, prompts, limit, self._ends)
        texts = response_texts(self.loaded.tokenizer, responses, self._ends)
        return [_cut(text, limit[1]) for text in texts]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probs of whole texts in nats, each token given as many before it as fit (lm-eval's windows)."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        rows, about, sizes = [], [], []
        first = self.text.start[0] if self.text.start else self._ends[0]
        for request in requests:
            ids = self.text.encode(request.args[0])[len(self.text.start) :].tolist()
            windows = list(
                map(make_disjoint_window, get_rolling_token_windows(ids, first, self.text.max_length - 1, 1))
            )
            rows += [Row(np.asarray([*c, *t[:-1]], dtype=np.int32), len(t), (tuple(t),)) for c, t in windows]
            about += [_about(request)] * len(windows)
            sizes.append(len(windows))
        works = []
        for row, told in zip(rows, about, strict=True):
            key = self._key("rolling", row.ids.tolist(), row.targets)
            works.append(Work([key], [told], partial(self.scorer.score, [row], 0)))
        found = iter(self._answer(works, "Reading"))
        return [sum(next(found)[0][0] for _ in range(size)) for size in sizes]

    # --- who answers what

    def _key(self, *request) -> str:
        return digest(self.identity, *request)

    def _answer(self, works: list[Work], description: str) -> list:
        """The answers of all works' rows, in order. What isn't kept yet is dealt to the ranks in neighbouring shares; a
        work is done whole, so that its answers don't depend on what was there."""
        communicator = self.communicator
        self.store.reused += sum(key in self.store for work in works for key in work.keys)
        missing = [work for work in works if any(key not in self.store for key in work.keys)]
        first, last = (len(missing) * (communicator.rank + i) // communicator.world_size for i in (0, 1))
        new: list[dict] = []
        with progress_bar(last - first, f"{description} {self.loaded.name}", self.tracking) as bar:
            for work in missing[first:last]:
                before = self.scorer.usage.read
                made = zip(work.keys, work.about, work.run(), strict=True)
                records = [{"key": key, "model": self.loaded.name, **about, "answer": a} for key, about, a in made]
                records = [record for record in records if record["key"] not in self.store]
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
    """How long an answer may be, and what ends it."""
    settings = request.args[1]
    if settings.get("do_sample") or settings.get("temperature", 0.0):
        raise UserError(f"the task {request.task_name} samples its answers: this model answers greedily only")
    until = settings.get("until") or []
    return int(settings.get("max_gen_toks", 256)), tuple([until] if isinstance(until, str) else until)


def _cut(text: str, until: tuple[str, ...]) -> str:
    return text[: min([len(text), *(place for stop in until if (place := text.find(stop)) >= 0)])]
