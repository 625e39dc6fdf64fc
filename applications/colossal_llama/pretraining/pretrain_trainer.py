"""Continued pre-training on packed rows: next-token prediction on everything that isn't masked as a source.

    loss = - sum over trained tokens of log p(token | its document before it) / number of trained tokens

The number counts the tokens of the whole step, over all ranks and micro-batches.
"""

from coati.errors import UserError
from coati.losses import z_loss
from coati.trainers.sft import SFTTrainer
from colossal_llama.data.packed_rows import MixedOrder, PackedDataset, collate
from colossal_llama.pretraining.stage_settings import PretrainConfig


class PretrainTrainer(SFTTrainer):
    """Trains an `Actor` on packed rows."""

    config: PretrainConfig
    algorithm = "pretrain"
    generates = False

    def dataset(self, sources, kind, weights=None):
        if not sources:
            return None
        data, limit = PackedDataset(sources), self.config.max_length
        if data.lengths.max() > limit:
            raise UserError(
                f"{sources[0]} has rows of {data.lengths.max()} tokens: set max_length to that, not {limit}"
            )
        return data

    def sampler(self, data: PackedDataset) -> MixedOrder:
        c = self.config
        length = {"steps": c.steps} if c.steps else {"tokens": c.tokens} if c.tokens else {"epochs": c.epochs}
        order = MixedOrder(data, c.batch_size, c.seed, **length, buckets=c.buckets, mix=c.shares, start=self.start)
        self.total_steps = len(order)
        self.seen = dict.fromkeys(data.categories.tolist(), 0)
        return order

    def model(self, model_class, pretrained, *, lora=None):
        c, model = self.config, super().model(model_class, pretrained, lora=lora)
        if c.document_mask and not model.keeps_documents_apart():
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
        return collate(samples, self.pad_id)

    def inputs(self, batch, targets=None):
        more = {"position_ids": batch.position_ids} if self.config.document_mask else {}
        return super().inputs(batch, targets) | more | ({"with_log_partition": True} if self.config.z_loss else {})

    def loss(self, output, batch, denominator):
        if not self.config.z_loss:
            return super().loss(output, batch, denominator)
        log_probs, log_partition = output
        loss, metrics = super().loss(log_probs, batch, denominator)
        scale, more = z_loss(log_partition, self.targets(batch), denominator)
        return loss + self.config.z_loss * scale, metrics | more

    def train_step(self, step: int):
        metrics, tokens = super().train_step(step)
        rows = self.batches.batch(step)
        for row in rows:
            self.seen[self.data.categories[self.data.category_of_row[row]]] += int(self.data.lengths[row])
        return metrics | {f"seen/{name}": seen for name, seen in self.seen.items()}, tokens

    def state(self):
        return super().state() | {"seen": self.seen}

    def load_state(self, state):
        super().load_state(state)
        self.seen = state["seen"]

    def parts_of(self, data):
        return data.categories.tolist(), data.category_of_row

    def tally(self, output, batch, rows):
        return super().tally(output[0] if self.config.z_loss else output, batch, rows)

    def samples(self, scores):
        return []


class StagedPretraining:
    """The stages one after the other, each from the model that the one before left; finished ones are skipped."""

    trainer_class = PretrainTrainer

    def __init__(self, plan, runtime):
        self.plan, self.runtime = plan, runtime
        for stage in plan.stages:  # the last stage's data is looked for before the first trains for a week
            PackedDataset([*stage.train_data, *stage.eval_data])

    def train(self):
        """Runs the stages that are left, or to the step after a stop was asked for."""
        for number, stage in enumerate(self.plan.stages, 1):
            title = f"stage {number} of {len(self.plan.stages)}, {stage.run_name}"
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
        return trainer.step == trainer.total_steps
