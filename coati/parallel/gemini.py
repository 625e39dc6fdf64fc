"""Gemini: weights, gradients and AdamW's states are sharded in chunks over ranks (and the host)."""

from contextlib import contextmanager

import torch

from coati.parallel.engine import Engine, adam, parameter_groups
from coati.parallel.memory import EngineMemory

CHUNK_NUMEL = 32 * 2**20  # numbers of the smallest chunk; a model of fewer is not sharded


class GeminiMemory(EngineMemory):
    """Chunks of weights and of their float32 masters, of frozen models too, and AdamW's two moments. Gradients
    overwrite the weights, or with several micro-batches, have chunks that are never freed."""

    @property
    def remote_fraction(self) -> float:
        """The fraction of the weights that other ranks keep."""
        managed = sum(p.numel() for p in self.module.parameters())
        return self.config.shard_fraction * (1 - 1 / self.ranks) if managed >= CHUNK_NUMEL else 0.0

    def local_fraction(self, parameter):
        return 1 - self.remote_fraction

    def hold_states(self):
        """Masters and states. A frozen model has masters too."""
        c, fraction = self.config, 1 - self.remote_fraction
        if self.on_gpu:
            fraction *= 1 - c.offload_optimizer_fraction
        if self.trained:
            states = 12 * self.numel * fraction
        else:
            states = 4 * fraction * sum(p.numel() for p in self.module.parameters())
        self.kept.append(self.blocks.make(states, self.item("optimizer states")))
        if self.trained and self.accumulates:
            gradients = 2 * self.numel * (1 - self.remote_fraction)
            self.kept.append(self.blocks.make(gradients, self.item("gradients")))

    def gradient_ready(self, parameter):
        parameter.grad = None  # copied into a chunk that is already counted
        if self.accumulates and not self.remote_fraction and parameter is self.trained[-1]:
            self.blocks.make(2 * self.numel, self.item("communication"))  # a copy of the one chunk, for a moment

    def gathered(self, *, full):
        if not self.remote_fraction:
            return 0.0
        widest = max(p.numel() for p in self.module.parameters())
        in_use = max(2 * CHUNK_NUMEL, 2 * widest)  # the chunk in use, and one being fetched
        managed = sum(p.numel() for p in self.module.parameters())
        return 2 * (managed * self.remote_fraction if full else in_use)

    def step_bytes(self):
        """On a CPU Adam works tensor by tensor."""
        return 0 if self.on_gpu else 8 * self.widest / self.ranks


class GeminiEngine(Engine):
    """A model under Colossal-AI's Gemini, with static placement."""

    memory = GeminiMemory

    def make_booster(self, accumulates):
        from colossalai.booster import Booster
        from colossalai.booster.plugin import GeminiPlugin

        c, cuda = self.config, torch.cuda.is_available()
        return Booster(
            plugin=GeminiPlugin(
                placement_policy="static",
                shard_param_frac=c.shard_fraction,
                offload_optim_frac=c.offload_optimizer_fraction,
                offload_param_frac=c.offload_parameter_fraction,
                precision=self.precision,
                max_norm=c.max_grad_norm,
                enable_gradient_accumulation=accumulates,
                # without a norm to wait for, storage is freed while it is still being read
                enable_async_reduce=cuda and c.max_grad_norm > 0,
                # pinned copies of all shards on the host pay off with offloading only
                pin_memory=cuda and c.offload_optimizer_fraction + c.offload_parameter_fraction > 0,
                initial_scale=2**16,
            )
        )

    def place_frozen(self):
        self.module.requires_grad_(True)  # Gemini shards trainable weights only; without an optimizer they don't change
        self.booster = self.make_booster(accumulates=False)
        self.model, *_ = self.booster.boost(self.module)

    def make_optimizer(self, settings):
        from colossalai.nn.optimizer import HybridAdam  # Gemini supports no other

        return HybridAdam(parameter_groups(self.module, settings), adamw_mode=True, **adam(settings))

    def gradients_are_finite(self):
        return self.precision == "fp16" or not self.model.chunk_manager.overflow_counter.item()

    def drop_gradients(self):
        # gradients have overwritten the weights, which are restored from their fp32 copies: the end of Gemini's own
        # `step`
        self.optimizer._set_grad_ptr()
        self.optimizer._clear_global_norm()
        self.optimizer.zero_grad()
        self.optimizer._update_fp16_params()
        self.model.chunk_manager.accumulating_grads = False
        self.model.chunk_manager.overflow_counter.zero_()

    @contextmanager
    def full(self):
        manager = self.model.chunk_manager
        for chunk in manager.get_chunks(self.model.fp16_params):
            manager.access_chunk(chunk)
        try:
            yield self.module
        finally:
            self.model._post_forward()
            self.model.gemini_manager.reset_attributes()

    def state_dict(self):
        state = self.model.state_dict()
        if not self.runtime.is_main:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def master_weights(self):
        chunks = dict.fromkeys(self.model.chunk_manager.get_chunk(p) for p in self.model.fp16_params)
        return [chunk.paired_chunk.payload for chunk in chunks]

    def layout_name(self):
        return "gemini-1-1-1"
