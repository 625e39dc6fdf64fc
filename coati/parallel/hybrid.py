"""Colossal-AI's hybrid parallel plugin, with our policy and our micro-batches, and the engine on top of it."""

import copy
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin import HybridParallelPlugin
from colossalai.booster.plugin.hybrid_parallel_plugin import (
    HybridParallelAMPOptimizer,
    HybridParallelModule,
    HybridParallelNaiveOptimizer,
    HybridParallelZeroOptimizer,
    get_param_info,
)
from colossalai.checkpoint_io import HybridParallelCheckpointIO
from torch import nn
from torch.nn.functional import pad

from coati.config.plugin import PluginConfig
from coati.models.adapters import copied_to
from coati.parallel.engine import DTYPES, Engine
from coati.parallel.pipeline import MicroBatches
from coati.parallel.policy import DecoderPolicy, split_tensors, transformer_of
from coati.parallel.sequence import ATTENTION
from coati.parallel.tensor import gather, shard_of
from coati.parallel.zero import zero_gradients, zero_master_weights


class HybridPlugin(HybridParallelPlugin):
    """Tensor, pipeline and sequence parallel with ZeRO around them.

    `configure` is Colossal-AI's without its check against ZeRO in fp32 (its optimizer handles that as the plain ZeRO
    plugin does) and without a DDP wrapper around models that don't train.
    """

    def __init__(self, split_sequence: bool = False, **settings):
        super().__init__(custom_policy=DecoderPolicy(split_sequence), num_microbatches=1, **settings)
        if self.stage_manager is not None:
            self.scheduler = MicroBatches(self.stage_manager, self.pp_group)

    def support_no_sync(self):
        return self.zero_stage != 2

    def supported_devices(self):
        return ["cuda", "npu", "cpu"]

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        param_info = get_param_info(optimizer)
        model = HybridParallelModule(
            model,
            precision=self.precision,
            shard_config=self.shard_config,
            dp_group=self.mixed_dp_group,
            tp_group=self.tp_group,
            sp_group=self.sp_group,
            use_ddp=optimizer is not None and self.pp_size == 1 and self.zero_stage == 0 and self.dp_size > 1,
            ddp_config=self.ddp_config,
            custom_policy=self.custom_policy,
        )
        if optimizer is not None:
            optimizer = self._distribute(optimizer, model, param_info)
            model.update_master_params = optimizer.update_master_params
        return model, optimizer, criterion, dataloader, lr_scheduler

    def get_checkpoint_io(self):
        return LayoutFreeStates(
            self.mixed_dp_group, self.pp_group, self.tp_group, self.sp_group, self.zero_stage, False
        )

    def _distribute(self, optimizer, model, param_info):
        groups = dict(tp_process_group=self.tp_group, pp_process_group=self.pp_group)
        common = dict(use_pipeline=self.pp_size > 1, param_info=param_info, **groups)
        if self.zero_stage > 0:
            common |= dict(dp_process_group=self.mixed_dp_group, clip_grad_norm=self.max_norm)
            return HybridParallelZeroOptimizer(optimizer, model, **common, **self.zero_config, **self.amp_config)
        if self.precision == "fp32":
            return HybridParallelNaiveOptimizer(optimizer, model, max_norm=self.max_norm, **common)
        common |= dict(precision=self.precision, max_norm=self.max_norm, **self.amp_config)
        return HybridParallelAMPOptimizer(optimizer, model, **common)


class LayoutFreeStates(HybridParallelCheckpointIO):
    """Unsharded optimizer states in checkpoints, whatever the layout. Colossal-AI guesses from the shapes alone how a
    weight was split, which is wrong for fused projections."""

    def load_states_into_optimizer(self, optimizer, state_dict, id_map):
        working = optimizer.get_master_to_working_map()
        for number, state in state_dict.items():
            parameter = id_map.get(int(number))
            if parameter is None:  # another stage's
                continue
            shard = shard_of(parameter if working is None else working[id(parameter)])
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    value = value if shard is None else shard.local_shard(value)
                    if self.use_zero:
                        value = pad(value.flatten(), (0, -value.numel() % self.global_dp_size))
                        value = value.chunk(self.global_dp_size)[self.dp_rank].clone()
                    state[name] = value.to(parameter.device, parameter.dtype)
            optimizer.optim.state[parameter] = state


