"""A device that computes on the CPU and is as strict as a GPU, for a process of its own.

`install()` gives torch a device whose tensors are wrappers around CPU tensors. It sees what a GPU would see:

- an operation that mixes its tensors with the CPU's raises, as CUDA kernels do (numbers of no dimension excepted where
  CUDA takes them);
- whatever makes the host wait for a GPU is counted by place (`waits`): numbers that are read, sizes that depend on
  data, masks and CPU tensors as indices, copies from or to memory that isn't pinned, waits for events and streams;
- an asynchronous copy to the host arrives at the next wait, and is nonsense before;
- work of one stream that touches what another one wrote, without having waited for it, raises (as
  `torch.cuda._sanitizer` finds it on a GPU);
- a collective call on its tensors gives up after `watchdog`, as NCCL's watchdog ends a process that waits too long.

It rests on torch's backend for Python (PrivateUse1). Its name is "npu", since Colossal-AI's optimizers ask for a device
that they know. Gemini can't run on it: its chunks assert that `type(tensor) == torch.Tensor`.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "npu"
CPU = torch.device("cpu")
DEVICE = torch.device("privateuseone", 0)  # NAME once it is installed

COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index", "aten::_index_put_impl_"}
# kernels that demand one device even of numbers of no dimension
ALL_ON_ONE_DEVICE = {
    "aten::gather",
    "aten::scatter",
    "aten::scatter_",
    "aten::scatter_add",
    "aten::scatter_add_",
    "aten::index_select",
    "aten::index_fill",
    "aten::index_fill_",
    "aten::embedding",
    "aten::cat",
    "aten::stack",
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::searchsorted.Tensor",
}
# the size of the output, or an answer for the host, depends on data
ASKS_FOR_DATA = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    "aten::equal",
    "aten::_local_scalar_dense",
}
AUTOCAST = "AutocastPrivateUse1"
CAST_BY_AUTOCAST = (
    "addbmm",
    "addmm",
    "baddbmm",
    "bmm",
    "linalg_vecdot",
    "linear",
    "matmul",
    "mm",
    "scaled_dot_product_attention",
)
ROOT = str(Path(__file__).resolve().parents[2]) + "/"
LIBRARIES = ("transformers/", "peft/", "colossalai/")  # places in these are worth naming, others are below them


class MixedDevices(RuntimeError):
    """What CUDA raises where tensors lie on different devices."""


class MissingWait(RuntimeError):
    """Work of one stream reads or overwrites what another one may still be writing."""


@dataclass
class Access:
    """When and where a stream touched a tensor."""

    stream: "Stream"
    tick: int
    place: str


@dataclass
class Memory:
    """The accesses to some memory that later ones must come after."""

    write: Access | None = None
    reads: list[Access] = field(default_factory=list)


class Stream:
    """A queue of work.

    Attributes:
        seen: for each stream, the number of its last piece of work that this stream's next piece comes after.
    """

    def __init__(self, *_, **__):
        self.seen: dict[Stream, int] = dict(device.seen_by_host)
        device.streams.append(self)

    def wait_stream(self, other: "Stream"):
        _later(self.seen, other.seen)

    def wait_event(self, event: "Event"):
        _later(self.seen, event.seen)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        device.wait("stream.synchronize", self.seen)


class Event:
    """A place in a stream's queue."""

    def __init__(self, *_, **__):
        self.seen: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None):
        self.seen = dict((stream or device.current).seen)

    def wait(self, stream: Stream | None = None):
        (stream or device.current).wait_event(self)

    def synchronize(self):
        device.wait("event.synchronize", self.seen)


@dataclass
class Arriving:
    """A copy to the host that is under way."""

    target: torch.Tensor
    value: torch.Tensor
    stream: Stream
    tick: int


