"""The settings of continued pre-training."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from coati.config import ListOf, option, settings
from coati.config.plugin import PLUGINS
from coati.trainers.config import TrainerConfig


@settings
class PretrainConfig(TrainerConfig):
    """Settings of one stage. `train_data` and `eval_data` are folders that `prepare_pretrain` wrote."""

    buckets: ListOf[Annotated[int, Field(ge=0)]] = option((), "which buckets of the data, in which order; none for all")
    mix: dict[str, float] | None = option(
        None, "shares of the tokens by category, such as {zh: 0.7, en: 0.3}; none for those of the data"
    )
    tokens: int = option(0, "tokens to train on; 0 for --steps or --epochs", ge=0)
    freeze: Literal["none", "all-but-embeddings"] = option("none", "what is trained: all, or embeddings and LM head")
    document_mask: bool = option(True, "a document of a packed row sees no other; False: it sees those before it")
    z_loss: float = option(0.0, "weight of log(Z)^2, which keeps the logits' scale near 0 (PaLM: 1e-4)", ge=0)
    neftune_noise_alpha: float = option(
        0.0, "noise on embeddings in training (NEFTune, 2310.05914; 5 for SFT stages)", ge=0
    )

    def problems(self) -> Iterator[str]:
        p = self.parallel
        if self.evaluation.eval_column is not None:
            yield "packed rows are told apart by their category: leave out eval_column"
        if self.document_mask and p.splits_sequences:
            yield "a split sequence attends to whole rows: --document_mask False, or sequence_parallel 1"
        if self.document_mask and self.model.padding_free:
            yield "packed rows have next to no padding, and documents are told by positions: leave out padding_free"
        one_row = self.model.attn_implementation == "flash_attention_2"
        if self.document_mask and one_row and self.micro_batch_size > 1:
            yield "flash_attention_2 keeps documents apart in a single row only: micro_batch_size 1, or sdpa"
        if self.neftune_noise_alpha and p.splits_models:
            yield "NEFTune's noise would differ between the parts of a split model: neftune_noise_alpha 0"
        if self.freeze != "none" and self.model.lora_rank:
            yield "LoRA freezes all weights but its own: freeze none, or lora_rank 0"
        if self.freeze != "none" and not PLUGINS[p.plugin].trains_adapters:
            yield f"{p.plugin} trains all weights: freeze none, or plugin zero2"
