"""Preference optimisation: a policy learns from pairs of answers, or from answers that are good or bad, without a
reward model (DPO: Rafailov et al., 2305.18290; the others are named in coati/losses/preference.py).

One step:
    1. the reference's log-probs of the batch's answers: from a frozen copy of the first policy, from the policy without
       its LoRA adapter, or from a cache; SimPO, ORPO and CPO have no reference
    2. KTO: the KL of the policy to the reference, from answers to prompts that they do not belong to
    3. the policy's log-probs, chosen and rejected answers in one forward pass, and the loss

Departures: dropout is off, so that the policy starts as its reference. KTO's wrong answers are those of rows half a
batch on, in the data's order: the step depends neither on how the batch is dealt out nor on the order of its rows, and
the two answers of one prompt, which are neighbours, do not meet. KTO's batches are not sorted by length, which goes
with what is liked: they would hold answers of one sort.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from coati.data import collate_sft, collate_unpaired, exchange_answers
from coati.data.dataset import writing
from coati.data.sources import hash_file
from coati.errors import UserError
from coati.losses import kto_loss, preference_loss, response_targets
from coati.losses.masking import keep
from coati.losses.preference import PREFERENCE_LOSSES, Answers, Options
from coati.models import Actor
from coati.models.base import disable_dropout
from coati.models.lora import base_of_adapter, is_adapter
from coati.parallel import Engine, resolve_precision
from coati.trainers.config import REFERENCE_FREE, PreferenceConfig
from coati.trainers.reward import RewardTrainer

CACHE_VERSION = 2  # count up whenever the same model and data give other log-probs


def preference_trainer(config: PreferenceConfig, runtime, **options) -> "PreferenceTrainer":
    """The trainer of `config.loss`."""
    return (KTOTrainer if config.loss == "kto" else PreferenceTrainer)(config, runtime, **options)


class PreferenceTrainer(RewardTrainer):
    """Trains an `Actor` on pairs, as its own reward model.

    Attributes:
        reference: the frozen copy; None if there is no reference, another way to it, or a cache.
        cached: by the data's key, the reference's sums of log-probs of chosen and rejected answers, `[rows, 2]`.
    """

    config: PreferenceConfig
    algorithm, model_class = "preference", Actor
    reference: Engine | None = None

    def build(self):
        c = self.config
        if c.model is None and c.loss not in REFERENCE_FREE:
            raise UserError(f"{c.loss} compares with the policy that the run starts from: give --model FOLDER")
        super().build()
        if c.share_prompts:
            self.members = 2
            batch = self.load(self.data, [int(self.data.lengths.argmax())])
            self.check_packing(self.engines["model"], batch, self.targets(batch))
        self.cached: dict[str, Tensor] = {}
        if c.cache_reference:
            self.fill_cache()
        elif c.loss not in REFERENCE_FREE:
            self.reference = self.load_reference()

    def model(self, *source, **options):
        model = super().model(*source, **options)
        disable_dropout(model)
        return model

    def targets(self, batch):
        return response_targets(batch.loss_mask)

    def answers(self, log_probs: Tensor, batch, parts: int, rows: Tensor | slice = slice(None)) -> list[Answers]:
        """What the loss reads of the batch's first and second half (`parts` 2), or of all its rows (1)."""
        targets = self.targets(batch)
        sums, lengths = keep(log_probs, targets).sum(1), targets.sum(1)
        references = [None] * parts if batch.reference is None else batch.reference.chunk(parts)
        halves = zip(sums.chunk(parts), lengths.chunk(parts), references, strict=True)
        return [Answers(s[rows], n[rows], r if r is None else r[rows]) for s, n, r in halves]

    @property
    def options(self) -> Options:
        c = self.config
        return Options(c.beta, c.label_smoothing, c.gamma)

    def loss(self, log_probs, batch, denominator):
        return self.loss_of(self.answers(log_probs, batch, 2), denominator)

    def loss_of(self, answers: list[Answers], denominator: float):
        c = self.config
        how = dict(nll_coefficient=c.nll_weight, length_normalised=c.length_normalised)
        return preference_loss(c.loss, *answers, denominator, options=self.options, **how)

    def judge(self, log_probs, batch, rows):
        answers = self.answers(log_probs, batch, 2, rows)
        read = [a.per_token() for a in answers] if self.config.length_normalised else answers
        chosen, rejected, _ = PREFERENCE_LOSSES[self.config.loss](*read, self.options)
        return chosen, rejected, self.loss_of(answers, 1.0)[1]

    # --- the reference

    def load_reference(self) -> Engine | None:
        return self.frozen_copy(self.config.model)

    def load_all(self, data, chunks, rows):
        batches = super().load_all(data, chunks, rows)
        if data.key in self.cached:
            # chosen answers first, as in the batch
            found = [self.cached[data.key][chunk].T.flatten().to(self.runtime.device) for chunk in chunks]
        elif self.config.loss in REFERENCE_FREE:
            return batches
        else:
            found = self.reference_sums(batches)
        return [replace(batch, reference=sums) for batch, sums in zip(batches, found, strict=True)]

    def reference_sums(self, batches: Sequence) -> list[Tensor]:
        """The reference's log-probs of each row's answer, `[rows]`, by batch."""
        if self.reference is None:
            return self.sums(self.engines["model"], batches, adapter=False)
        return self.sums(self.reference, batches)

    def sums(self, engine: Engine, batches: Sequence, **options) -> list[Tensor]:
        inputs = [self.inputs(batch, self.targets(batch)) | options for batch in batches]
        outputs = zip(engine.forward_all(inputs), batches, strict=True)
        return [keep(log_probs, self.targets(batch)).sum(1) for log_probs, batch in outputs]

    def fill_cache(self):
        """Reads the reference's log-probs of all rows, or computes them and writes them for later runs."""
        name = self.communicator.broadcast(self.name_of_reference() if self.runtime.is_main else None)
        sets = {data.key: data for data in (self.data, self.eval_data) if data is not None}
        folder = Path(self.config.cache_dir or "~/.cache/coati").expanduser()
        for key, data in sets.items():
            digest = hashlib.sha256(json.dumps([name, key]).encode()).hexdigest()[:32]
            path = folder / f"reference-{digest}.safetensors"
            stored = self.communicator.broadcast(read_cache(path) if self.runtime.is_main else None)
            if stored is None:
                self.reference = self.reference or self.load_reference()
                stored = self.measure(data)
                self.runtime.say(f"reference log-probs of {len(data)} rows: {path}")
                if self.runtime.is_main:
                    with writing(folder):
                        write_cache(path, stored)
            self.cached[key] = stored
        self.reference = None

    def measure(self, data) -> Tensor:
        """The reference's sums of all rows, `[rows, 2]`; each rank computes its share."""
        found: dict[int, list[float]] = {}
        for chunk in self.share_of(data):
            rows = [row for row, _ in chunk]
            [sums] = self.reference_sums([self.load(data, rows)])
            found |= zip(rows, sums.view(2, -1).T.tolist(), strict=True)
        whole = {row: sums for part in self.communicator.gather(found) for row, sums in part.items()}
        return torch.tensor([whole[row] for row in range(len(data))])

    def name_of_reference(self) -> list:
        """All that the reference's log-probs depend on beside the data, for a hash."""
        c, folders = self.config, [Path(self.config.model)]
        if is_adapter(c.model):
            folders.append(Path(base_of_adapter(c.model)))
        files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]
        files += [Path(c.model_config)] if c.model_config and Path(c.model_config).is_file() else []
        hashes = [hash_file(path) for path in files]
        return [CACHE_VERSION, resolve_precision(c), c.plugin == "ddp", *hashes, *map(revision_of, folders)]