class StrictDevice:
    """The state of the device.

    Attributes:
        waits: how often the host waited, by kind and place, `"kind: file:line"`.
        operations: how many ran.
        watchdog: how long a collective call may take; None for no limit of its own.
    """

    def __init__(self):
        self.waits: Counter[str] = Counter()
        self.operations, self.watchdog = 0, None
        self.memory: dict[int, Memory] = {}
        self.arriving: list[Arriving] = []
        self.seen_by_host: dict[Stream, int] = {}
        self.streams: list[Stream] = []
        self.current: Stream

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """What the host waits for inside."""
        before, found = self.waits.copy(), Counter()
        yield found
        found.update(self.waits - before)

    def wait(self, kind: str, seen: dict[Stream, int] | None = None):
        """The host waits for the current stream, or until `seen` is done; what it launches later comes after that."""
        self.waits[f"{kind}: {where()}"] += 1
        self.come_after(self.current.seen if seen is None else seen)

    def come_after(self, seen: dict[Stream, int]):
        for one in (self.seen_by_host, *(stream.seen for stream in self.streams)):
            _later(one, seen)
        arriving, self.arriving = self.arriving, []
        for copy in arriving:
            if copy.tick <= seen.get(copy.stream, 0):
                copy.target.copy_(copy.value)
            else:
                self.arriving.append(copy)

    def launch(self, name: str, read: set[int], written: set[int], new: set[int]):
        """A piece of work in the current stream, given what memory it touches."""
        self.operations += 1
        stream, tick = self.current, self.operations
        stream.seen[stream] = tick
        access = Access(stream, tick, "")
        for address in new:
            self.memory[address] = Memory(write=access)
        for address in read - new:
            memory = self.memory.setdefault(address, Memory())
            self._comes_after(memory.write, access, name)
            memory.reads = [old for old in memory.reads if old.stream is not stream] + [access]
        for address in written - new:
            memory = self.memory.setdefault(address, Memory())
            for before in (memory.write, *memory.reads):
                self._comes_after(before, access, name)
            self.memory[address] = Memory(write=access)

    def _comes_after(self, before: Access | None, access: Access, name: str):
        if before is not None and before.tick > access.stream.seen.get(before.stream, 0):
            raise MissingWait(
                f"{name} at {where()} touches what another stream may still be working on: wait for that stream first"
            )


device = StrictDevice()
device.current = Stream()


def _later(seen: dict[Stream, int], other: dict[Stream, int]):
    for stream, tick in other.items():
        if tick > seen.get(stream, 0):
            seen[stream] = tick


def where() -> str:
    """The innermost frame of ours, or of a library that calls torch, as `file:line`."""
    frame = sys._getframe(1)
    while frame is not None:
        if place := _place(frame.f_code.co_filename):
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere (the backward pass has no frames of Python)"


@cache
def _place(path: str) -> str | None:
    if path == __file__:
        return None
    if path.startswith(ROOT) and "/site-packages/" not in path:
        return path.removeprefix(ROOT)
    inside = path.rpartition("/site-packages/")[2]
    return inside if inside.startswith(LIBRARIES) else None


class StrictTensor(torch.Tensor):
    """A tensor on the device; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    @property
    def data(self) -> "StrictTensor":
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other: "StrictTensor"):
        self.inner = other.inner
        torch.Tensor.data.__set__(self, other)  # sizes and strides

    def tolist(self):
        device.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy at {where()}: copy it to the host first")

    def record_stream(self, stream):
        """Memory is not used again here while someone holds it."""

    def pin_memory(self, *_):
        raise RuntimeError(f"cannot pin '{NAME}' tensors, only dense CPU tensors can be pinned: {where()}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@dataclass(frozen=True)
class Operation:
    """What the schema says.

    Attributes:
        name: without overload; full_name: with it, unless it is the default.
        written: names of arguments that are written to.
        is_view: it computes nothing.
        names: of the arguments, in order.
    """

    name: str
    full_name: str
    written: frozenset[str]
    is_view: bool
    names: tuple[str, ...]


@cache
def operation(func) -> Operation:
    schema, overload = func._schema, func._overloadname
    written = frozenset(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    aliases = [r.alias_info for r in schema.returns]
    if schema.name.startswith("c10d::"):  # their schemas don't say what they write
        written = frozenset(a.name for a in schema.arguments if "Tensor" in str(a.type) and not a.name.startswith("in"))
        written = written - {"tensors", "sparse_indices"} if schema.name == "c10d::send" else written
    return Operation(
        schema.name,
        schema.name + (f".{overload}" if overload != "default" else ""),
        written,
        not written and bool(aliases) and all(alias is not None for alias in aliases),
        tuple(a.name for a in schema.arguments),
    )


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def on_cpu(value):
    """The same argument for the CPU's kernel."""
    if isinstance(value, StrictTensor):
        return value.inner
    if isinstance(value, torch.device):
        return CPU if value.type == NAME else value
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(map(on_cpu, value))
    return value


