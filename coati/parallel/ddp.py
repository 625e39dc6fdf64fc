"""Data parallelism: weights are replicated in float32 and computes in lower precision under autocast."""

import torch
from torch import nn

from coati.parallel.engine import DTYPES, Engine
from coati.parallel.memory import EngineMemory, cast_tensors, nbytes


def narrow_frozen_weights(module: nn.Module, dtype: torch.dtype):
    """Casts the frozen weights beside an adapter once: autocast would cast them at every use."""
    cast_tensors([parameter for parameter in module.parameters() if not parameter.requires_grad], dtype)


class DDPMemory(EngineMemory):
    """Weights and AdamW's two moments in float32; gradients stay where autograd puts them, and again in the
    communication buckets. A model that is split over ranks has low-precision weights and float32 masters instead."""

    @classmethod
    def cast(cls, module, dtype, *, trained):
        narrow_frozen_weights(module, dtype)
        super().cast(module, dtype, trained=trained)

    def hold_states(self):
        masters = 4 if self.config.model_parallel_size > 1 and self.dtype != torch.float32 else 0
        self.kept.append(self.blocks.make((8 + masters) * self.numel, self.item("optimizer states")))
        if self.config.pipeline_parallel == 1:
            self.kept.append(self.blocks.make(nbytes(self.trained), self.item("communication")))

    def gradient_ready(self, parameter):
        self.blocks.hold([parameter.grad], self.item("gradients"))


class DDPEngine(Engine):
    """A model under torch's DistributedDataParallel."""

    memory = DDPMemory

    @classmethod
    def loads_in(cls, config):
        return torch.float32

    def make_booster(self, accumulates):
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin

        narrow_frozen_weights(self.module, DTYPES[self.precision])
        in_fp16 = "fp16" if self.precision == "fp16" else None
        return Booster(plugin=TorchDDPPlugin(broadcast_buffers=False), mixed_precision=in_fp16)

    def autocast(self):
        return torch.autocast(self.runtime.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def reduces_gradients(self, is_last):
        return is_last and self.runtime.world_size > 1  # with one process, DDP's copies of gradients are useless

    def no_sync(self):
        # in fp16 the booster wraps what the plugin has wrapped
        return self.booster.no_sync(self.model.module if self.precision == "fp16" else self.model, self.optimizer)

    def gradients(self):
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def clip_and_step(self):
        if self.precision == "fp16":
            self.optimizer.unscale_grad()
        limit = self.config.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def layout_name(self):
        return "ddp-1-1-1"
