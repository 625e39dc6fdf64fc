"""A run's peak memory on one rank, found by going through the run with tensors that have shapes but no data.

The models are the real ones, so what autograd keeps is counted, not estimated. What the plugin keeps is written down
in `replica.py`. Deep models are run with few layers and continued in a straight line.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from coati.models import Actor, Critic, RewardModel
from coati.models.base import BaseModel, disable_dropout
from coati.parallel import check_plugin
from coati.parallel.engine import DTYPES
from coati.planner.live import Item, LiveMemory
from coati.planner.parallel import (
    body,
    leave_out_other_stages,
    micro_batches_in_flight,
    shrink_to_stage,
    sizes,
    split_tensors,
)
from coati.planner.replica import Replica

FEW_LAYERS = (4, 8)


@dataclass(frozen=True)
class Workload:
    """What is planned.

    Attributes:
        algorithm: sft, reward or ppo; `config` is its settings.
        shapes: transformers configs of the models by name (model; or actor, critic, reference, reward model).
        gpus: processes, one a GPU.
        on_gpu: False for a run on CPUs.
    """

    algorithm: str
    config: object
    shapes: dict[str, object]
    gpus: int
    on_gpu: bool = True


@dataclass(frozen=True)
class Plan:
    """Bytes of every item on one rank, at the worst instant of every phase."""

    phases: dict[str, Counter[Item]] = field(default_factory=dict)

    @property
    def worst(self) -> str:
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def peak(self) -> Counter[Item]:
        return self.phases[self.worst]


def plan(workload: Workload) -> Plan:
    """The peak of every phase of the run.

    Raises:
        UserError: sizes that don't fit together.
    """
    check_plugin(workload.config, lora=workload.config.lora_rank > 0, world_size=workload.gpus)
    workload.config.check(sizes(workload.config, workload.gpus).data)
    depth = max(shape.get_text_config().num_hidden_layers for shape in workload.shapes.values())
    few, more = FEW_LAYERS
    if depth <= more:
        moments = _moments(workload, None)
    else:
        moments = _continue(_moments(workload, few), _moments(workload, more), (depth - few) / (more - few))
    phases: dict[str, Counter[Item]] = {}
    for name, items in moments.items():
        phase = name.split(":")[0]
        if phase == "start":  # part of every other
            continue
        if items.total() > phases.get(phase, Counter()).total():
            phases[phase] = items
    return Plan(phases)


def _continue(few: dict, more: dict, steps: float) -> dict[str, Counter[Item]]:
    """The straight line through two depths, item by item."""
    line = {}
    for name in more:
        items = set(few[name]) | set(more[name])
        values = {i: few[name][i] + steps * (more[name][i] - few[name][i]) for i in items}
        line[name] = Counter({item: max(0, round(value)) for item, value in values.items()})
    return line


def _moments(workload: Workload, layers: int | None) -> dict[str, Counter[Item]]:
    worst: dict[str, Counter[Item]] = {}
    stages = sizes(workload.config, workload.gpus).pipeline
    for stage in {0, stages - 1}:
        with FakeTensorMode():
            run = _DryRun(workload, layers, stage)
            {"sft": run.sft, "reward": run.reward, "ppo": run.ppo}[workload.algorithm]()
        for name, items in run.live.moments.items():
            if items.total() > worst.get(name, Counter()).total():
                worst[name] = items
    return worst


class _PlannedActor(Actor):
    """An actor that is told how many targets a row has: those of a mask without data can't be counted."""

    targets_per_row = 0

    def places(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = targets.new_zeros(2, len(targets) * self.targets_per_row, dtype=torch.long)
        return rows, columns


class _DryRun:
    """The models of one rank, and the phases they go through."""

    def __init__(self, workload: Workload, layers: int | None, stage: int):
        self.workload, self.config, self.layers, self.stage = workload, workload.config, layers, stage
        self.live = LiveMemory()
        self.sizes = sizes(workload.config, workload.gpus)

    def sft(self):
        c = self.config
        model = self.replica("model", _PlannedActor, self.accumulates(c.batch_size))
        self.learn(model, c.rows_per_pass, c.max_length, self.log_probs(c.max_length))
        if c.eval_data:
            self.generate(self.speaker(model), c.samples, c.max_length, c.max_new_tokens, "sample answers")

    def reward(self):
        c = self.config
        model = self.replica("model", RewardModel, self.accumulates(c.batch_size))
        self.learn(model, 2 * c.rows_per_pass, c.max_length, scores)

    def ppo(self):
        c, rows = self.config, self.config.rows_per_pass
        seq = c.max_prompt_length + c.max_new_tokens
        accumulates = self.accumulates(c.batch_size // c.minibatches)
        actor = self.replica("actor", _PlannedActor, accumulates or bool(c.ptx_data))
        critic = self.replica("critic", Critic, accumulates)
        reference = self.replica("reference", _PlannedActor) if "reference" in self.workload.shapes else None
        scorer = self.replica("reward model", RewardModel) if "reward model" in self.workload.shapes else None
        answers = min(c.generation_batch_size, c.batch_size // self.sizes.data)
        self.generate(self.speaker(actor), answers, c.max_prompt_length, c.max_new_tokens, "generate")
        log_probs = self.log_probs(c.max_new_tokens)
        if scorer:
            self.evaluate(scorer, rows, seq, "score", scores)
        for model, forward in ((actor, log_probs), (reference, log_probs), (critic, scores)):
            if model:
                self.evaluate(model, rows, seq, "evaluate", forward)
        self.learn(critic, rows, seq, scores)
        self.learn(actor, rows, seq, self.log_probs(c.max_new_tokens, with_entropy=True))

    def log_probs(self, targets_per_row: int, **options) -> Callable:
        """An actor's forward pass. One that is split over processes gives the log-probs of all tokens."""

        def forward(module: _PlannedActor, ids: torch.Tensor, mask: torch.Tensor):
            module.targets_per_row = targets_per_row
            targets = mask if self.config.model_parallel_size == 1 else None
            output = module(ids, mask, targets=targets, **options)
            return output[0] if options else output

        return forward

    def accumulates(self, rows: int) -> bool:
        return rows // self.sizes.data > self.config.rows_per_pass

    def replica(self, name: str, model_class: type[BaseModel], accumulates: bool | None = None, whole=False) -> Replica:
        """A model as this rank has it; `accumulates` is None for a frozen one, `whole` takes all pipeline stages."""
        c, trained = self.config, accumulates is not None
        shape = copy.deepcopy(self.workload.shapes[name])
        stages = 1 if whole else self.sizes.pipeline
        shrink_to_stage(shape, self.layers, stages)
        if self.workload.on_gpu:  # fused attention draws its dropout anew in the backward pass; a CPU keeps all of it
            shape.attention_dropout = shape.attn_pdrop = 0.0
        dtype = torch.float32 if c.plugin == "ddp" and c.model_parallel_size == 1 else DTYPES[c.precision]
        with unset_fake_temporarily(), torch.device("meta"):
            lora = c.lora if trained else None
            module = model_class(None, shape, lora=lora, dtype=dtype, attn_implementation=c.attn_implementation)
            if self.sizes.tensor > 1:
                split_tensors(module, self.sizes.tensor)
        _make_fake(module)
        leave_out_other_stages(module, whole or self.stage == 0, whole or self.is_last)
        if self.workload.algorithm == "ppo":
            disable_dropout(module)
        if c.gradient_checkpointing:
            module.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            if module.has_adapter:
                module.model.enable_input_require_grads()
        options = dict(trained=trained, accumulates=bool(accumulates), on_gpu=self.workload.on_gpu)
        return Replica(self.live, name, module, c, self.sizes.data * self.sizes.sequence, **options)

    @property
    def is_last(self) -> bool:
        return self.stage == self.sizes.pipeline - 1

    def speaker(self, replica: Replica) -> Replica:
        """What generates: under pipeline parallelism a second, whole copy."""
        return self.replica(replica.name, Actor, whole=True) if self.sizes.pipeline > 1 else replica

    def inputs(self, rows: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, -(-seq // self.sizes.sequence))
        return torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool)

    def learn(self, replica: Replica, rows: int, seq: int, forward: Callable):
        """One micro-batch and the step. The backward pass has two moments, since one grows with the activations of all
        layers and the other with their gradients."""
        live, waiting, half = self.live, len(replica.trained) // 2, []

        def count(_):
            half.append(1)
            if len(half) == waiting:
                live.moment("learn: late backward")

        hooks = [p.register_post_accumulate_grad_hook(count) for p in replica.trained]
        live.moment("learn: early backward")
        replica.begin_micro_batch()
        flight = micro_batches_in_flight(self.config, self.sizes, self.stage)
        with live, replica.computing():
            run = forward if self.is_last else body
            losses = [run(replica.module, *self.inputs(rows, seq)).sum() for _ in range(flight)]
            losses.pop().backward()
            replica.end_backward()
        del losses
        for hook in hooks:
            hook.remove()
        live.moment("learn: step")
        replica.step()

    @torch.no_grad()
    def evaluate(self, replica: Replica, rows: int, seq: int, phase: str, forward: Callable):
        """A forward pass."""
        self.live.moment(phase)
        with self.live, replica.computing(whole=phase == "score"):
            forward(replica.module, *self.inputs(rows, seq))

    @torch.no_grad()
    def generate(self, replica: Replica, rows: int, prompt: int, new: int, phase: str):
        """The prompt's forward pass, and the last token's with a full cache."""
        module, live = replica.module.transformer, self.live
        training = [part for part in module.modules() if part.training]
        module.eval()
        live.moment(f"{phase}: prompt")
        with live, replica.computing(whole=True):
            ids, mask = torch.zeros(2, rows, prompt, dtype=torch.long)  # whole, also under sequence parallelism
            cache = _counted_cache(live, replica.name)
            options = {replica.module.cache_name: cache, "use_cache": True}
            output = module(ids, attention_mask=mask, logits_to_keep=1, **options)
            _draw(output.logits[:, -1])
            filled = [(layer.keys, layer.values) for layer in cache.layers]
        del output, cache, options
        live.moment(f"{phase}: last token")
        with live, replica.computing(whole=True):
            cache = _counted_cache(live, replica.name)
            for i in range(len(filled)):
                cache.update(*(_longer(kept, prompt + new - 1) for kept in filled.pop(0)), i)
            mask = torch.ones(rows, prompt + new, dtype=torch.long)
            options = {replica.module.cache_name: cache, "use_cache": True}
            output = module(ids[:, -1:], attention_mask=mask, **options)
            _draw(output.logits[:, -1])
        for part in training:
            part.training = True


def scores(module: BaseModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return module(ids, mask)


def _make_fake(module: nn.Module):
    """Turns weights on the meta device into tensors that pass for CPU tensors; tied ones stay tied."""
    twins: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            if id(p) not in twins:
                twins[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            setattr(part, name, twins[id(p)])
        for name, b in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(b.shape, dtype=b.dtype))


def _counted_cache(live: LiveMemory, name: str):
    from transformers import DynamicCache

    class Counted(DynamicCache):
        def update(self, *arguments, **keywords):
            kept = super().update(*arguments, **keywords)
            live.hold(kept, (name, "KV cache"))
            return kept

    return Counted()


def _longer(kept: torch.Tensor, seq: int) -> torch.Tensor:
    """Keys or values `[batch, heads, seq, width]` of more tokens."""
    return kept.new_empty(*kept.shape[:2], seq, kept.shape[3])


def _draw(logits: torch.Tensor):
    """What sampling a token makes of the logits `[batch, vocab]`: log-probs for the record, probabilities to draw."""
    scores = logits.float()
    recorded = scores.log_softmax(-1)
    chosen = torch.multinomial(scores.softmax(-1), 1)
    return recorded.gather(1, chosen)
