"""ZeRO stages 1 and 2 (Rajbhandari et al., 1910.02054): AdamW's states are sharded over ranks, in stage 2 the gradients
too."""

import torch

from coati.parallel.engine import Engine
from coati.parallel.memory import EngineMemory, nbytes

BUCKET = 12 * 2**20  # gradients that are reduced at a time (Colossal-AI's default)


class ZeroMemory(EngineMemory):
    """Replicated weights, and this rank's shard of float32 masters and AdamW's two moments, on the host with
    offloading. Gradients gather in a bucket, whose flat copy is reduced; of the result, stage 2 keeps this rank's
    shard."""

    @classmethod
    def cast(cls, module, dtype, *, trained):
        super().cast(module, dtype, trained=False)  # adapters come in float32, whatever the model's dtype

    @property
    def stage(self) -> int:
        return 1 if self.config.plugin == "zero1" else 2

    def hold_states(self):
        on_host = self.on_gpu and self.config.plugin == "zero2-offload"
        part = 0 if on_host else 12 * self.numel / self.ranks
        self.kept.append(self.blocks.make(part, self.item("optimizer states")))
        self.bucket: list[torch.Tensor] = []

    def begin_micro_batch(self, *, is_last):
        self.adds_up = bool(self.gradients)  # to those of earlier micro-batches
        self.reduces = is_last or self.stage == 2

    def gradient_ready(self, parameter):
        gradient = parameter.grad
        self.blocks.hold([gradient], self.item("gradients"))
        if not self.reduces:
            return
        parameter.grad = None
        if sum(g.numel() for g in self.bucket) + gradient.numel() > BUCKET:
            self.reduce()
        self.bucket.append(gradient)

    def end_backward(self):
        self.reduce()

    def reduce(self):
        """Empties the bucket."""
        if not self.bucket:
            return
        size = nbytes(self.bucket)
        flat = kept = self.blocks.make(size, self.item("communication"))
        if self.stage == 2:
            kept = self.blocks.make(size / self.ranks, self.item("communication"))
        del flat
        self.bucket.clear()
        if not self.adds_up:
            self.blocks.hold([kept], self.item("gradients"))
            self.gradients.append(kept)

    def step_bytes(self):
        """Adam gets its gradients in float32; then the weights' shards are gathered, a bucket at a time."""
        part = self.numel / self.ranks
        gradients = 0 if self.dtype == torch.float32 else 4 * part
        return max(gradients, self.dtype.itemsize * min(part, BUCKET) * (1 + self.ranks))


class ZeroEngine(Engine):
    """A model under Colossal-AI's low-level ZeRO."""

    memory = ZeroMemory

    def make_booster(self, accumulates):
        from colossalai.booster import Booster
        from colossalai.booster.plugin import LowLevelZeroPlugin

        return Booster(
            plugin=LowLevelZeroPlugin(
                stage=1 if self.config.plugin == "zero1" else 2,
                precision=self.precision,
                max_norm=self.config.max_grad_norm,
                cpu_offload=self.config.plugin == "zero2-offload",
                overlap_communication=self.runtime.device.type != "cpu",  # whose tensors have no record_stream
                initial_scale=2**16,
            )
        )

    def gradients(self):
        return zero_gradients(self.optimizer)

    def master_weights(self):
        return [] if self.precision == "fp32" else zero_master_weights(self.optimizer)

    def layout_name(self):
        return "zero-1-1-1"


def zero_gradients(optimizer) -> list[torch.Tensor]:
    stores, groups = optimizer.pg_to_grad_store.values(), range(optimizer.num_param_groups)
    return [g for store in stores for i in groups for g in store.get_working_grads_by_group_id(i)]


def zero_master_weights(optimizer) -> list[torch.Tensor]:
    return [tensor for group in optimizer._master_param_groups_of_current_rank.values() for tensor in group]
