"""Settings of supervised fine-tuning."""

from typing import Literal

from coati.config import option, section, settings
from coati.config.generation import GenerationConfig
from coati.trainers.config.base import TrainerConfig


@settings
class SFTConfig(TrainerConfig):
    """Settings of an SFT run."""

    loss: Literal["nll", "dft"] = option(
        "nll", "negative log-likelihood, or dft: each token's times its probability, see docs/sft.md"
    )
    generation: GenerationConfig = section(GenerationConfig, "how the sample responses are drawn")

    def check_machine(self):
        super().check_machine()
        self.generation.check_installed()
