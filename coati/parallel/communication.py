"""The few collective operations that trainers use, in words."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Communicator:
    """Sums and agreements over all ranks. With one process every call is the identity."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor | float | int) -> Tensor:
        """Sum over ranks, in float64 for numbers and in the tensor's own dtype for tensors."""
        x = x.detach().clone() if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
        x = x.to(self.device)
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def sum_metrics(self, shares: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Adds up the shares of every micro-batch and rank. All ranks must hold the same names."""
        totals: dict[str, Tensor] = {}
        for share in shares:
            for name, value in share.items():
                value = torch.as_tensor(value, dtype=torch.float64, device=self.device)
                totals[name] = totals[name] + value if name in totals else value
        names = sorted(totals)
        if not names:
            return {}
        summed = self.sum(torch.stack([totals[name] for name in names]))
        return dict(zip(names, summed.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one: decisions are taken together, or ranks wait for ever."""
        return bool(self.sum(float(flag)).item() > 0)

    def gather(self, obj) -> list:
        """Every rank's object, in the order of ranks, on all ranks."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, obj)
        return gathered

    def broadcast(self, obj):
        """Rank 0's object."""
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()
