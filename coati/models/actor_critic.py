"""Policy and value function on one trunk."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from coati.models.actor import Actor
from coati.models.base import in_float32
from coati.models.value_head import ValueHead, load_head, save_head


class ActorCritic(Actor):
    """A causal language model with a value head on its last hidden states: one forward pass gives the log-probs of
    tokens and the values.

    Folders are those of `AutoModelForCausalLMWithValueHead` (TRL's too): the language model, and `v_head.summary`
    beside its weights. A folder without a head gets a new one.

    Args:
        pretrained: as `BaseModel`; or an `AutoModelForCausalLMWithValueHead`, which stays in use: its weights are
            the ones that are trained.
    """

    def __init__(self, pretrained=None, config=None, *, lora=None, **kwargs):
        head = getattr(pretrained, "v_head", None)
        super().__init__(pretrained if head is None else pretrained.pretrained_model, config, lora=lora, **kwargs)
        if head is None:
            small = dict(v_head_init_strategy="normal", v_head_initializer_range=1 / (self.last_hidden_state_size + 1))
            head = ValueHead(self.config, **small).to(next(self.model.parameters()).dtype)
            stored = load_head(pretrained) if isinstance(pretrained, str | Path) else None
            if stored:
                head.load_state_dict({name.removeprefix("v_head."): tensor for name, tensor in stored.items()})
        self.v_head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, value_only: bool = False, **options):
        """What `Actor` gives, and the values: `(log_probs, values)` or `(log_probs, entropy, values)`, each float32
        `[batch, seq]`. A value has seen the tokens up to and including its own.

        Args:
            value_only: the head gets a gradient and the trunk doesn't.
            **options: those of `Actor`.
        """
        with self._last_hidden_states() as hidden:
            output = super().forward(input_ids, attention_mask, **options)
        states = hidden[0].detach() if value_only else hidden[0]
        values = in_float32(self.v_head.summary, self.v_head.dropout(states))
        values = self.layout.gather(values.squeeze(-1))[:, : input_ids.shape[1]]
        return (*output, values) if isinstance(output, tuple) else (output, values)

    def save_pretrained(self, folder, state_dict=None, merge: bool = False, dtype: torch.dtype | None = None):
        """As `BaseModel.save_pretrained`, with the head among the weights, or beside an adapter's."""
        state = self.state_dict() if state_dict is None else state_dict
        super().save_pretrained(folder, state, merge, dtype)
        if self.has_adapter and not merge:
            save_head(folder, state)

    @contextmanager
    def _last_hidden_states(self):
        """What the language-model head reads, in a list: cheaper than asking for all layers' hidden states."""
        hidden = []
        head = self.transformer.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        try:
            yield hidden
        finally:
            hook.remove()