def _gather_state(state, param, original_shape, dp_group, tp_group, use_zero, inplace, device="cpu", **_):
    """The gathered state of one parameter, on the host."""
    gathered = dict(state)
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and name != "step":
            if use_zero:
                value = torch.cat(gather(value, dp_group)).flatten()[: param.numel()].view_as(param)
            shard = shard_of(param)
            gathered[name] = (value if shard is None else shard.gather(value)).detach().to(device, copy=True)
    return gathered


# Colossal-AI calls it by the name of its own class
HybridParallelCheckpointIO.gather_from_sharded_optimizer_state = staticmethod(_gather_state)


class HybridEngine(Engine):
    """A model split by tensor, pipeline or sequence parallelism, with ZeRO or data parallelism around it.

    Args:
        generates: under pipeline parallelism, keep a copy with the layers of all stages for `full()`.
    """

    def __init__(self, module: nn.Module, config: PluginConfig, runtime, *, generates: bool = False, **settings):
        first_names: dict[int, str] = {}
        names = [(name, id(p)) for name, p in module.named_parameters(remove_duplicate=False)]
        self.tied = {name: first_names.setdefault(number, name) for name, number in names}
        self.pipelined = config.pipeline_parallel > 1
        self.generation_copy = copy.deepcopy(module).requires_grad_(False) if generates else None
        whole = copied_to(module, "meta")
        super().__init__(module, config, runtime, **settings)
        self.whole = whole
        if self.generation_copy is not None:
            self._prepare_generation_copy(self.generation_copy)

    @property
    def plugin(self) -> HybridPlugin:
        return self.booster.plugin

    @property
    def zero_stage(self) -> int:
        return {"ddp": 0, "zero1": 1, "zero2": 2}[self.config.plugin]

    def make_booster(self, accumulates):
        from colossalai.booster import Booster

        c = self.config
        split: dict[str, Any] = dict(tp_size=c.tensor_parallel, pp_size=c.pipeline_parallel)
        if c.sequence_parallel > 1:
            split |= dict(sp_size=c.sequence_parallel, enable_sequence_parallelism=True)
            split |= dict(sequence_parallelism_mode="all_to_all")
        return Booster(
            plugin=HybridPlugin(
                **split,
                split_sequence=c.split_sequence,
                zero_stage=self.zero_stage,
                precision=self.precision,
                max_norm=c.max_grad_norm,
                # under pipeline parallelism nothing waits for the stream that reduces before gradients are read
                overlap_communication=self.runtime.device.type != "cpu" and not self.pipelined,
                broadcast_buffers=False,
            )
        )

    def place_frozen(self):
        self.booster = self.make_booster(accumulates=False)
        self.model, *_ = self.booster.boost(self.module)

    def gradients(self):
        if self.zero_stage > 0:
            return zero_gradients(self.optimizer)
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def master_weights(self):
        if self.precision == "fp32":
            return []
        if self.zero_stage > 0:
            return zero_master_weights(self.optimizer)
        return [p for group in self.optimizer.optim.param_groups for p in group["params"]]

    def layout_name(self):
        c = self.config
        kind = "zero" if self.zero_stage else "ddp"
        return f"{kind}-{c.tensor_parallel}-{c.pipeline_parallel}-{c.sequence_parallel}"

    # --- forward

    def forward_all(self, inputs):
        if not self.pipelined:
            return super().forward_all(inputs)
        return self.plugin.scheduler.forward_all(self.model, inputs)

    @property
    def gradient_ranks(self):
        return dist.get_world_size(self.plugin.mixed_dp_group)  # sequence parallel ranks among them

    def accumulate(self, tasks):
        if not self.pipelined:
            return super().accumulate(tasks)
        schedule = self.plugin.scheduler
        scaled = [(task.inputs, self._scaled(task.loss)) for task in tasks]
        self.booster.execute_pipeline(iter(scaled), self.model, schedule.criterion, self.optimizer, return_loss=False)
        return schedule.from_last_stage(schedule.metrics)

    def _scaled(self, loss_of):
        def scaled(output):
            loss, metrics = loss_of(output)
            return loss * self.gradient_ranks, metrics

        return scaled

    @contextmanager
    def full(self):
        """The plain module: under pipeline parallelism a copy with the layers of all stages, whose weights are fetched
        now; under tensor parallelism every rank of the group must generate the same."""
        if self.generation_copy is not None:
            self._fetch_weights(self.generation_copy)
        module = self.module if self.generation_copy is None else self.generation_copy
        with _unsplit_sequence(module), _gathered_logits(module):
            yield module

    def _prepare_generation_copy(self, generation_copy: nn.Module):
        """Splits the copy as the model is split, except into stages; finds out which stage holds which weight."""
        if self.config.tensor_parallel > 1:
            split_tensors(generation_copy, self.plugin.tp_group)
        generation_copy.to(self.runtime.device, DTYPES[self.precision]).eval()
        names: list[Any] = [None] * self.config.pipeline_parallel
        dist.all_gather_object(names, [name for name, _ in self.module.named_parameters()], group=self.plugin.pp_group)
        self.owners = {name: stage for stage, of_stage in enumerate(names) for name in of_stage}

    @torch.no_grad()
    def _fetch_weights(self, generation_copy: nn.Module):
        group, parameters = self.plugin.pp_group, dict(self.module.named_parameters())
        trained = {name for name, parameter in self.whole.named_parameters() if parameter.requires_grad}
        for name, parameter in generation_copy.named_parameters():
            if name not in trained:  # the copy has had it from the start
                continue
            if name in parameters:
                parameter.copy_(parameters[name])
            dist.broadcast(parameter.data, src=dist.get_global_rank(group, self.owners[name]), group=group)

    # --- files

    def state_dict(self):
        """The gathered state on rank 0: shards and stages are joined, a tensor at a time."""
        if self.runtime.rank >= self.config.model_parallel_size:  # another replica
            return {}
        is_collector = dist.get_rank(self.plugin.tp_group) == 0  # the other ranks help to gather, and keep nothing
        state = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            shard = shard_of(tensor)
            gathered = tensor if shard is None else shard.gather(tensor)
            if is_collector:
                state[name] = gathered.detach().cpu()
        if self.pipelined and is_collector:
            state = self._collect_stages(state)
        # tied weights are one tensor again, which is stored once
        return {name: state[self.tied.get(name, name)] for name in state} if self.runtime.is_main else {}

    def own_shards(self, folder):
        """The first rank of each stage writes those of its layers, rank 0 the index too."""
        writer = self.booster.checkpoint_io
        if writer.dp_rank > 0 or writer.tp_rank > 0 or writer.sp_rank > 0:
            return []
        if not self.pipelined:
            return super().own_shards(folder)
        shards = list(folder.glob(f"*-stage-{writer.pp_rank + 1:05d}-*"))
        if self.runtime.is_main:
            shards += [path for path in folder.iterdir() if "-stage-" not in path.name]
        return shards

    def _collect_stages(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first stage receives the others' tensors, on the host."""
        group = self.plugin.pp_group
        tensors_of: list[Any] = [None] * self.config.pipeline_parallel
        dist.all_gather_object(tensors_of, {name: (x.shape, x.dtype) for name, x in state.items()}, group=group)
        first, stage = dist.get_global_rank(group, 0), dist.get_rank(group)
        for source in range(1, len(tensors_of)):
            for name, (shape, dtype) in tensors_of[source].items():
                if stage == source:
                    dist.send(state[name], dst=first, group=group)
                elif stage == 0:
                    state[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(state[name], src=dist.get_global_rank(group, source), group=group)
        return state


@contextmanager
def _unsplit_sequence(module):
    """Inside, every rank works on unsplit sequences, with plain attention."""
    config, sequence = transformer_of(module).config, getattr(module.layout, "sequence", None)
    attention = config._attn_implementation
    if attention.startswith(ATTENTION):
        config._attn_implementation = "sdpa"
    if sequence:
        sequence.on = False
    try:
        yield
    finally:
        config._attn_implementation = attention
        if sequence:
            sequence.on = True


@contextmanager
def _gathered_logits(module):
    """Inside, logits are gathered on every rank, or each would sample from its own range of the vocabulary."""
    heads = [part for part in module.modules() if hasattr(part, "gathers_logits")]
    for head in heads:
        head.gathers_logits = True
    try:
        yield
    finally:
        for head in heads:
            head.gathers_logits = False
