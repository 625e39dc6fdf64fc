"""The methods as commands: `coati dpo --config FILE.yaml`. Free of torch, as settings are.

A command is a method with the settings of its paper for defaults; the file and the flags win over them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coati.config.schema import section_classes, types_of
from coati.trainers.algorithms import ALGORITHMS
from coati.trainers.main import main


@dataclass(frozen=True)
class Command:
    """A method that trains.

    Attributes:
        name: of the command; but for SFT also the `type` of the settings' section `algorithm`.
        algorithm: of `ALGORITHMS`.
        title: in logs and `--help`.
    """

    name: str
    algorithm: str
    title: str

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings that make it this method."""
        return {} if self.name == "sft" else {"algorithm": {"type": self.name}}


def methods_of(algorithm: str) -> list[Command]:
    """A command for each `type` that an algorithm's settings have, with the first line of its documentation."""
    fields = ALGORITHMS[algorithm].config.__pydantic_fields__
    return [
        Command(types_of(kind)[0], algorithm, kind.__doc__.partition("\n")[0].rstrip("."))
        for kind in section_classes(fields["algorithm"].annotation)
    ]


GROUPS: dict[str, list[Command]] = {
    "from demonstrations": [Command("sft", "sft", "Supervised fine-tuning")],
    "from preferences": [*methods_of("reward"), *methods_of("preference")],
    "from labeled steps": methods_of("prm"),
    "from rewards": [*methods_of("ppo"), *methods_of("grpo")],
    "from a teacher": methods_of("distill"),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}


def train(name: str, argv: list[str] | None = None):
    """Runs a command of `COMMANDS`; ends the process with its exit status.

    Args:
        argv: settings as flags, `sys.argv[1:]` if None.
    """
    command = COMMANDS[name]
    algorithm = ALGORITHMS[command.algorithm]
    main(algorithm.config, algorithm.trainer, name, argv=argv, defaults=command.defaults)
