"""Steps of fixed shape as CUDA graphs: one launch instead of hundreds."""

from collections.abc import Callable

import torch

ROW_STEPS = ((2, 1), (8, 4), (64, 8))  # up to so many rows, the shapes' rows are multiples of so many


class StepGraphs:
    """Runs a step; on a GPU a step of the same shape as the one before is captured, and replayed from then on.

    The first step of a shape runs as it is, so that libraries have chosen their kernels when it is captured. A model
    that needs the host in the middle (routing by data, say) can't be captured and runs step by step.

    Args:
        enabled: whether steps may be captured.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}
        self.previous: tuple[int, ...] | None = None

    def run(self, step: Callable[..., None], shape: tuple[int, ...]):
        """One step.

        Args:
            step: called with a shape's numbers; the same at each call, and reads and writes the same tensors.
        """
        if shape not in self.graphs:
            if not self.enabled or shape != self.previous:
                self.previous = shape
                step(*shape)
                return
            self._capture(step, shape)
        if shape in self.graphs:
            self.graphs[shape].replay()
        else:
            step(*shape)

    def _capture(self, step: Callable[..., None], shape: tuple[int, ...]):
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        try:
            with torch.cuda.graph(graph, pool=pool):
                step(*shape)
        except RuntimeError:  # whatever can't be captured says so in its own way
            self.enabled = False
            torch.cuda.synchronize()
        else:
            self.graphs[shape] = graph


def round_up(rows: int, width: int) -> tuple[int, int]:
    """The shape whose graph serves this many rows and columns: few shapes, at most an eighth too wide beyond 1,024
    columns."""
    step = next((step for most, step in ROW_STEPS if rows <= most), 32)
    columns = max(128, 2 ** (width.bit_length() - 1) // 8)
    return -(-rows // step) * step, -(-width // columns) * columns
