"""The few collective operations that trainers use."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from coati.transfer import upload


class Communicator:
    """Sums and agreements over ranks that see different data. With one process every call is the identity.

    Ranks that hold one model together (tensor, pipeline, sequence parallel) see the same data: they have the same
    `rank` here, of `world_size`, and each of them belongs to its own group of data-parallel ranks.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, group=None):
        self.rank, self.world_size, self.device, self.group = rank, world_size, device, group

    def data_parallel(self, processes: int) -> "Communicator":
        """The communicator of a run in which so many neighboring processes hold one model together."""
        if processes == 1:
            return self
        groups = [dist.new_group(range(i, self.world_size, processes)) for i in range(processes)]
        return Communicator(
            self.rank // processes, self.world_size // processes, self.device, groups[self.rank % processes]
        )

    def sum(self, x: Tensor | float | int) -> Tensor:
        """Sum over data-parallel ranks, in float64 for numbers (on the host) and in the tensor's own dtype for tensors
        (where they are)."""
        x = x.detach().clone() if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_metrics(self, partial: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Adds up the partial metrics of every micro-batch and rank. All ranks must hold the same names."""
        on_host: dict[str, float] = {}
        on_device: dict[str, Tensor] = {}
        for metrics in partial:
            for name, value in metrics.items():
                value = value.detach() if isinstance(value, Tensor) else value
                if isinstance(value, Tensor) and value.device.type != "cpu":
                    on_device[name] = on_device.get(name, 0.0) + value.double()
                else:
                    on_host[name] = on_host.get(name, 0.0) + float(value)
        names = sorted({*on_host, *on_device})
        if not names:
            return {}
        # one copy to the device and one back, whatever there is
        totals = upload([on_host.get(name, 0.0) for name in names], self.device, torch.float64)
        if on_device:
            positions = upload([names.index(name) for name in on_device], self.device)
            totals = totals.index_add(0, positions, torch.stack([*on_device.values()]))
        return dict(zip(names, self.sum(totals).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """True on every rank of the run if it is true on one: all ranks must decide alike, or some wait forever."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return flag
        x = torch.tensor(float(flag))
        dist.all_reduce(x)
        return x.item() > 0

    def gather(self, obj) -> list:
        """Every data-parallel rank's object, in the order of ranks, on all ranks."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def broadcast(self, obj):
        """The object of the run's rank 0."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self):
        """Waits for all ranks of the run; this may be long, while rank 0 writes or reads."""
        self.any(False)
