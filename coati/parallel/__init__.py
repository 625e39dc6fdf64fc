"""Launching, sharding and checkpoints: the only package that imports colossalai, and only when a run starts."""

import importlib.util

from coati.config.plugin import PluginConfig
from coati.errors import UserError

INSTALL_COLOSSALAI = "pip install --no-deps colossalai==0.5.0 galore_torch bitsandbytes"

if importlib.util.find_spec("colossalai") is None:
    raise UserError(
        f"colossalai is not installed; run: {INSTALL_COLOSSALAI}  (after torch; --no-deps keeps your torch)"
    )

from coati.parallel.checkpoint import Checkpoints  # noqa: E402
from coati.parallel.communication import Communicator  # noqa: E402
from coati.parallel.engine import Engine, make_engine  # noqa: E402
from coati.parallel.launch import Runtime, launch  # noqa: E402
from coati.parallel.plugins import check_plugin, resolve_precision  # noqa: E402

__all__ = [
    "INSTALL_COLOSSALAI",
    "Checkpoints",
    "Communicator",
    "Engine",
    "PluginConfig",
    "Runtime",
    "check_plugin",
    "launch",
    "make_engine",
    "resolve_precision",
]
