"""Writes docs/configuration.md from the config classes: `python tools/write_configuration.py`.

A test holds that the committed page is what this writes.
"""

import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Settings

<!-- Written by tools/write_configuration.py: change the help texts in the code, then run it. -->

A setting stands in a section of the YAML file, or at its top: `optimizer: {learning_rate: 1e-5}`. As a flag its
section may be left out: `--learning_rate 1e-5` or `--optimizer.learning_rate 1e-5`. A flag wins over the file. A
section that is one word is its first setting: `model: FOLDER` is `model: {path: FOLDER}`, `algorithm: dapo` is
`algorithm: {type: dapo}`, and so is a reward: `rewards: [math]`. Unknown settings are refused with the nearest known
one, and all mistakes are named at once.

Lists are YAML lists, or several words after the flag; mappings are YAML as flags too; true-or-false settings take
`true` or `false`. `null` leaves the default, `[]` empties a list. A setting's type says what a word is: `tracking:
{run_name: 1.10}` and `generation: {stop: [no]}` are texts. `~/` at the beginning of a path is the home folder. In
Python, `coati.config.configure(SFTConfig, model="gpt2", learning_rate=1e-4)` takes the names of the flags.

All methods have the sections `model`, `data`, `optimizer`, `parallel`, `evaluation`, `checkpoints`, `export` and
`tracking`, and all but SFT `algorithm`. All that generate have `generation`, and but for SFT also `environment`,
`generators`, `rewards` and `scoring`.
"""


def page() -> str:
    from coati.config.environment import EnvironmentConfig
    from coati.config.generation import GenerationConfig
    from coati.config.generators import GeneratorsConfig
    from coati.config.schema import entry_classes, section_classes
    from coati.rewards.config import RewardSettings, ScoringConfig
    from coati.trainers import config

    text = INTRODUCTION
    text += table("The run", config.TrainerConfig, level=2)
    for name, field in config.TrainerConfig.__pydantic_fields__.items():
        for kind in section_classes(field.annotation):
            text += table(name, kind)
    text += table(
        "generation", GenerationConfig, note="Of SFT's samples, and of the responses of PPO, GRPO and the rest."
    )
    text += table(
        "evaluation of responses",
        config.RolloutEvaluationConfig,
        ["eval_temperature"],
        note="Of PPO, GRPO and the rest, in the section `evaluation`.",
    )
    text += table(
        "environment", EnvironmentConfig, note="Of PPO, GRPO and the rest; see [environments](environments.md)."
    )
    text += table("generators", GeneratorsConfig, note="Of PPO, GRPO and the rest; see [generators](asynchronous.md).")
    text += table("Supervised fine-tuning", config.SFTConfig, ["loss"], note="Beside the run's settings.")
    text += "\n## algorithm\n\n`type` is the name of the command, which sets it.\n"
    text += table("Reward models", config.RewardModeling, level=3)
    text += "\n### Preference methods\n\n" + methods(config.PreferenceConfig)
    text += table("PPO", config.PPO, level=3)
    text += "\n### Relatives of PPO\n\nThey have PPO's settings, with other defaults.\n\n" + presets(config.PPOConfig)
    text += table("GRPO", config.GRPO, level=3)
    text += table("correction", config.Correction, level=4, note="A section of `algorithm`.")
    text += "\n### Relatives of GRPO\n\nThey have GRPO's settings, with other defaults.\n\n" + presets(
        config.GRPOConfig
    )
    text += table("Distillation", config.Distillation, level=3)
    own = ["group_size", "success_reward"]
    text += table("SDPO", config.SDPO, own, level=3, note="It has distillation's settings too.")
    text += "\nWith other defaults than distillation:\n\n" + presets(config.DistillConfig)
    text += "\n## rewards\n\nA list; each entry is a type, or a mapping with a type and its settings.\n"
    text += table("Every entry", RewardSettings, level=3)
    for kind in entry_classes(config.RolloutConfig.__pydantic_fields__["rewards"].annotation):
        names = [name for name in kind.__pydantic_fields__ if name not in (*RewardSettings.__pydantic_fields__, "type")]
        about = kind.__pydantic_fields__["type"]
        text += table(
            f"{about.default}", kind, names, level=3, note=f"{about.description[0].upper()}{about.description[1:]}."
        )
    return text + table("scoring", ScoringConfig)


def table(title: str, kind, names=None, *, level: int = 2, note: str = "") -> str:
    """A heading and the settings of a class, without its sections."""
    from coati.config.schema import section_classes

    fields = kind.__pydantic_fields__
    listed = [n for n in (fields if names is None else names) if not section_classes(fields[n].annotation)]
    lines = "".join(
        f"| `{n}` | {values(fields[n])} | {default(fields[n])} | {about(fields[n])} |\n" for n in listed if n != "type"
    )
    head = f"\n{'#' * level} {title}\n" + (f"\n{note}\n" if note else "")
    return head + (f"\n| Setting | Type | Default | Meaning |\n|---|---|---|---|\n{lines}" if lines else "")


def methods(config_class) -> str:
    """Which method has which setting, with its default."""
    from coati.config.schema import section_classes, types_of

    kinds = section_classes(config_class.__pydantic_fields__["algorithm"].annotation)
    named = {name: kind for kind in kinds for name in kind.__pydantic_fields__ if name != "type"}
    lines = ""
    for name, kind in named.items():
        field = kind.__pydantic_fields__[name]
        by_default = {}
        for one in kinds:
            if name in one.__pydantic_fields__:
                by_default.setdefault(default(one.__pydantic_fields__[name]), []).append(types_of(one)[0])
        defaults = "; ".join(f"{value} ({', '.join(types)})" for value, types in by_default.items())
        lines += f"| `{name}` | {values(field)} | {defaults} | {about(field)} |\n"
    return f"| Setting | Type | Default | Meaning |\n|---|---|---|---|\n{lines}"


def presets(config_class) -> str:
    """What each method's defaults are where they are not the first one's."""
    from coati.config.schema import section_classes, types_of

    first, *others = section_classes(config_class.__pydantic_fields__["algorithm"].annotation)
    lines = ""
    for kind in others:
        own = {
            name: default(field)
            for name, field in kind.__pydantic_fields__.items()
            if name in first.__pydantic_fields__
            and name != "type"
            and field.default != first.__pydantic_fields__[name].default
        }
        lines += f"| `{types_of(kind)[0]}` | {', '.join(f'`{name}` {value}' for name, value in own.items())} |\n"
    return f"| Type | Defaults |\n|---|---|\n{lines}"


def values(field) -> str:
    """Type and range."""
    from coati.config.flags import range_of

    return ", ".join(filter(None, [type_in_words(field.annotation), range_of(field)]))


def type_in_words(hint) -> str:
    from coati.config.schema import alternatives, entry_classes

    [kind] = alternatives(hint)
    if entry_classes(hint):
        return "list of rewards"
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{a}`" for a in typing.get_args(kind))
    if typing.get_origin(kind) is dict:
        return "mapping"
    if typing.get_origin(kind) is list:
        return f"list of {type_in_words(typing.get_args(kind)[0])}"
    return {str: "text", bool: "true/false", int: "whole number", float: "number"}[kind]


def default(field) -> str:
    from pydantic_core import PydanticUndefined

    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or value == []:
        return "none"
    words = value if isinstance(value, list) else [value]
    texts = [str(word).lower() if isinstance(word, bool) else str(word).replace("\n", "\\n") for word in words]
    return " ".join(f"`{text}`" for text in texts)


def about(field) -> str:
    return field.description.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
