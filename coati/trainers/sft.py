"""Supervised fine-tuning: maximise the likelihood of the demonstrated answers (InstructGPT, 2203.02155, section 3.1).

    loss = - sum over answer tokens of log p(token | everything before) / number of answer tokens

The number counts the answer tokens of the whole step, over all ranks and micro-batches.
"""

import math

from coati.data import collate_sft
from coati.losses import cross_entropy, response_targets
from coati.models import Actor
from coati.rollout import generate
from coati.rollout.prompts import eos_ids, response_texts
from coati.trainers.config import SFTConfig
from coati.trainers.supervised import SupervisedTrainer


class SFTTrainer(SupervisedTrainer):
    """Trains an `Actor` on demonstrations."""

    config: SFTConfig
    algorithm, kind, model_class = "sft", "sft", Actor
    headline = ("loss", False)
    generates = True

    def longest_sequence(self):
        """A row, or a sample answer with its prompt."""
        asked = max((len(prompt) for prompt in self.sample_prompts()), default=None)
        answered = 0 if asked is None else asked + self.config.max_new_tokens
        return max(super().longest_sequence(), answered)

    def sample_prompts(self) -> list[list[int]]:
        """The first evaluation prompts, which are answered for the report."""
        if self.eval_data is None or not self.generates:
            return []
        rows = [self.eval_data[i] for i in range(min(self.config.samples, len(self.eval_data)))]
        return [row.input_ids[: row.loss_mask.index(True)] for row in rows]

    def collate(self, samples):
        return collate_sft(samples, self.pad_id)

    def targets(self, batch):
        return response_targets(batch.loss_mask)

    def count(self, batch):
        return self.targets(batch).sum()

    def loss(self, log_probs, batch, denominator):
        return cross_entropy(log_probs, self.targets(batch), denominator)

    def tally(self, log_probs, batch, rows):
        targets = self.targets(batch) & rows[:, None]
        return {"total": cross_entropy(log_probs, targets, 1.0)[0], "tokens": targets.sum()}

    def averages(self, sums):
        loss = sums["total"] / max(sums["tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    def samples(self, scores):
        """Answers to the first evaluation prompts, drawn from the same random numbers at every evaluation."""
        prompts, engine = self.sample_prompts(), self.engines["model"]
        seeds = [[self.config.seed, place] for place in range(len(prompts))]
        with engine.full() as model:
            ends = eos_ids(self.tokenizer, model)
            how = dict(eos_ids=ends, pad_id=self.pad_id, seeds=seeds, tokenizer=self.tokenizer)
            rollout = generate(model, prompts, self.config, **how)
        answers = response_texts(self.tokenizer, rollout.response_ids(), ends)
        texts = self.tokenizer.batch_decode(prompts)
        return [{"prompt": p, "response": a.strip()} for p, a in zip(texts, answers, strict=True)]
