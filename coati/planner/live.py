"""Which tensors live at once, and what each is for."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Item = tuple[str, str]  # a model and what it keeps: ("actor", "gradients")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, from its birth to its death.

    Models have weights without data (`fake`), and what is computed from them has none either. All else is real: token
    ids, masks, and what an algorithm computes of them.

    Attributes:
        moments: name of a phase -> bytes of every item when most was live in it.
        fake: makes tensors without data.
    """

    def __init__(self):
        super().__init__()
        self.peaks: dict[str, Counter[Item]] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[Item, int]] = {}  # a storage -> what it is for, and its bytes
        self._now: Counter[Item] = Counter()
        self._phase, self._model, self._vocabulary = "start", "batch", 0
        self._counts = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result) if self._counts else ():
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                wide = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary
                self.hold([tensor], (self._model, "logits" if wide else "activations"))
        return result

    def hold(self, tensors: Iterable[Tensor], item: Item, fraction: float = 1.0):
        """Records what tensors are for, and which fraction of them this rank has."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                self._forget(key)
            else:
                weakref.finalize(storage, self._forget, key)
            self._known[key] = (item, round(storage.nbytes() * fraction))
            self._now[item] += self._known[key][1]
        self._note_peak()

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is recorded what a tensor is for."""
        return tensor.untyped_storage()._cdata in self._known

    def make(self, nbytes: float, item: Item) -> Tensor:
        """A block of memory of which only the size is known; it lives until it is dropped."""
        with self.uncounted(), self.fake:
            block = torch.empty(int(nbytes), dtype=torch.uint8)
        self.hold([block], item)
        return block

    @contextmanager
    def attributed_to(self, model: str, vocabulary: int) -> Iterator[None]:
        """What is made inside belongs to this model."""
        before = self._model, self._vocabulary
        self._model, self._vocabulary = model, vocabulary
        try:
            yield
        finally:
            self._model, self._vocabulary = before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made inside counts for nothing."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def begin_phase(self, name: str):
        """From here on the peak counts for this phase of the run."""
        self._phase = name
        self._note_peak()

    def _forget(self, key: int):
        item, nbytes = self._known.pop(key)
        self._now[item] -= nbytes

    def _note_peak(self):
        if self._now.total() > self.peaks.get(self._phase, Counter()).total():
            self.peaks[self._phase] = Counter(self._now)
