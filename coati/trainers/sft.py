"""Supervised fine-tuning: maximize the likelihood of the demonstrated responses (InstructGPT, 2203.02155, section 3.1).

    loss = - sum over response tokens of log p(token | everything before) / number of response tokens

The number counts the response tokens of the whole step, over all ranks and micro-batches. With `loss: dft` each token's
log-prob is weighted by its probability (2508.05629); evaluations are of the loss above all the same.
"""

import math

from coati.data import collate_sft
from coati.losses import cross_entropy, response_targets
from coati.models import Actor
from coati.rollout import Request
from coati.rollout.prompts import eos_ids, response_texts
from coati.trainers.config import SFTConfig
from coati.trainers.supervised import SupervisedTrainer


class SFTTrainer(SupervisedTrainer):
    """Trains an `Actor` on demonstrations."""

    config: SFTConfig
    algorithm, kind, model_class = "sft", "sft", Actor
    best_metric = ("loss", False)
    generates = True

    def longest_sequence(self):
        """A row, or a sample response with its prompt."""
        asked = max((len(prompt) for prompt in self.sample_prompts()), default=None)
        responded = 0 if asked is None else asked + self.config.generation.max_new_tokens
        return max(super().longest_sequence(), responded)

    def collate(self, samples):
        return collate_sft(samples, self.factory.pad_id)

    def targets(self, batch):
        return response_targets(batch.loss_mask)

    def count(self, batch):
        return self.targets(batch).sum()

    def loss(self, log_probs, batch, denominator):
        return cross_entropy(log_probs, self.targets(batch), denominator, kind=self.config.loss)

    def accumulate(self, log_probs, batch, rows):
        targets = self.targets(batch) & rows[:, None]
        return {"total": cross_entropy(log_probs, targets, 1.0)[0], "tokens": targets.sum()}

    def finalize(self, sums):
        loss = sums["total"] / max(sums["tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    def sample_prompts(self) -> list[list[int]]:
        """The first evaluation prompts, which are completed for the report."""
        if self.eval_data is None or not self.generates:
            return []
        rows = [self.eval_data[i] for i in range(min(self.config.evaluation.samples, len(self.eval_data)))]
        return [row.input_ids[: row.loss_mask.index(True)] for row in rows]

    def samples(self, row_scores):
        """Responses to the first evaluation prompts, drawn with the same noise at every evaluation."""
        prompts = self.sample_prompts()
        requests = [Request(prompt, [self.config.seed, place]) for place, prompt in enumerate(prompts)]
        completions = self.factory.generator(self.model, self.config.generation).generate(
            requests, self.config.generation
        )
        ends = eos_ids(self.tokenizer, self.model.module)
        responses = response_texts(self.tokenizer, [completion.ids for completion in completions], ends)
        texts = self.tokenizer.batch_decode(prompts)
        return [{"prompt": p, "response": r.strip()} for p, r in zip(texts, responses, strict=True)]
