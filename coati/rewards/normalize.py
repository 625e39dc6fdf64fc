"""Running statistics of scores."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al.'s parallel update), the same on every rank."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, sums: Tensor):
        """Adds a global batch, given as `coati.losses.masked_sums` added over ranks."""
        count, total, squares = sums.tolist()
        if count == 0:
            return
        batch_mean = total / count
        delta, new_count = batch_mean - self.mean, self.count + count
        self.squares += max(squares - count * batch_mean**2, 0.0) + delta**2 * self.count * count / new_count
        self.mean += delta * count / new_count
        self.count = new_count

    @property
    def std(self) -> float:
        """Population standard deviation; 1 until there are two scores that differ."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0

    def normalize(self, scores: Tensor) -> Tensor:
        """(scores - mean) / std, `[batch]`; the standard deviation has a floor of 1e-3."""
        return (scores - self.mean) / max(self.std, 1e-3)
