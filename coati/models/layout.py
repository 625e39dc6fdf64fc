"""How a model's tensors are distributed over processes."""

from torch import Tensor, nn

from coati.losses.distillation import Divergence, vocabulary_divergence
from coati.losses.language import at_temperature, entropy, log_partition, next_log_probs


class Layout:
    """Every process holds the whole sequence and the whole vocabulary. Sharded layouts (coati.parallel) override it."""

    @property
    def is_plain(self) -> bool:
        """Whether this is that layout, in which no process needs another."""
        return type(self) is Layout

    def split(self, x: Tensor) -> Tensor:
        """This process's columns of `[batch, seq, ...]`, padded (False, 0) to a length that divides evenly."""
        return x

    def pad(self, x: Tensor) -> Tensor:
        """`[batch, seq, ...]` padded to a length that divides evenly."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `split`, with gradients: `[batch, seq]`, padded."""
        return x

    def logits(self, head: nn.Module, states: Tensor) -> Tensor:
        """This process's logits `[tokens, vocab]` from states `[tokens, hidden]` that the head has been called with."""
        return head(states)

    def log_probs(self, logits: Tensor, next_ids: Tensor, temperature: float) -> Tensor:
        """Log-probs of `next_ids` `[batch, seq]` under `logits` `[batch, seq, vocab]`, at each position."""
        return next_log_probs(logits, next_ids, temperature)

    def head_log_probs(self, logits: Tensor, head_ids: Tensor, temperature: float) -> Tensor:
        """Log-probs of several tokens `[..., heads]` under `logits` `[..., vocab]`, at each position."""
        return at_temperature(logits, temperature).log_softmax(-1).gather(-1, head_ids)

    def entropy(self, logits: Tensor, temperature: float) -> Tensor:
        """Entropy in nats at each position, `[batch, seq]`; no gradient."""
        return entropy(logits, temperature)

    def log_partition(self, logits: Tensor, temperature: float) -> Tensor:
        """Log of the sum of the exponentials of the logits at each position, `[batch, seq]`."""
        return log_partition(logits, temperature)

    def divergence(self, logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
        """Divergence of two models' distributions at each position, `[tokens]`, from logits `[tokens, vocab]`."""
        return vocabulary_divergence(logits, teacher_logits, divergence)
