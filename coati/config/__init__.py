"""Settings: one class a command, whose fields are the YAML keys, the flags and the text of `--help`.

Nothing here imports torch, so that a mistake in a file is reported at once.
"""

from coati.config.flags import as_flags
from coati.config.options import ListOf, Settings, inherited, option, section, settings
from coati.config.parse import configure, merge, parse_config, parse_settings, reconfigure, take_config_path
from coati.config.yaml12 import read_yaml

__all__ = [
    "ListOf",
    "Settings",
    "as_flags",
    "configure",
    "inherited",
    "merge",
    "option",
    "parse_config",
    "parse_settings",
    "read_yaml",
    "reconfigure",
    "section",
    "settings",
    "take_config_path",
]
