"""The methods as commands: `coati dpo --config FILE.yaml`. Free of torch, as settings are.

A command is an algorithm with the settings of its paper for defaults; the file and the flags win over them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coati.trainers.algorithms import ALGORITHMS
from coati.trainers.main import main


@dataclass(frozen=True)
class Command:
    """A method that trains.

    Attributes:
        algorithm: of `ALGORITHMS`.
        title: in logs and `--help`.
        defaults: settings that make it this method.
    """

    algorithm: str
    title: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


IN_REWARD = {"kl_in": "reward", "kl_estimator": "k1"}
GROUPS: dict[str, dict[str, Command]] = {
    "from demonstrations": {
        "sft": Command("sft", "supervised fine-tuning"),
    },
    "from preferences": {
        "reward": Command("reward", "reward model (Bradley-Terry)"),
        "dpo": Command("preference", "direct preference optimization (2305.18290)", {"loss": "dpo"}),
        "robust-dpo": Command(
            "preference", "DPO for noisy labels (2403.00409)", {"loss": "robust", "label_smoothing": 0.1}
        ),
        "ipo": Command("preference", "identity preference optimization (2310.12036)", {"loss": "ipo"}),
        "hinge": Command("preference", "SLiC's hinge loss on DPO's rewards (2305.10425)", {"loss": "hinge"}),
        "simpo": Command("preference", "SimPO, without a reference (2405.14734)", {"loss": "simpo", "beta": 2.0}),
        "orpo": Command("preference", "odds ratio preference optimization (2403.07691)", {"loss": "orpo"}),
        "cpo": Command("preference", "contrastive preference optimization (2401.08417)", {"loss": "cpo"}),
        "kto": Command("preference", "KTO, from responses that are good or bad (2402.01306)", {"loss": "kto"}),
    },
    "from rewards": {
        "ppo": Command("ppo", "proximal policy optimization with a critic (1707.06347)"),
        "grpo": Command("grpo", "group relative policy optimization (2402.03300); its KL is --kl_coefficient 0.04"),
        "dr-grpo": Command(
            "grpo",
            "GRPO without its length and difficulty biases (2503.20783)",
            {"advantage": "dr_grpo", "aggregation": "constant"},
        ),
        "dapo": Command(
            "grpo",
            "DAPO: clip-higher, dynamic sampling, token mean (2503.14476)",
            {"aggregation": "token", "clip_high": 0.28, "dynamic_sampling": True},
        ),
        "gspo": Command(
            "grpo",
            "GRPO with the ratio of whole responses (2507.18071)",
            {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
        ),
        "cispo": Command(
            "grpo",
            "clipped importance weights instead of clipped ratios (2506.13585)",
            {"policy_loss": "cispo", "aggregation": "token", "clip_low": 1.0, "clip_high": 4.0},
        ),
        "rloo": Command(
            "grpo",
            "REINFORCE with a leave-one-out baseline (2402.14740)",
            {
                "advantage": "rloo",
                "policy_loss": "none",
                "aggregation": "constant",
                "kl_coefficient": 0.05,
                **IN_REWARD,
            },
        ),
        "reinforce++": Command(
            "grpo",
            "REINFORCE with PPO's clipping, no critic (2501.03262)",
            {"advantage": "reinforce++", "aggregation": "token", "group_size": 1, "kl_coefficient": 0.01, **IN_REWARD},
        ),
        "remax": Command(
            "grpo",
            "REINFORCE with a greedy baseline (2310.10505)",
            {"advantage": "remax", "policy_loss": "none", "aggregation": "token", "group_size": 1},
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def train(name: str, argv: list[str] | None = None):
    """Runs a command of `COMMANDS`; ends the process with its exit status.

    Args:
        argv: settings as flags, `sys.argv[1:]` if None.
    """
    command = COMMANDS[name]
    algorithm = ALGORITHMS[command.algorithm]
    main(algorithm.config, algorithm.trainer, name, argv=argv, defaults=command.defaults)
