"""Gemini: weights, gradients and AdamW's states lie in chunks that are shared out over ranks (and the host)."""

from contextlib import contextmanager

import torch

from coati.parallel.engine import Engine, adam, parameter_groups


class GeminiEngine(Engine):
    """A model under Colossal-AI's Gemini, with static placement."""

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
                # without a norm to wait for, storage is freed while it is still read
                enable_async_reduce=cuda and c.max_grad_norm > 0,
                # a pinned copy of every shard on the host pays where shards travel there
                pin_memory=cuda and c.offload_optimizer_fraction + c.offload_parameter_fraction > 0,
                initial_scale=2**16,
            )
        )

    def hold_frozen(self):
        self.module.requires_grad_(True)  # it shards nothing else; without an optimizer nothing moves
        self.booster = self.make_booster(accumulates=False)
        self.model, *_ = self.booster.boost(self.module)

    def make_optimizer(self, settings):
        from colossalai.nn.optimizer import HybridAdam  # Gemini takes no other

        return HybridAdam(parameter_groups(self.module, settings), adamw_mode=True, **adam(settings))

    def gradients_are_finite(self):
        return self.precision == "fp16" or not self.model.chunk_manager.overflow_counter.item()

    def drop_gradients(self):
        # gradients lie where the weights were, which come back from their fp32 copies: the end of Gemini's own `step`
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
