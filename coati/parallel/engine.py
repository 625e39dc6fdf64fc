"""One model under one plugin: the few operations that trainers need, the same for all plugins.

The engines (ddp, zero, gemini, hybrid) are in files of their own, each responsible for its plugin;
`coati.parallel.factory` chooses.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coati.config.plugin import PluginConfig
from coati.files import sync
from coati.parallel.config import resolve_precision
from coati.parallel.expert_load import ExpertLoad
from coati.parallel.runtime import Runtime
from coati.parallel.update import Task, Update
from coati.run_layout import OPTIMIZER, master_weights_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """A model, and its AdamW if it trains, under one plugin.

    Args:
        module: the model, created alike on every rank.
        config: plugin, precision, clipping.
        optimizer: keywords of AdamW (`weight_decay`, `betas`, `eps`), or None for a frozen model.
        accumulates: whether several micro-batches may come before a step.
        router_loss: the coefficient of the loss that evens the load of experts.

    Attributes:
        module: the plain model.
        whole: that model as it is saved: itself, or where the plugin splits it, as it was before, without data.
        model: the plugin's wrapper around it, or the module itself.
        data_ranks: the ranks that see different data.
        expert_load: which experts its tokens go to, and the loss that evens it.
        averages: of a frozen model whose weights are averages (`average_in`), these in float32 where the module's are
            narrower; they are what is saved.
        skipped_in_a_row: how many steps have been skipped, up to the last one; skipped_steps: and altogether.
        parameters, trained_parameters: how many there are on all ranks together, however they are sharded.
        memory: what the engine keeps on one rank, see `coati.parallel.memory`.
    """

    memory: type

    def __init__(
        self,
        module: nn.Module,
        config: PluginConfig,
        runtime: Runtime,
        *,
        optimizer: dict | None = None,
        accumulates: bool = True,
        router_loss: float = 0.0,
    ):
        self.module, self.config, self.runtime = module, config, runtime
        self.whole = module
        self.precision = resolve_precision(config)
        self.data_ranks = runtime.data_ranks(config.model_parallel_size)
        self.skipped_in_a_row = self.skipped_steps = 0
        self.averages: dict[Tensor, Tensor] = {}
        self.model: Any = module  # colossalai's wrappers have methods of their own
        self.optimizer: Any = None
        self.parameters = sum(count(p) for p in module.parameters())
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.dtype == torch.float32}
        if optimizer is None:
            module.requires_grad_(False).eval()
            self.trained_parameters = 0
            self.place_frozen()
        else:
            module.train()  # `from_pretrained` leaves models in evaluation mode, without gradient checkpointing
            self.trained_parameters = sum(count(p) for p in module.parameters() if p.requires_grad)
            self.expert_load = ExpertLoad(module, router_loss, config.tensor_parallel)
            self.booster = self.make_booster(accumulates)
            self.model, self.optimizer, *_ = self.booster.boost(module, self.make_optimizer(optimizer))
        self._restore_buffers(buffers)

    # --- what each engine defines for its plugin

    @classmethod
    def loads_in(cls, config: PluginConfig) -> torch.dtype:
        """The dtype that trained weights are loaded in."""
        return DTYPES[resolve_precision(config)]

    def make_booster(self, accumulates: bool):
        """Colossal-AI's booster with the plugin."""
        raise NotImplementedError

    def place_frozen(self):
        """Moves a frozen model to the device: a replicated one needs no wrapper."""
        self.model = self.module.to(self.runtime.device, DTYPES[self.precision])

    def make_optimizer(self, settings: dict):
        return torch.optim.AdamW(parameter_groups(self.module, settings), fused=True, **adam(settings))

    def gradients(self) -> list[Tensor]:
        """This rank's part of the gradients of all micro-batches, summed over ranks."""
        raise NotImplementedError

    def gradients_are_finite(self) -> bool:
        """Whether `gradients` have a finite norm. Infinite ones in fp16 are left to the loss scaler, which expects
        them."""
        gradients = self.gradients() if self.precision != "fp16" else []
        return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def drop_gradients(self):
        self.optimizer.zero_grad()

    def clip_and_step(self) -> float | None:
        """Clips the gradients, takes the optimizer's step, clears them; returns their L2 norm before clipping."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.get_grad_norm()

    def master_weights(self) -> list[Tensor]:
        """This rank's fp32 copies of low-precision weights, in a fixed order."""
        return []

    def layout_name(self) -> str:
        """Names how master weights are sharded over ranks: they are loaded under the same name only."""
        raise NotImplementedError

    # --- forward

    def __call__(self, **inputs):
        """The module's forward, through the plugin. Under Gemini every rank must call it equally often."""
        with self.autocast():
            return self.model(**inputs)

    def forward_all(self, inputs: Sequence[dict[str, Any]]) -> list:
        """The outputs for several micro-batches, without gradient."""
        with torch.no_grad():
            return [self(**one) for one in inputs]

    def autocast(self):
        """The context that computes in the working precision where weights are wider."""
        return nullcontext()

    @contextmanager
    def full(self) -> Iterator[nn.Module]:
        """The plain module with unsharded weights on this rank, for generation: no collective call inside."""
        with self.autocast():
            yield self.module

    # --- weights that are averages

    def keep_averages(self, weights: Mapping[str, Tensor]):
        """Keeps those of these weights that the module has in lower precision: a step of a few percent would be lost in
        its rounding.

        Args:
            weights: float32, by the names of the module's parameters.
        """
        for name, parameter in self.module.named_parameters():
            if name in weights and parameter.dtype != torch.float32:
                self.averages[parameter] = weights[name].to(parameter.device)

    @torch.no_grad()
    def average_in(self, source: nn.Module, rate: float):
        """Moves a frozen model toward the weights that another trains: w <- (1 - rate) w + rate s.

        Args:
            source: with parameters of the same names, unsharded.
            rate: 0 to 1.
        """
        own = dict(self.module.named_parameters())
        for name, parameter in source.named_parameters():
            if parameter.requires_grad:
                average = self.averages.get(own[name], own[name])
                average.lerp_(parameter.to(average), rate)
                own[name].copy_(average)

    # --- one optimizer step

    @contextmanager
    def update(self, learning_rate: float) -> Iterator[Update]:
        """An optimizer step on the terms that are added inside:

            with engine.update(learning_rate) as update:
                update.add(micro_batches, inputs, loss, count)
            update.metrics

        A step whose loss or gradient is not finite on some rank is skipped on all of them: weights and optimizer stay
        as they are.

        Raises:
            SkippedSteps: `max_skipped_steps` in a row were skipped.
        """
        update = Update()
        yield update
        update.finish(self, learning_rate)

    @property
    def gradient_ranks(self) -> int:
        """Over how many ranks the plugin averages gradients."""
        return self.data_ranks.world_size

    def accumulate(self, tasks: Sequence[Task]) -> list[dict[str, Tensor]]:
        """Adds up the gradients of the micro-batches' parts of the loss; returns the metrics of each.

        The plugins average gradients over ranks (`gradient_ranks`); the parts' sum over ranks is the loss, so they are
        multiplied by the number of ranks.
        """
        metrics = []
        for i, task in enumerate(tasks):
            # gradients are reduced with the last micro-batch only, where the plugin allows it
            reduces_now = self.reduces_gradients(is_last=i == len(tasks) - 1)
            with nullcontext() if reduces_now else self.no_sync():
                loss, task_metrics = task.loss(self(**task.inputs))
                if self.expert_load.coefficient:
                    loss = loss + self.expert_load.loss()
                self.booster.backward(loss * self.gradient_ranks, self.optimizer)
            metrics.append(task_metrics)
        return metrics

    def reduces_gradients(self, is_last: bool) -> bool:
        """Whether a micro-batch's gradients are reduced over ranks at once."""
        return is_last or not self.booster.plugin.support_no_sync()

    def no_sync(self):
        return self.booster.no_sync(self.model, self.optimizer)

    def step(self, learning_rate: float, finite: bool = True) -> float | None:
        """The step, on all ranks or on none; returns the gradients' global L2 norm before clipping, None where the
        step was skipped.

        Args:
            finite: whether this rank's losses are.
        """
        if self.runtime.communicator.any(not (finite and self.gradients_are_finite())):
            self.skipped_in_a_row += 1
            self.skipped_steps += 1
            self.drop_gradients()
            return None
        self.skipped_in_a_row = 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        norm = self.clip_and_step()
        return float("nan") if norm is None else float(norm)

    # --- files

    def state_dict(self) -> dict[str, Tensor]:
        """The module's full state on the CPU of rank 0, an empty dict elsewhere. All ranks must call it."""
        if not self.runtime.is_main:
            return {}
        state = self.module.state_dict(keep_vars=bool(self.averages))
        return {name: self.averages.get(tensor, tensor).detach().cpu() for name, tensor in state.items()}

    def save_optimizer(self, folder: Path):
        """Saves the optimizer state in shards that any layout can load, and this rank's fp32 master weights. Each rank
        syncs the files that it wrote itself: only its own machine may have their content in memory."""
        from safetensors.torch import save_file

        if self.optimizer.optim.state:  # empty before the first step, as in a critic's warm-up
            self.booster.save_optimizer(self.optimizer, str(folder / OPTIMIZER), shard=True)
            self.runtime.communicator.barrier()
            for path in self.own_shards(folder / OPTIMIZER):
                sync(path)
        master = self.master_weights()
        if master:
            tensors = {str(i): tensor.detach().cpu().clone() for i, tensor in enumerate(master)}
            save_file(tensors, folder / self._master_name())
            sync(folder / self._master_name())

    def own_shards(self, folder: Path) -> list[Path]:
        """The files of the optimizer's state that this rank wrote."""
        return list(folder.iterdir()) if self.runtime.is_main else []

    def load_optimizer(self, folder: Path):
        """The inverse of `save_optimizer`. Master weights are only read back under the same layout; otherwise they
        start from the low-precision weights, as after any load."""
        from safetensors.torch import load_file

        if (folder / OPTIMIZER).is_dir():
            groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            self.booster.load_optimizer(self.optimizer, str(folder / OPTIMIZER))
            for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(settings)  # the stored ones are of another optimizer class, and outdated
            self._count_steps_alike()
        path = folder / self._master_name()
        if path.exists():
            stored = load_file(path)
            for i, tensor in enumerate(self.master_weights()):
                tensor.data.copy_(stored[str(i)])

    def _count_steps_alike(self):
        """torch's AdamW counts steps in a tensor, Colossal-AI's in a number."""
        is_torch = isinstance(self.optimizer.optim, torch.optim.AdamW)
        for weight, state in self.optimizer.optim.state.items():
            if "step" in state:
                number = float(state["step"])
                state["step"] = torch.tensor(number, device=weight.device) if is_torch else int(number)

    def _master_name(self) -> str:
        return master_weights_name(self.layout_name(), self.runtime.rank, self.runtime.world_size)

    def _restore_buffers(self, buffers: dict[str, Tensor]):
        """Undoes the plugins' cast of buffers: rotary frequencies in bf16 are wrong from some hundred positions on."""
        for name, buffer in self.module.named_buffers():
            if name in buffers and buffer.dtype != torch.float32:
                buffer.data = buffers[name].to(self.runtime.device)


def count(parameter: nn.Parameter) -> int:
    """The number of values; of a quantized weight, those that are packed in it."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def parameter_groups(module: nn.Module, settings: dict) -> list[dict]:
    """The trainable weights for AdamW: vectors (biases, norms) are not decayed; a weight's `lr_factor`, if it has one,
    multiplies its learning rate."""
    kinds: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            kinds.setdefault((p.ndim >= 2, getattr(p, "lr_factor", 1.0)), []).append(p)
    return [
        {
            "params": kinds[kind],
            "weight_decay": settings.get("weight_decay", 0.0) if kind[0] else 0.0,
            "lr_factor": kind[1],
        }
        for kind in sorted(kinds, reverse=True)
    ]


def adam(settings: dict) -> dict:
    """AdamW's other keywords; the learning rate is set at each step."""
    return dict(lr=1e-5, betas=tuple(settings.get("betas", (0.9, 0.999))), eps=settings.get("eps", 1e-8))