def run(func, args: tuple, kwargs: dict):
    """One operation as the device does it."""
    op = operation(func)
    given = {**dict(zip(op.names, args, strict=False)), **kwargs}
    inputs = {name: tensors for name, value in given.items() if (tensors := tensors_in(value))}
    everything = [tensor for tensors in inputs.values() for tensor in tensors]
    ours = [tensor for tensor in everything if isinstance(tensor, StrictTensor)]
    place = given.get("device")
    to_device = bool(ours) if place is None else torch.device(place).type == NAME
    check_devices(op, given, everything, bool(ours))
    values = dict(given)
    if ours and op.name.startswith("c10d::") and device.watchdog is not None and "timeout" in op.names:
        values["timeout"] = device.watchdog // timedelta(milliseconds=1)
    copies_to_host = op.name in COPIES and count_copy(op, given)
    if not copies_to_host:
        count_waits(op, inputs, bool(ours))
    positional = [on_cpu(values[name]) for name in op.names[: len(args)]]
    rest = {name: on_cpu(value) for name, value in values.items() if name not in op.names[: len(args)]}
    rest.pop("pin_memory", None)
    outputs = func(*positional, **rest)
    if not op.is_view and (ours or to_device):
        known = {address(tensor.inner) for tensor in ours}
        written = {address(x.inner) for name in op.written for x in inputs.get(name, ()) if isinstance(x, StrictTensor)}
        produced = {address(tensor) for tensor in tensors_in(outputs)} if to_device else set()
        device.launch(op.full_name, known - written, written, produced - known)
    if copies_to_host == "asynchronous":
        arrive_later(given.get("self"))
    # what is written in place is the argument itself
    wrappers = {id(tensor.inner): tensor for tensor in ours}

    def wrap(value):
        if isinstance(value, torch.Tensor):
            if id(value) in wrappers:
                return wrappers[id(value)]
            return StrictTensor(value) if to_device and type(value) is torch.Tensor else value
        if isinstance(value, (list, tuple)):
            return type(value)(map(wrap, value))
        return value

    return wrap(outputs)


def address(inner: torch.Tensor) -> int:
    return inner.untyped_storage().data_ptr()


def check_devices(op: Operation, given: dict, everything: list[torch.Tensor], is_ours: bool):
    """Raises where CUDA would."""
    if not is_ours or op.name in COPIES or op.name.startswith("c10d::"):
        return
    foreign = [tensor for tensor in everything if not isinstance(tensor, StrictTensor)]
    if op.name in INDEXING:  # CUDA moves indices, and waits
        subject = given["self"]
        if not isinstance(subject, StrictTensor):
            raise MixedDevices(
                f"indices should be either on cpu or on the same device as the indexed tensor (cpu): {where()}"
            )
        indices = tensors_in(given["indices"])
        foreign = [tensor for tensor in foreign if not any(tensor is index for index in indices)]
    if op.name not in ALL_ON_ONE_DEVICE and op.full_name not in ALL_ON_ONE_DEVICE:
        foreign = [tensor for tensor in foreign if tensor.dim() > 0]
    if foreign:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in foreign)
        raise MixedDevices(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({shapes}): {op.full_name} at "
            f"{where()}"
        )


def count_copy(op: Operation, given: dict) -> str:
    """Counts a copy between host and device; says whether it goes to the host, "blocking" or "asynchronous"."""
    if op.name == "aten::_to_copy":
        source, target = given["self"], None
        place = given.get("device")
        into_device = isinstance(source, StrictTensor) if place is None else torch.device(place).type == NAME
    else:
        source, target = (given[name] for name in (("src", "self") if op.name == "aten::copy_" else ("self", "dst")))
        into_device = isinstance(target, StrictTensor)
    asynchronous = bool(given.get("non_blocking"))
    if isinstance(source, StrictTensor) == into_device or source.numel() == 0:
        return ""
    if into_device:
        if not (asynchronous and is_pinned(source)):
            device.wait("copy from pageable memory" if asynchronous else "copy to the device")
        return ""
    if asynchronous and target is not None and is_pinned(target):
        return "asynchronous"
    device.wait("copy to the host")
    return "blocking"


def count_waits(op: Operation, inputs: dict[str, list[torch.Tensor]], is_ours: bool):
    if not is_ours:
        return
    if op.name in ASKS_FOR_DATA or op.full_name in ASKS_FOR_DATA:
        device.wait("item" if op.name == "aten::_local_scalar_dense" else op.full_name.removeprefix("aten::"))
    elif op.name in INDEXING:
        indices = inputs.get("indices", [])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            device.wait("mask as an index")
        if any(not isinstance(index, StrictTensor) for index in indices):
            device.wait("index on the host")


