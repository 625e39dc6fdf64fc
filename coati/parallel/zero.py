"""ZeRO stages 1 and 2 (Rajbhandari et al., 1910.02054): ranks share AdamW's states, in stage 2 the gradients too."""

import torch

from coati.parallel.engine import Engine


class ZeroEngine(Engine):
    """A model under Colossal-AI's low-level ZeRO."""

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
