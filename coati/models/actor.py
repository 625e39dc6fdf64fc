"""The policy."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coati.losses.language import ProjectedLogProbs, align
from coati.models.base import BaseModel
from coati.models.layout import Layout
from coati.models.packed import PackedGroups

# Logits that are there at a time. On a CPU they stay near the caches; a GPU's products need many rows.
CHUNK = {"cpu": 2**23, "cuda": 2**27}
ROWS = 128  # with fewer, a product takes as long as reading the weight


class Actor(BaseModel):
    """A causal language model that gives the log-probs of given tokens, and generates."""

    auto_class = "AutoModelForCausalLM"
    _head_is_last: bool | None = None  # not known before the first forward pass

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
        adapter: bool = True,
        shared_prefix_group: int = 1,
        right_padded: bool = False,
    ):
        """Log-probs of the tokens, float32 `[batch, seq]`, entry `t` for token `t` (entry 0 is 0).

        Args:
            input_ids: `[batch, seq]`.
            attention_mask: `[batch, seq]`, False on padding, which may stand on either side; None for no padding.
            targets: bool `[batch, seq]`, the tokens whose log-probs are wanted; the others get 0, and the vocabulary's
                logits are never there for more than a few at a time. For whole models only.
            position_ids: `[batch, seq]`, of rows that hold several documents, see `run`.
            temperature: of the distribution whose log-probs are wanted.
            with_entropy: return `(log_probs, entropy)`, the entropy in nats, `[batch, seq]`; "trained" for a gradient.
            with_log_partition: return, last, the log of the sum of the exponentials of the logits, `[batch, seq]`.
            adapter: False for the model without its LoRA adapter (the reference of a LoRA actor).
            shared_prefix_group: so many rows (i, i + batch / group, ...) are a group, and what they all begin with is
                read once, see `PackedGroups`. For whole models only.
            right_padded: padding stands on the right only, see `run`.
        """
        packed = None
        if shared_prefix_group > 1:
            packed = PackedGroups.of(input_ids, attention_mask, shared_prefix_group)
        inputs = (input_ids, attention_mask, position_ids, right_padded)
        if packed:
            inputs = packed.inputs(self.model.dtype)
        with nullcontext() if adapter or not self.has_adapter else self.model.disable_adapter():
            if targets is not None and self._head_is_last is not False:
                hidden = self._states_before_head(*inputs)
                hidden = packed.unpack(hidden) if packed else hidden
                if self._head_is_last:
                    return self._chosen_log_probs(
                        hidden, input_ids, targets, temperature, with_entropy, with_log_partition
                    )
            logits = self.run(*inputs).logits
            logits = packed.unpack(logits) if packed else logits
        next_ids = self.layout.split(input_ids.roll(-1, dims=1))
        outputs = _measure(self.layout, logits, next_ids, temperature, with_entropy, with_log_partition)
        outputs = tuple(align(self.layout.gather(output)[:, : input_ids.shape[1]]) for output in outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def _states_before_head(self, *inputs) -> Tensor:
        """What the output layer reads, `[batch, seq, hidden]`, given what `run` takes. It gets to see the first
        position only, by which the first call tells whether logits are all it gives: some models cap or scale them
        afterwards."""
        head, states, logits = self.transformer.get_output_embeddings(), [], []
        hooks = [
            head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]) or (inputs[0][:, :1],)),
            head.register_forward_hook(lambda *call: logits.append(call[-1])),
        ]
        try:
            output = self.run(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self._head_is_last = output.logits is logits[0]
        return states[0]

    def places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens whose log-probs are computed, long `[tokens]`: one at least, since every
        weight must take part for data parallelism."""
        rows, columns = targets[:, 1:].nonzero(as_tuple=True)
        if len(rows) == 0:
            rows = columns = targets.new_zeros(1, dtype=torch.long)
        return rows, columns + 1

    def _chosen_log_probs(self, hidden: Tensor, input_ids: Tensor, targets: Tensor, *how):
        """Log-probs (and more, see `_measure`) of the targets from the states that predict them, `CHUNK` logits at a
        time but those of `ROWS` tokens at least; in the backward pass logits are computed again."""
        head, (rows, columns) = self.transformer.get_output_embeddings(), self.places(targets)
        states, ids = hidden[rows, columns - 1], input_ids[rows, columns]

        def measure(states: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            return _measure(Layout(), head(states), ids, *how)

        length = max(CHUNK.get(hidden.device.type, 2**24) // self.config.get_text_config().vocab_size, ROWS)
        recomputes = len(ids) > length and torch.is_grad_enabled()
        if recomputes and is_plain(head) and how[1:] in ((False, False), (True, False)):
            dtype = head(states[:1].detach()).dtype  # of its products, under autocast too
            inputs = [x if x is None else x.to(dtype) for x in (states, head.weight, head.bias)]
            found = ProjectedLogProbs.apply(*inputs, ids, *how[:2], length)
        else:
            measure = partial(checkpoint, measure, use_reentrant=False) if recomputes else measure
            parts = [measure(*part) for part in zip(states.split(length), ids.split(length), strict=True)]
            found = [torch.cat(column) for column in zip(*parts, strict=True)]
        zeros = partial(torch.zeros, input_ids.shape, device=input_ids.device)
        outputs = tuple(zeros(dtype=x.dtype).index_put((rows, columns), x) * targets for x in found)
        return outputs if len(outputs) > 1 else outputs[0]

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
    """A linear layer whose weight is all here and whose output nobody changes: no adapter, no shards."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hooked


def _measure(layout: Layout, logits: Tensor, next_ids: Tensor, temperature, with_entropy, with_partition: bool):
    """What is asked about logits `[..., vocab]`: log-probs of the next tokens, entropies, log-partitions, `[...]`."""
    outputs = [layout.log_probs(logits, next_ids, temperature)]
    if with_entropy:
        with torch.set_grad_enabled(with_entropy == "trained" and torch.is_grad_enabled()):
            outputs.append(layout.entropy(logits, temperature))
    if with_partition:
        outputs.append(layout.log_partition(logits, temperature))
    return tuple(outputs)
