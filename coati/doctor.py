"""`coati doctor`: what is installed, what this machine has, and which plugins can run on it."""

import importlib.util
import os
import platform
import shutil
from importlib import metadata

PACKAGES = ("torch", "transformers", "colossalai", "peft", "datasets", "wandb", "tensorboard", "safetensors")


def diagnose() -> int:
    """Prints the findings; 0 if training can start here, 1 if something is missing (its remedy is printed)."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=min(Console().width, 110))
    versions = Table("package", "version", title="Versions", title_justify="left")
    versions.add_row("python", platform.python_version())
    for package in PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)
    for line in _machine():
        console.print(line, markup=False, highlight=False)
    if importlib.util.find_spec("colossalai") is None:
        # coati.parallel can't be imported then; its message says the same
        console.print("colossalai is missing: pip install --no-deps colossalai==0.5.0 galore_torch bitsandbytes")
        return 1
    plugins = Table("plugin", "precisions here", "unsupported here", title="Plugins", title_justify="left")
    for row in _plugins():
        plugins.add_row(*row)
    console.print(plugins)
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {package}"


def _machine() -> list[str]:
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    lines = [f"CPU: {os.cpu_count()} cores, {memory:.0f} GiB"]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {device.name}, {device.total_memory / 2**30:.0f} GiB")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    lines.append(
        f"Processes talk over {backend}; {'CUDA' if backend == 'nccl' else 'no GPU: everything runs on the CPU'}"
    )
    lines.append(f"colossalai command: {shutil.which('colossalai') or 'not on PATH'}")
    lines.append(f"torchrun: {shutil.which('torchrun') or 'not on PATH: colossalai run needs it there'}")
    return lines


def _plugins():
    """Asks the same check that a run asks, so the two can't disagree."""
    from coati.config.plugin import PLUGINS, PluginConfig
    from coati.errors import UserError
    from coati.parallel.config import check_plugin

    for plugin in PLUGINS:
        runs, unsupported = [], []
        for precision in ("fp32", "bf16", "fp16"):
            try:
                check_plugin(PluginConfig(plugin=plugin, precision=precision))
                runs.append(precision)
            except UserError as error:
                unsupported.append(str(error))
        try:
            check_plugin(PluginConfig(plugin=plugin), lora=True)
        except UserError as error:
            unsupported.append(str(error))
        yield plugin, ", ".join(runs), "\n".join(unsupported) or "-"
