"""Settings: one dataclass a command, whose fields are the YAML keys, the flags and the text of `--help`.

Nothing here imports torch, so that a mistake in a file is reported at once.
"""

from coati.config.options import Settings, option, range_of
from coati.config.parse import parse_config, parse_settings, take_config_path
from coati.config.yaml12 import read_yaml

__all__ = ["Settings", "option", "parse_config", "parse_settings", "range_of", "read_yaml", "take_config_path"]
