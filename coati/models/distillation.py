"""A teacher, of whose distributions a student learns, and the student.

Neither's logits are ever in memory for more than a few tokens: the teacher gives the states before its output layer,
and the student makes both models' logits of a few tokens at a time.
"""

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coati.losses.distillation import Divergence
from coati.models.actor import Actor


class Teacher(Actor):
    """An `Actor` that gives what its output layer reads.

    Attributes:
        own_head: a copy of the output layer, which `keep_head` makes.
    """

    own_head: tuple[nn.Module, ...] = ()

    def keep_head(self, dtype: torch.dtype, device: torch.device):
        """Copies the output layer, for a plugin that gathers the model's weights in its forward pass only."""
        head = copy.deepcopy(self.transformer.get_output_embeddings())
        self.own_head = (head.to(device, dtype).requires_grad_(False),)  # in a tuple, it is no part of this module

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, targets: Tensor, right_padded: bool = False
    ) -> Tensor:
        """`[tokens, hidden]`, see `Actor.target_states`.

        Args:
            targets: bool `[batch, seq]`, the tokens that the student learns.
        """
        return self.target_states(input_ids, attention_mask, targets, right_padded)

    def logits_of(self, states: Tensor) -> Tensor:
        """See `Actor`."""
        if self.own_head and self._head_is_last:
            return self.own_head[0](states)
        return super().logits_of(states)


class Student(Actor):
    """An `Actor` that tells how far it is from a teacher."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        right_padded: bool = False,
        teacher: Teacher | None = None,
        teacher_states: Tensor | None = None,
        divergence: Divergence | None = None,
        **options,
    ):
        """Without a teacher, what `Actor` gives. With one, the divergence of the distributions that the targets were
        drawn from, float32 `[batch, seq]`, 0 elsewhere; the backward pass computes the logits again.

        Args:
            targets: bool `[batch, seq]`; required with a teacher.
            teacher: its vocabulary may be padded to another size: only what both have is compared then.
            teacher_states: what it gave for the same batch and targets, `[tokens, hidden]`.
            **options: those of `Actor`.
        """
        if teacher is None:
            return super().forward(input_ids, attention_mask, targets=targets, right_padded=right_padded, **options)
        states = self.target_states(input_ids, attention_mask, targets, right_padded)

        def measure(states: Tensor, teacher_states: Tensor) -> Tensor:
            logits, teacher_logits = self.logits_of(states), teacher.logits_of(teacher_states)
            shared = min(logits.shape[-1], teacher_logits.shape[-1])
            return self.layout.divergence(logits[..., :shared], teacher_logits[..., :shared], divergence)

        length = self._rows_of_logits(states.device, models=2)
        parts = []
        for chunk in zip(states.split(length), teacher_states.split(length), strict=True):
            if len(states) > length and torch.is_grad_enabled():
                parts.append(checkpoint(measure, *chunk, use_reentrant=False))
            else:
                parts.append(measure(*chunk))
        return self._at_targets(torch.cat(parts), self.target_indices(targets), input_ids, targets)
