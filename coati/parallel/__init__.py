"""Launching, sharding and checkpoints: the only package that imports colossalai, and only when a run starts.

The names are imported when they are asked for: a run's settings are checked before torch is loaded.
"""

import importlib.util
from importlib import import_module

from coati.config.plugin import PluginConfig
from coati.errors import UserError

INSTALL_COLOSSALAI = "pip install --no-deps colossalai==0.5.0 galore_torch bitsandbytes"
HOME = {
    "Checkpoints": "checkpoint",
    "Communicator": "communication",
    "Engine": "engine",
    "Runtime": "runtime",
    "Update": "update",
    "check_plugin": "config",
    "cpu_emulates_bf16": "config",
    "launch": "runtime",
    "make_engine": "factory",
    "resolve_precision": "config",
}
__all__ = ["INSTALL_COLOSSALAI", "PluginConfig", *HOME]

if importlib.util.find_spec("colossalai") is None:
    raise UserError(
        f"colossalai is not installed; run: {INSTALL_COLOSSALAI}  (after torch; --no-deps keeps your torch)"
    )


def __getattr__(name: str):
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"coati.parallel.{HOME[name]}"), name)
