"""The settings of continued pre-training."""

from dataclasses import dataclass
from typing import Literal

from coati.config import option
from coati.config.plugin import PLUGINS
from coati.errors import UserError
from coati.trainers.config import TrainerConfig


@dataclass
class PretrainConfig(TrainerConfig):
    """Settings of one stage. `train_data` and `eval_data` are folders that `prepare_pretrain` wrote."""

    buckets: list[int] = option((), "which buckets of the data, in which order; none for all", ge=0)
    mix: list[str] = option(
        (), "fractions of the tokens by category, such as zh=0.7 en=0.3; none for those of the data"
    )
    tokens: int = option(0, "tokens to train on; 0 for --steps or --epochs", ge=0)
    freeze: Literal["none", "all-but-embeddings"] = option("none", "what is trained: all, or embeddings and LM head")
    document_mask: bool = option(True, "a document of a packed row sees no other; False: it sees those before it")
    z_loss: float = option(0.0, "weight of log(Z)^2, which keeps the logits' scale near 0 (PaLM: 1e-4)", ge=0)
    neftune_noise_alpha: float = option(
        0.0, "noise on embeddings in training (NEFTune, 2310.05914; 5 for SFT stages)", ge=0
    )

    @property
    def shares(self) -> dict[str, float] | None:
        """`mix` by category; None for that of the data.

        Raises:
            UserError: an entry isn't NAME=NUMBER.
        """
        try:
            pairs = [entry.rsplit("=", 1) for entry in self.mix]
            return {name: float(share) for name, share in pairs} or None
        except ValueError as error:
            raise UserError(f"mix {' '.join(self.mix)}: each entry is CATEGORY=SHARE, such as zh=0.7") from error

    def check(self, world_size: int):
        super().check(world_size)
        if self.document_mask and self.splits_sequences:
            raise UserError("a split sequence attends to whole rows: --document_mask False, or sequence_parallel 1")
        if self.document_mask and self.attn_implementation == "flash_attention_2" and self.micro_batch_size > 1:
            raise UserError("flash_attention_2 keeps documents apart in a single row only: micro_batch_size 1, or sdpa")
        if self.neftune_noise_alpha and self.splits_models:
            raise UserError("NEFTune's noise would differ between the parts of a split model: neftune_noise_alpha 0")
        if self.freeze != "none" and self.lora_rank:
            raise UserError("LoRA freezes all weights but its own: freeze none, or lora_rank 0")
        if self.freeze != "none" and not PLUGINS[self.plugin].trains_adapters:
            raise UserError(f"{self.plugin} trains all weights: freeze none, or plugin zero2")
