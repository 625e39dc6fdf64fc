"""Continued pre-training on packed rows: next-token prediction on everything that isn't masked as a source.

    loss = - sum over trained tokens of log p(token | its document before it) / number of trained tokens

The number counts the tokens of the whole step, over all ranks and micro-batches.
"""

from coati.errors import UserError
from coati.losses import cross_entropy, z_loss
from coati.trainers.batching import model_inputs
from coati.trainers.sft import SFTTrainer
from colossal_llama.data.packed_rows import MixedOrder, PackedDataset, collate
from colossal_llama.pretraining.stage_settings import PretrainConfig


class PretrainTrainer(SFTTrainer):
    """Trains an `Actor` on packed rows.

    Attributes:
        seen: tokens so far by category.
    """

    config: PretrainConfig
    algorithm = "pretrain"
    generates = False

    def load_data(self, sources, weights=None, part_column=None):
        """Parts are the packed data's categories."""
        if not sources:
            return None
        data, limit = PackedDataset(sources), self.config.data.max_length
        longest = data.lengths.max()
        if longest > limit:
            raise UserError(f"{sources[0]} has rows of {longest} tokens: set max_length to that, not {limit}")
        return data

    def make_order(self):
        c = self.config
        order = MixedOrder(
            self.data,
            c.batch_size,
            c.seed,
            steps=c.steps,
            tokens=c.tokens,
            epochs=c.epochs,
            buckets=c.buckets,
            mix=c.mix,
            start=self.start,
        )
        return order, len(order)

    def build(self):
        super().build()
        self.seen = dict.fromkeys(self.data.categories.tolist(), 0)

    def make_model(self, start):
        c, model = self.config, super().make_model(start)
        if c.document_mask and not model.isolates_documents():
            raise UserError(f"{type(model.transformer).__name__} can't keep documents apart: --document_mask False")
        embeddings = model.transformer.get_input_embeddings()
        if c.freeze != "none":
            model.requires_grad_(False)
            embeddings.requires_grad_(True)
            model.transformer.get_output_embeddings().requires_grad_(True)
        if c.neftune_noise_alpha:
            from transformers.integrations.neftune import neftune_post_forward_hook

            embeddings.neftune_noise_alpha = c.neftune_noise_alpha
            embeddings.register_forward_hook(neftune_post_forward_hook)
        return model

    def collate(self, samples):
        return collate(samples, self.factory.pad_id)

    def inputs(self, batch):
        options = {}
        if self.config.document_mask:
            options["position_ids"] = batch.position_ids
        if self.config.z_loss:
            options["with_log_partition"] = True
        return model_inputs(batch, self.targets(batch), **options)

    def loss(self, output, batch, denominator):
        if not self.config.z_loss:
            return cross_entropy(output, self.targets(batch), denominator)
        log_probs, log_partition = output
        loss, metrics = cross_entropy(log_probs, self.targets(batch), denominator)
        scale, scale_metrics = z_loss(log_partition, self.targets(batch), denominator)
        return loss + self.config.z_loss * scale, metrics | scale_metrics

    def step(self, k):
        metrics = super().step(k)
        for row in self.order.batch(k):
            self.seen[self.data.categories[self.data.category_of_row[row]]] += int(self.data.lengths[row])
        return metrics | {f"seen/{name}": tokens for name, tokens in self.seen.items()}

    def state(self):
        return {"seen": self.seen}

    def load_state(self, state):
        self.seen = state["seen"]

    def parts_of(self, data):
        return data.categories.tolist(), data.category_of_row

    def accumulate(self, output, batch, rows):
        log_probs = output[0] if self.config.z_loss else output
        return super().accumulate(log_probs, batch, rows)

    def samples(self, row_scores):
        return []


class StagedPretraining:
    """The stages one after the other, each from the model that the one before left; finished ones are skipped."""

    trainer_class = PretrainTrainer

    def __init__(self, plan, runtime):
        self.plan, self.runtime = plan, runtime
        for stage in plan.stages:  # the last stage's data is looked for before the first trains for a week
            PackedDataset([*stage.data.train_data, *stage.data.eval_data])

    def train(self):
        """Runs the stages that are left, or to the step after a stop was asked for."""
        for number, stage in enumerate(self.plan.stages, 1):
            title = f"stage {number} of {len(self.plan.stages)}, {stage.tracking.run_name}"
            if self.runtime.communicator.any(self.plan.is_finished(stage)):
                self.runtime.say(f"{title}: finished before, {stage.output_dir}")
                continue
            self.runtime.say(title)
            if not self._finish(stage):
                return

    def _finish(self, stage: PretrainConfig) -> bool:
        """Trains one stage; nothing of it is left in memory."""
        trainer = self.trainer_class(stage, self.runtime)
        trainer.train()
        return trainer.steps_done == trainer.total_steps