def arrive_later(target: torch.Tensor):
    """What was copied to the host is there after the next wait; until then its memory holds something else."""
    device.arriving.append(Arriving(target, target.clone(), device.current, device.operations))
    if target.is_floating_point():
        target.fill_(torch.nan)
    elif target.dtype == torch.bool:
        target.logical_not_()
    else:
        target.fill_(torch.iinfo(target.dtype).min)


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "pinned_by_the_strict_device", False)


def _pin(tensor: torch.Tensor, *_) -> torch.Tensor:
    pinned = tensor.clone()
    pinned.pinned_by_the_strict_device = True
    return pinned


class _Backend(_DummyBackendModule):
    """`torch.npu`: what stands for `torch.cuda`."""

    Stream, Event = Stream, Event

    def current_stream(self, _=None) -> Stream:
        return device.current

    default_stream = current_stream

    @contextmanager
    def stream(self, stream: Stream):
        before, device.current = device.current, stream
        try:
            yield
        finally:
            device.current = before

    def set_stream(self, stream: Stream):
        device.current = stream

    def synchronize(self, _=None):
        device.wait("synchronize", {stream: stream.seen.get(stream, 0) for stream in device.streams})

    def is_built(self) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_libraries: list = []  # operations are registered as long as these live


def install() -> StrictDevice:
    """Registers the device in this process, once."""
    if _libraries:
        return device
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    _move_modules_in_place()
    _pin_in_words_only()
    library = torch.library.Library("aten", "IMPL")
    for full_name in torch._C._dispatch_get_all_op_names():
        func = _factory(full_name)
        if func is not None:
            library.impl(full_name[6:], lambda *args, func=func, **kwargs: run(func, args, kwargs), "PrivateUse1")

    def copy_from(source, target, non_blocking=False):  # where torch.tensor(numbers, device=...) arrives
        run(torch.ops.aten.copy_.default, (target, source, non_blocking), {})
        return target

    library.impl("_copy_from", copy_from, "PrivateUse1")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, AUTOCAST)
    for name in CAST_BY_AUTOCAST:
        library.impl(name, _autocast(getattr(torch.ops.aten, name).default), AUTOCAST)
    _libraries.extend((library, fallback))
    return device


def _autocast(func):
    """The operation in autocast's precision, as on the CPU."""

    def cast(value):
        if isinstance(value, StrictTensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(torch.get_autocast_dtype(NAME))
        return value

    def run_cast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, AUTOCAST))):
            return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run_cast


def _factory(full_name: str):
    """The operation of this name if it makes one tensor from numbers; else None."""
    if not full_name.startswith("aten::") or any(w in full_name for w in ("quantize", "sparse", "nested", "from_file")):
        return None
    base, _, overload = full_name[6:].partition(".")
    try:
        func = getattr(getattr(torch.ops.aten, base), overload or "default")
    except (AttributeError, RuntimeError):  # not reachable from Python
        return None
    arguments, returns = func._schema.arguments, func._schema.returns
    takes_device = any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
    return func if takes_device and len(returns) == 1 and "Tensor" in str(returns[0].type) else None


def _move_modules_in_place():
    """`Module.to` leaves parameters the objects that they are, with their attributes, as it does for CUDA."""
    apply, swap, set_swapping = (
        torch.nn.Module._apply,
        torch.utils.swap_tensors,
        torch.__future__.set_swap_module_params_on_conversion,
    )

    def apply_in_place(self, function, recurse=True):
        set_swapping(True)
        try:
            return apply(self, function, recurse)
        finally:
            set_swapping(False)

    def swap_values(old: torch.Tensor, new: torch.Tensor):
        attributes = {name: value for name, value in vars(old).items() if name != "inner"}
        swap(old, new)
        vars(old).update(attributes)

    torch.nn.Module._apply = apply_in_place
    torch.utils.swap_tensors = swap_values


def _pin_in_words_only():
    """There is no page-locked memory without a GPU's driver: tensors only remember that they were asked to be."""
    empty = torch.empty

    def empty_or_pinned(*args, pin_memory: bool = False, **kwargs):
        made = empty(*args, **kwargs)
        return _pin(made) if pin_memory else made

    torch.empty = empty_or_pinned
    torch.Tensor.pin_memory = _pin
    torch.Tensor.is_pinned = is_pinned