class KTOTrainer(PreferenceTrainer):
    """Trains an `Actor` on answers that are good or bad."""

    kind, rows_per_sample = "unpaired", 1
    headline = ("loss", False)

    def longest_sequence(self):
        """Other rows' answers are put to each prompt."""
        return self.config.max_length

    def collate(self, samples):
        return collate_unpaired(samples, self.pad_id)

    def count(self, batch):
        return torch.tensor(len(batch.desirable))

    def loss(self, log_probs, batch, denominator):
        return self.kto(*self.answers(log_probs, batch, 1), batch.desirable, batch.kl, denominator)

    def kto(self, answers: Answers, desirable: Tensor, kl: Tensor, denominator: float):
        c = self.config
        weights = dict(desirable_weight=c.desirable_weight, undesirable_weight=c.undesirable_weight)
        return kto_loss(answers, desirable, kl, denominator, beta=c.beta, **weights)

    def train_step(self, step):
        metrics, tokens = super().train_step(step)
        return means_of_sorts(metrics), tokens

    def load_all(self, data, chunks, rows):
        kl = self.mismatched_kl(data, sorted(rows))
        return [replace(batch, kl=kl) for batch in super().load_all(data, chunks, rows)]

    def mismatched_kl(self, data, rows: Sequence[int]) -> Tensor:
        """The mean log-ratio of the rows' answers to other rows' prompts, over all ranks: a number."""
        sequences, n = [data[row].sequence for row in rows], len(rows)
        mixed = [
            exchange_answers(asked, sequences[(i + n // 2) % n], self.tokenizer, self.config.max_length)
            for i, asked in enumerate(sequences)
        ]
        lengths = [len(sequence) for sequence in mixed]
        filler = -n % self.communicator.world_size
        chunks = self.deal(range(n + filler), lengths + [max(lengths)] * filler)
        batches = [collate_sft([mixed[i % n] for i in chunk], self.pad_id).to(self.runtime.device) for chunk in chunks]
        policy, reference = self.sums(self.engines["model"], batches), self.reference_sums(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for chunk, ours, theirs in zip(chunks, policy, reference, strict=True):
            real = torch.tensor([i < n for i in chunk], device=self.runtime.device)
            total += keep(ours - theirs, real).sum()
        return self.communicator.sum(total) / n

    def tally(self, log_probs, batch, rows):
        answers = self.answers(log_probs, batch, 1, rows)
        return {**self.kto(*answers, batch.desirable[rows], batch.kl, 1.0)[1], "answers": rows.sum()}

    def averages(self, sums):
        count = sums["answers"]
        return means_of_sorts({name: total / count for name, total in sums.items()}) | {"answers": count}

    def scores(self, log_probs, batch, rows):
        [answers] = self.answers(log_probs, batch, 1, rows)
        return (self.config.beta * answers.log_ratios).tolist()

    def samples(self, scores):
        rows = [(self.eval_data[i], reward) for i, reward in scores.items()]
        return [self.text_of(row.sequence) | {"reward": reward, "label": row.desirable} for row, reward in rows]


def means_of_sorts(metrics: dict[str, float]) -> dict[str, float]:
    """Means over the good and over the bad answers, where there are any, in place of shares of all answers."""
    good = metrics["desirable"]
    for sort, part in (("desirable", good), ("undesirable", 1 - good)):
        for name in (f"reward_{sort}", f"log_probs_{sort}"):
            total = metrics.pop(name)
            if part > 1e-6:
                metrics[name] = total / part
    if 1e-6 < good < 1 - 1e-6:
        metrics["margin"] = metrics["reward_desirable"] - metrics["reward_undesirable"]
    return metrics


def revision_of(model: Path) -> str | None:
    """The commit of a model of the Hugging Face hub; None for a folder."""
    from transformers import AutoConfig

    return None if model.is_dir() else AutoConfig.from_pretrained(str(model))._commit_hash


def read_cache(path: Path) -> Tensor | None:
    from safetensors.torch import load_file

    return load_file(path)["log_probs"] if path.is_file() else None


def write_cache(path: Path, log_probs: Tensor):
    """Written aside and renamed, so that what is there is whole."""
    from safetensors.torch import save_file

    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({"log_probs": log_probs.contiguous()}, aside)
    os.replace(aside, path)
