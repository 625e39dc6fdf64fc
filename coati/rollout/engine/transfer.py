"""Small tensors between the host and the device, without making the host wait for the device's work."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers as a tensor on the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Download:
    """Copies of tensors on their way to the host."""

    def __init__(self, *tensors: Tensor):
        self.event = None
        if tensors[0].device.type != "cuda":
            self.copies = tuple(x.clone() for x in tensors)
            return
        self.copies = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def lists(self) -> list[list]:
        """The values, once they have come."""
        if self.event is not None:
            self.event.synchronize()
        return [copy.tolist() for copy in self.copies]


def pad_right(rows: list[list[int]], device: torch.device, repeat: bool = False) -> Tensor:
    """Token ids `[batch, seq]` with 0, or the row's last token, on the right."""
    longest = max(len(row) for row in rows)
    return upload([row + [row[-1] if repeat else 0] * (longest - len(row)) for row in rows], device)
