"""Tensors between the host and the device, without making the host wait for the device's work."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same values on the device. From pinned memory they are copied asynchronously; from other memory the host
    would wait for the device first."""
    if tensor.device.type != "cpu" or torch.device(device).type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(values: Sequence, device: torch.device | str, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers as a tensor on the device."""
    return to_device(torch.tensor(values, dtype=dtype), device)


class Download:
    """Pending copies of tensors to the host."""

    def __init__(self, *tensors: Tensor):
        self.event = None
        device = tensors[0].device
        if device.type == "cpu":
            self.copies = tuple(x.clone() for x in tensors)
            return
        self.copies = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.event = torch.get_device_module(device).Event()
        self.event.record()

    def arrays(self) -> list[np.ndarray]:
        """The values, once they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return [copy.numpy() for copy in self.copies]
