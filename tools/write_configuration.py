"""Writes docs/configuration.md from the config classes: `python tools/write_configuration.py`.

A test holds that the committed page is what this writes.
"""

import dataclasses
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Settings

<!-- Written by tools/write_configuration.py: change the help texts in the code, then run it. -->

Each setting is a key of the YAML file and a flag: `learning_rate: 1e-5` or `--learning_rate 1e-5`. A flag wins over
the file. An unknown key is refused with the nearest known one. Lists are YAML lists, or several words after the flag;
true-or-false settings take `true` or `false`. `null` leaves the default, `[]` empties a list. A setting's type says
what a word is: `run_name: 1.10` and `stop: [no]` are texts. `~/` at the beginning of a path is the home folder.

The scripts: `train_sft.py` takes the settings of all runs and those of generation, `train_rm.py` those of all runs and
of reward models, `train_preference.py` those of all runs and of preference optimization, `train_ppo.py` and
`train_grpo.py` those of all runs, of generation, of rollouts and their own.
"""


def page() -> str:
    from coati.config.generation import GenerationConfig
    from coati.config.plugin import PluginConfig
    from coati.data.config import DataConfig
    from coati.tracking.config import TrackingConfig
    from coati.trainers.config import (
        GRPOConfig,
        ModelConfig,
        PPOConfig,
        PreferenceConfig,
        RewardConfig,
        RolloutConfig,
        RunConfig,
        TrainerConfig,
    )

    common = {field.name for c in (TrainerConfig, GenerationConfig) for field in dataclasses.fields(c)}
    of_rollouts = {field.name: field.default for field in dataclasses.fields(RolloutConfig)}
    as_there = {f.name for f in dataclasses.fields(GRPOConfig) if (f.name, f.default) in of_rollouts.items()}
    sections = [
        ("All runs: model", ModelConfig, set()),
        ("All runs: length, speed, files", RunConfig, set()),
        ("All runs: data", DataConfig, set()),
        ("All runs: plugin and precision", PluginConfig, set()),
        ("All runs: logs", TrackingConfig, set()),
        ("Generation (SFT's samples, rollouts of PPO and GRPO)", GenerationConfig, set()),
        ("Reward models", RewardConfig, common),
        ("Preference optimization", PreferenceConfig, common),
        ("Rollouts (PPO and GRPO)", RolloutConfig, common),
        ("PPO", PPOConfig, set(of_rollouts)),
        ("GRPO", GRPOConfig, as_there),
    ]
    return INTRODUCTION + "".join(_section(*section) for section in sections)


def _section(title: str, config_class, left_out: set[str]) -> str:
    rows = [field for field in dataclasses.fields(config_class) if field.name not in left_out]
    types = typing.get_type_hints(config_class)
    lines = "".join(f"| `{f.name}` | {_values(f, types[f.name])} | {_default(f)} | {_help(f)} |\n" for f in rows)
    return f"\n## {title}\n\n| Setting | Type | Default | Meaning |\n|---|---|---|---|\n{lines}"


def _values(field, hint) -> str:
    """Type and range."""
    from coati.config import range_of

    return ", ".join(filter(None, [_type(hint), range_of(field)]))


def _type(hint) -> str:
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if typing.get_origin(hint) is dict:
        return "mapping"
    if typing.get_origin(hint) is list:
        return f"list of {_type(arguments[0])}"
    if arguments:
        return _type(arguments[0])
    return {str: "text", bool: "true/false", int: "whole number", float: "number"}[hint]


def _default(field) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    if default is None or default == []:
        return "none"
    words = default if isinstance(default, list) else [default]
    return " ".join(f"`{str(word).lower() if isinstance(word, bool) else word}`" for word in words)


def _help(field) -> str:
    return field.metadata["help"].replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
