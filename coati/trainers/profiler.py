"""`profile_steps`: a trace of the chosen steps on every rank, and what took the time in them."""

import gzip
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from coati.files import atomic_write, replace_file
from coati.parallel import Runtime
from coati.run_layout import profile_of_step

OPERATIONS = 10  # of a table


@contextmanager
def profiled(step: int, chosen: Sequence[int], run: Path, runtime: Runtime) -> Iterator[None]:
    """Profiles the block if its step is a chosen one, and writes what it finds into the run's folder: of every rank a
    Chrome trace, `rank-R.json.gz` (for ui.perfetto.dev), and a table, `rank-R.txt`; rank 0's is printed.

    Args:
        step: counted from 1, as in the logs.
    """
    if step not in chosen:
        yield
        return
    on_gpu = runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        yield
    place = profile_of_step(run, step)
    place.mkdir(parents=True, exist_ok=True)
    _write_trace(found, place / f"rank-{runtime.rank}.json.gz")
    events = found.key_averages()
    tables = [_table(events, "self_cpu_time_total", "CPU")]
    if on_gpu:
        tables.append(_table(events, "self_device_time_total", "CUDA"))
    text = f"profile of step {step} on rank {runtime.rank}\n" + "".join(tables)
    replace_file(place / f"rank-{runtime.rank}.txt", text)
    runtime.say(f"{text}traces: {place}")


def _write_trace(found: profile, path: Path):
    with tempfile.TemporaryDirectory() as scratch, atomic_write(path) as aside:
        plain = Path(scratch) / "trace.json"
        found.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(aside, "wb") as target:
            shutil.copyfileobj(source, target)


def _table(events: Sequence, attribute: str, device: str) -> str:
    """The operations that took the most time themselves, what they called left out.

    Args:
        events: averages by operation; those that stand for kernels count with the operation that started them.
        attribute: of an event, in microseconds.
    """
    operations = [event for event in events if event.device_type == DeviceType.CPU]
    operations.sort(key=lambda event: getattr(event, attribute), reverse=True)
    total = sum(getattr(event, attribute) for event in operations) or 1.0
    lines = [f"{device + ' operation':<50} {'self ms':>10} {'calls':>8} {'share':>7}"]
    for event in operations[:OPERATIONS]:
        time = getattr(event, attribute)
        lines.append(f"{event.key[:50]:<50} {time / 1e3:>10.2f} {event.count:>8} {time / total:>7.1%}")
    return "\n".join(lines) + "\n"
