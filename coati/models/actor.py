"""The policy."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coati.losses.language import FrozenProjectedLogProbs, ProjectedLogProbs, align
from coati.models.base import BaseModel
from coati.models.layout import Layout
from coati.models.routing import RoutingReplay

# Logits in memory at a time. On a CPU they stay near the caches; a GPU's matrix products need many rows.
MAX_LOGITS = {"cpu": 2**23, "cuda": 2**27}
ROWS = 128  # with fewer, a matrix product takes as long as reading the weight
KEPT_LOGITS = 2**26  # on a CPU, those of a micro-batch that need not be computed again in its backward pass
CPU_TILE = (1024, 1024)  # tokens and vocabulary: on a CPU products are quickest where their result stays in the caches


@dataclass(frozen=True)
class LogitOutputs:
    """What is computed from logits besides the log-probs, see `Actor.forward`."""

    temperature: float
    entropy: bool | Literal["trained"]
    log_partition: bool
    heads: bool


class Actor(BaseModel):
    """A causal language model that gives the log-probs of given tokens, and generates.

    Attributes:
        max_logits: how many logits may be in memory at a time; the device's number in `MAX_LOGITS` if None.
    """

    auto_class = "AutoModelForCausalLM"
    max_logits: int | None = None
    _head_is_last: bool | None = None  # not known before the first forward pass
    _routing_replay: RoutingReplay | None = None  # once experts were given

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool | Literal["trained"] = False,
        with_log_partition: bool = False,
        head_ids: Tensor | None = None,
        routing: Tensor | None = None,
        adapter: bool = True,
        shared_prefix_group: int = 1,
        right_padded: bool = False,
    ):
        """Log-probs of the tokens, float32 `[batch, seq]`, entry `t` for token `t` (entry 0 is 0).

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding, which may stand on either side; None for no padding.
            targets: bool `[batch, seq]`, the tokens whose log-probs are wanted; the others get 0, and logits are
                in memory for a few tokens at a time only.
            position_ids: `[batch, seq]`, of rows that hold several documents, see `run`.
            temperature: of the distribution whose log-probs are wanted.
            with_entropy: return `(log_probs, entropy)`, the entropy in nats, `[batch, seq]`; "trained" for a gradient.
            with_log_partition: return, last, the log of the sum of the exponentials of the logits, `[batch, seq]`.
            head_ids: `[batch, seq, heads]` int64, tokens that could have stood at each place: return, last, their
                log-probs there, float32 of that shape.
            routing: `[batch, seq, layers, k]` int64, the experts that tokens of a mixture go to; -1 where the router
                chooses. Not where this process has a part of the sequence or of the layers only.
            adapter: False for the model without its LoRA adapter (the reference of a LoRA actor).
            shared_prefix_group, right_padded: see `lay_out`.
        """
        wanted = LogitOutputs(temperature, with_entropy, with_log_partition, head_ids is not None)
        if position_ids is None:
            packed, inputs = self.lay_out(input_ids, attention_mask, right_padded, shared_prefix_group)
        else:
            packed, inputs = None, dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        if routing is not None:
            self._replay(packed.pack(routing) if packed else routing)
        with self._with_adapter(adapter):
            if targets is not None and self._head_is_last is not False:
                hidden = self._states_before_head(inputs)
                if packed:
                    hidden = packed.unpack(hidden)
                if self._head_is_last:
                    return self._target_log_probs(hidden, input_ids, targets, wanted, head_ids)
            logits = self.run(**inputs).logits
        if packed:
            logits = packed.unpack(logits)
        next_ids = [self.layout.split(ids.roll(-1, dims=1)) for ids in (input_ids, head_ids) if ids is not None]
        outputs = _outputs_of_logits(self.layout, logits, next_ids, wanted)
        outputs = tuple(self._aligned(output, input_ids) for output in outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _replay(self, routing: Tensor):
        """Has the next pass send its tokens to these experts."""
        if self._routing_replay is None:
            self._routing_replay = RoutingReplay(self.model)
        self._routing_replay.given = routing.flatten(0, 1)

    def _with_adapter(self, adapter: bool) -> AbstractContextManager:
        if adapter or not self.has_adapter:
            return nullcontext()
        return self.model.disable_adapter()

    def _states_before_head(self, inputs: dict) -> Tensor:
        """What the output layer reads, `[batch, seq, hidden]`, given what `run` takes. The layer itself
        sees the first position only: enough for the first call to find out whether its logits are the model's, since
        some models cap or scale them afterwards."""
        head, states, logits = self.transformer.get_output_embeddings(), [], []

        def capture_states(module, positional):
            states.append(positional[0])
            return (positional[0][:, :1],)

        def capture_logits(module, positional, output):
            logits.append(output)

        hooks = [head.register_forward_pre_hook(capture_states), head.register_forward_hook(capture_logits)]
        try:
            output = self.run(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self._head_is_last = output.logits is logits[0]
        return states[0]

    def target_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, targets: Tensor, right_padded: bool = False
    ) -> Tensor:
        """What `logits_of` makes the logits of that predict this process's targets, `[tokens, hidden]`: the states that
        the output layer reads; of models that change its logits, these logits.

        Args: as `forward`.
        """
        packed, inputs = self.lay_out(input_ids, attention_mask, right_padded)
        states = self._states_before_head(inputs) if self._head_is_last is not False else None
        if not self._head_is_last:
            states = self.run(**inputs).logits
        return (packed.unpack(states) if packed else states)[self.target_indices(targets)]

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits `[tokens, vocab]` (of a split vocabulary, this process's) of some of the rows that `target_states` has
        given."""
        if not self._head_is_last:
            return states
        return self.layout.logits(self.transformer.get_output_embeddings(), states)

    def target_indices(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of this process's positions that predict targets, long `[tokens]`: one at least, since
        every weight must get a gradient under data parallelism."""
        predicts_target = nn.functional.pad(targets[:, 1:], (0, 1))
        rows, columns = self.layout.split(predicts_target).nonzero(as_tuple=True)
        if len(rows) == 0:
            rows = columns = targets.new_zeros(1, dtype=torch.long)
        return rows, columns

    def _target_log_probs(
        self, hidden: Tensor, input_ids: Tensor, targets: Tensor, wanted: LogitOutputs, head_ids: Tensor | None
    ):
        """Log-probs (and more, see `_outputs_of_logits`) of the targets from the states that predict them, `MAX_LOGITS`
        logits at a time but those of `ROWS` tokens at least (on a CPU, `CPU_TILE`); where that is not all, the backward
        pass recomputes them, unless a CPU keeps them."""
        head, places = self.transformer.get_output_embeddings(), self.target_indices(targets)
        states = hidden[places]
        ids, *heads = [self.layout.split(x.roll(-1, dims=1))[places] for x in (input_ids, head_ids) if x is not None]

        def measure(states: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
            return _outputs_of_logits(self.layout, self.layout.logits(head, states), ids, wanted)

        length = self._rows_of_logits(hidden.device)
        simple = wanted.entropy != "trained" and not wanted.log_partition and not wanted.heads
        if len(ids) > length and is_plain(head) and simple:
            found = self._project(head, states, ids, wanted, length)
        else:
            recomputes = len(ids) > length and torch.is_grad_enabled()
            parts = []
            for chunk in zip(*(x.split(length) for x in (states, ids, *heads)), strict=True):
                if recomputes:
                    parts.append(checkpoint(measure, *chunk, use_reentrant=False))
                else:
                    parts.append(measure(*chunk))
            found = [torch.cat(column) for column in zip(*parts, strict=True)]
        outputs = tuple(self._at_targets(values, places, input_ids, targets) for values in found)
        return outputs if len(outputs) > 1 else outputs[0]

    def _project(
        self, head: nn.Linear, states: Tensor, ids: Tensor, wanted: LogitOutputs, length: int
    ) -> tuple[Tensor, ...]:
        """Log-probs, and entropies if wanted, `[tokens]` each, through a plain output layer: the logits of `length`
        tokens are in memory at a time, or `CPU_TILE` of them."""
        dtype = head(states[:1].detach()).dtype  # of its products, under autocast too
        weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
        on_cpu, learns = states.device.type == "cpu", torch.is_grad_enabled()
        tile = CPU_TILE if on_cpu else (length, len(weight))
        arguments = (states.to(dtype), weight, bias, ids, wanted.temperature, wanted.entropy, tile)
        if learns and not any(parameter.requires_grad for parameter in head.parameters()):
            return FrozenProjectedLogProbs.apply(*arguments)
        keeps = learns and on_cpu and self.max_logits is None and len(ids) * len(weight) <= KEPT_LOGITS
        return ProjectedLogProbs.apply(*arguments, keeps)

    def _rows_of_logits(self, device: torch.device, models: int = 1) -> int:
        """Of how many tokens the logits of so many models may be in memory at a time."""
        max_logits = self.max_logits or MAX_LOGITS.get(device.type, 2**24)
        return max(max_logits // (models * self.config.get_text_config().vocab_size), ROWS)

    def _at_targets(self, values: Tensor, places: tuple[Tensor, Tensor], input_ids: Tensor, targets: Tensor) -> Tensor:
        """`[batch, seq, ...]` from the values `[tokens, ...]` of the positions that predict targets, see
        `target_indices`."""
        shape, rest = self.layout.split(input_ids).shape, values.shape[1:]
        predictions = torch.zeros(*shape, *rest, dtype=values.dtype, device=values.device)
        aligned = self._aligned(predictions.index_put(places, values), input_ids)
        return aligned * targets.reshape(*targets.shape, *(1 for _ in rest))

    def _aligned(self, predictions: Tensor, input_ids: Tensor) -> Tensor:
        """`[batch, seq, ...]`, aligned with the tokens, from what this process's positions predict."""
        return align(self.layout.gather(predictions)[:, : input_ids.shape[1]])

    def next_logits(
        self,
        input_ids: Tensor,
        cache,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each row's last one, `[batch, vocabulary]`, with a transformers cache.

        Args:
            input_ids, position_ids: `[batch, new]`, what the cache does not hold yet; positions go on from the cache's
                length if not given.
            attention_mask: as the transformers model takes it; None for causal attention.
            last: `[batch]`, the column of each row's last token, if rows are padded on the right.
        """
        if last is None:
            return self.last_logits(input_ids, 1, cache, attention_mask, position_ids)[:, -1]
        inputs = self._inputs(input_ids, cache, attention_mask, position_ids)
        rows = torch.arange(len(last), device=last.device)
        head = self.transformer.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, states: (states[0][rows, last][:, None],))
        try:
            return self.model(**inputs).logits[:, -1]
        finally:
            hook.remove()

    def last_logits(
        self,
        input_ids: Tensor,
        count: int,
        cache=None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of the tokens after each of a row's last `count`, `[batch, count, vocabulary]`.

        Args:
            cache: a transformers cache of what comes before, to which the new tokens are added; None for nothing.
            input_ids, attention_mask, position_ids: see `next_logits`.
        """
        inputs = self._inputs(input_ids, cache, attention_mask, position_ids)
        if self._keeps_logits:
            inputs["logits_to_keep"] = count
        return self.model(**inputs).logits[:, -count:]

    def _inputs(self, input_ids: Tensor, cache, attention_mask, position_ids: Tensor | None) -> dict:
        """What the transformers model is called with."""
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=cache is not None, **self._options)
        if cache is not None:
            inputs[self.cache_name] = cache
        if position_ids is not None and self.takes_positions:
            inputs["position_ids"] = position_ids
        return inputs

    @cached_property
    def compiled_next_logits(self) -> Callable[..., Tensor]:
        """`next_logits` by torch.compile, for batches and caches of any size."""
        return torch.compile(self.next_logits, dynamic=True)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """transformers' `generate` (greedy, sampling, beam): prompts `[batch, seq]` left-padded, returns prompt and
        response `[batch, seq + new]`."""
        training = self.training
        self.eval()
        try:
            return self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        finally:
            self.train(training)


def is_plain(head: nn.Module) -> bool:
    """A linear layer with its unsharded weight whose output nothing changes: no adapter, no hooks."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hooked


def _outputs_of_logits(
    layout: Layout, logits: Tensor, next_ids: Sequence[Tensor], wanted: LogitOutputs
) -> tuple[Tensor, ...]:
    """From logits `[..., vocab]` the log-probs of the next tokens, entropies and log-partitions, each `[...]`, and the
    log-probs of heads, `[..., heads]`.

    Args:
        next_ids: the tokens, and where wanted the heads.
    """
    ids, *heads = next_ids
    outputs = [layout.log_probs(logits, ids, wanted.temperature)]
    if wanted.entropy:
        with torch.set_grad_enabled(wanted.entropy == "trained" and torch.is_grad_enabled()):
            outputs.append(layout.entropy(logits, wanted.temperature))
    if wanted.log_partition:
        outputs.append(layout.log_partition(logits, wanted.temperature))
    if wanted.heads:
        outputs.append(layout.head_log_probs(logits, heads[0], wanted.temperature))
    return tuple(outputs)
