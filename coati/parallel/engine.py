"""One model under one plugin: the handful of operations that trainers need."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coati.parallel.launch import Runtime
from coati.parallel.plugins import PLUGINS, PluginConfig, make_booster, resolve_precision

LossOf = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(module: nn.Module, config: PluginConfig, runtime: Runtime, *, generates: bool = False, **settings):
    """An `Engine` of the kind that the config asks for.

    Args:
        generates: whether `full()` will be used (under pipeline parallelism that takes a copy of the model).
    """
    if config.model_parallel_size == 1:
        return Engine(module, config, runtime, **settings)
    from coati.parallel.hybrid import HybridEngine

    return HybridEngine(module, config, runtime, generates=generates, **settings)


class Engine:
    """A model (and its AdamW) sharded by a plugin.

    Losses that `learn` is given are shares of a global loss: their sum over micro-batches and ranks is the loss. The
    plugins average gradients over ranks, so shares are multiplied by their number to turn that into a sum.

    Args:
        module: the model, created alike on every rank.
        config: plugin, precision, clipping.
        optimizer: keywords of AdamW (`weight_decay`, `betas`, `eps`), or None for a frozen model.
        accumulates: whether several `backward` calls may come before a `step`.

    Attributes:
        parameters, trained_parameters: how many there are on all ranks together, whatever holds them here.
        skipped: how many steps in a row have been skipped, up to the last one.
    """

    def __init__(
        self,
        module: nn.Module,
        config: PluginConfig,
        runtime: Runtime,
        *,
        optimizer: dict | None = None,
        accumulates: bool = True,
    ):
        self.module, self.config, self.runtime = module, config, runtime
        self.gradient_ranks, self.skipped = runtime.world_size, 0
        self.precision = resolve_precision(config)
        self.model: Any  # colossalai's wrappers have methods of their own
        self.optimizer: Any = None
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers() if buffer.dtype == torch.float32}
        if optimizer is None:
            module.requires_grad_(False).eval()
        else:
            module.train()  # `from_pretrained` leaves models in evaluation mode, where nothing is checkpointed
        self.parameters = sum(count(p) for p in module.parameters())
        self.trained_parameters = sum(count(p) for p in module.parameters() if p.requires_grad)
        if optimizer is None and config.plugin != "gemini" and config.model_parallel_size == 1:
            # a replica needs no wrapper; under ddp, autocast takes care of the precision
            self.model = module.to(runtime.device, None if config.plugin == "ddp" else DTYPES[self.precision])
        else:
            self.booster = make_booster(config, accumulates=accumulates)
            unboosted = None if optimizer is None else _make_optimizer(module, config, optimizer)
            self.model, self.optimizer, *_ = self.booster.boost(module, unboosted)
        self._restore_buffers(buffers)

    def __call__(self, **inputs):
        """The module's forward, through the plugin. Under Gemini every rank must call it equally often."""
        with self._autocast():
            return self.model(**inputs)

    def forward_all(self, inputs: Sequence[dict[str, Any]]) -> list:
        """The outputs for several micro-batches, without gradient."""
        with torch.no_grad():
            return [self(**one) for one in inputs]

    def learn(self, tasks: Sequence[tuple[dict[str, Any], LossOf]]) -> list[dict[str, Tensor]]:
        """Adds up the gradients of the micro-batches' shares of the loss.

        Args:
            tasks: for each micro-batch the inputs of the model, and what gives the share of the loss and of the metrics
                from the model's output.

        Returns:
            The metrics of each micro-batch.
        """
        metrics = []
        alone = self.config.plugin == "ddp" and self.runtime.world_size == 1  # DDP would copy gradients for no one
        for i, (inputs, loss_of) in enumerate(tasks):
            # gradients travel with the last micro-batch only, where that helps
            travel = i == len(tasks) - 1 and not alone
            with nullcontext() if travel or not self.booster.plugin.support_no_sync() else self._no_sync():
                share, of_this = loss_of(self(**inputs))
                self.booster.backward(share * self.gradient_ranks, self.optimizer)
            metrics.append(of_this)
        return metrics

    def step(self, learning_rate: float, finite: bool = True) -> float:
        """Clips, updates, clears the gradients; returns the gradients' global L2 norm before clipping.

        Where a gradient is NaN or infinite on any rank, or the loss is (`finite` is False), every rank skips the step:
        weights and optimiser stay as they are, and NaN is returned. Infinite gradients in fp16 are left to the loss
        scaler, which expects them.
        """
        if self.runtime.communicator.any(not (finite and self._finite_gradients())):
            self.skipped += 1
            self._drop_gradients()
            return float("nan")
        self.skipped = 0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        plain = self.config.plugin == "ddp" and self.config.model_parallel_size == 1
        norm = self._clip() if plain else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if norm is None:
            norm = self.optimizer.get_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _finite_gradients(self) -> bool:
        """Whether this rank's part of the gradients, summed over ranks by now, has a finite norm."""
        if self.precision == "fp16":
            return True
        if self.config.plugin == "gemini":
            return not self.model.chunk_manager.overflow_counter.item()
        if PLUGINS[self.config.plugin] == "zero":
            stores, groups = self.optimizer.pg_to_grad_store.values(), range(self.optimizer.num_param_groups)
            gradients = [g for store in stores for i in groups for g in store.get_working_grads_by_group_id(i)]
        else:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())

    def _drop_gradients(self):
        if self.config.plugin != "gemini":
            self.optimizer.zero_grad()
            return
        # Gemini's gradients lie where the weights were, which come back from their fp32 copies: the end of its `step`
        self.optimizer._set_grad_ptr()
        self.optimizer._clear_global_norm()
        self.optimizer.zero_grad()
        self.optimizer._update_fp16_params()
        self.model.chunk_manager.accumulating_grads = False
        self.model.chunk_manager.overflow_counter.zero_()

    @contextmanager
    def full(self) -> Iterator[nn.Module]:
        """The plain module with all its weights on this rank, for generation: no collective call inside."""
        with self._autocast():
            if self.config.plugin != "gemini":
                yield self.module
                return
            manager = self.model.chunk_manager
            for chunk in manager.get_chunks(self.model.fp16_params):
                manager.access_chunk(chunk)
            try:
                yield self.module
            finally:
                self.model._post_forward()
                self.model.gemini_manager.reset_attributes()

    def state_dict(self) -> dict[str, Tensor]:
        """The module's full state on the CPU of rank 0, an empty dict elsewhere. All ranks must call it."""
        state = self.model.state_dict() if self.config.plugin == "gemini" else self.module.state_dict()
        if not self.runtime.is_main:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in state.items()}

    def save_optimizer(self, folder: Path):
        """Optimiser state in shards that any layout can load, and this rank's fp32 master weights."""
        from safetensors.torch import save_file

        if self.optimizer.optim.state:  # empty before the first step, as in a critic's warm-up
            self.booster.save_optimizer(self.optimizer, str(folder / "optimizer"), shard=True)
            self.runtime.communicator.barrier()
        if master := self._master_weights():
            tensors = {str(i): tensor.detach().cpu().clone() for i, tensor in enumerate(master)}
            save_file(tensors, folder / self._master_name())

    def load_optimizer(self, folder: Path):
        """The inverse of `save_optimizer`. Master weights are only read back under the same layout; otherwise they
        start from the low-precision weights, as after any load."""
        from safetensors.torch import load_file

        if (folder / "optimizer").is_dir():
            groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            self.booster.load_optimizer(self.optimizer, str(folder / "optimizer"))
            for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(settings)  # the stored ones are those of another class of optimiser, and older
            self._count_steps_alike()
        path = folder / self._master_name()
        if path.exists():
            stored = load_file(path)
            for i, tensor in enumerate(self._master_weights()):
                tensor.data.copy_(stored[str(i)])

    def _count_steps_alike(self):
        """torch's AdamW counts steps in a tensor, Colossal-AI's in a number."""
        is_torch = isinstance(self.optimizer.optim, torch.optim.AdamW)
        for weight, state in self.optimizer.optim.state.items():
            if "step" in state:
                number = float(state["step"])
                state["step"] = torch.tensor(number, device=weight.device) if is_torch else int(number)

    def _master_name(self) -> str:
        c, runtime = self.config, self.runtime
        layout = f"{PLUGINS[c.plugin]}-{c.tensor_parallel}-{c.pipeline_parallel}-{c.sequence_parallel}"
        return f"master-{layout}-{runtime.rank}-of-{runtime.world_size}.safetensors"

    def _master_weights(self) -> list[Tensor]:
        """This rank's fp32 copies of low-precision weights, in a fixed order."""
        if self.precision == "fp32" or self.config.plugin == "ddp":
            return []
        if self.config.plugin == "gemini":
            chunks = dict.fromkeys(self.model.chunk_manager.get_chunk(p) for p in self.model.fp16_params)
            return [chunk.paired_chunk.payload for chunk in chunks]
        groups = self.optimizer._master_param_groups_of_current_rank
        return [tensor for group in groups.values() for tensor in group]

    def _autocast(self):
        if self.config.plugin != "ddp" or self.precision == "fp32" or self.config.model_parallel_size > 1:
            return nullcontext()
        return torch.autocast(self.runtime.device.type, dtype=DTYPES[self.precision])

    def _no_sync(self):
        return self.booster.no_sync(self.model, self.optimizer)

    def _clip(self) -> Tensor:
        if self.precision == "fp16":
            self.optimizer.unscale_grad()
        limit = self.config.max_grad_norm or float("inf")
        return nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], limit)

    def _restore_buffers(self, buffers: dict[str, Tensor]):
        """Undoes the plugins' cast of buffers: rotary frequencies in bf16 are wrong from some hundred positions on."""
        for name, buffer in self.module.named_buffers():
            if name in buffers and buffer.dtype != torch.float32:
                buffer.data = buffers[name].to(self.runtime.device)


def count(parameter: nn.Parameter) -> int:
    """Its numbers; of a quantized weight, those that are packed in it."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _make_optimizer(module: nn.Module, config: PluginConfig, settings: dict):
    """AdamW over the trainable weights; vectors (biases, norms) are not decayed; a weight's `lr_factor`, if it has one,
    multiplies its learning rate."""
    kinds: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in module.parameters():
        if p.requires_grad:
            kinds.setdefault((p.ndim >= 2, getattr(p, "lr_factor", 1.0)), []).append(p)
    groups = [
        {
            "params": kinds[kind],
            "weight_decay": settings.get("weight_decay", 0.0) if kind[0] else 0.0,
            "lr_factor": kind[1],
        }
        for kind in sorted(kinds, reverse=True)
    ]
    keywords = dict(lr=1e-5, betas=tuple(settings.get("betas", (0.9, 0.999))), eps=settings.get("eps", 1e-8))
    if config.plugin == "ddp":
        return torch.optim.AdamW(groups, fused=True, **keywords)
    from colossalai.nn.optimizer import HybridAdam

    return HybridAdam(groups, adamw_mode=True, **keywords)
