"""The value head that TRL's checkpoints hold, and its place in their files: dropout, then one linear output."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from coati.errors import UserError
from coati.models.base import hidden_size

HEAD = "v_head.summary."
SAFE, BIN = "model.safetensors", "pytorch_model.bin"
WEIGHT_FILES = (SAFE, f"{SAFE}.index.json", BIN, f"{BIN}.index.json")


class ValueHead(nn.Module):
    """One value per token, from the last hidden states. Its weights are float32 whatever the model's dtype.

    Args:
        config: the model's config, which gives the width; its `summary_dropout_prob`, if any, beats the keyword.
        v_head_init_strategy: None for `nn.Linear`'s own draw, "normal" for N(0, v_head_initializer_range) and bias 0.

    Raises:
        UserError: another strategy, or a config that doesn't say how wide hidden states are.
    """

    def __init__(
        self,
        config,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ):
        super().__init__()
        dropout = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.summary = nn.Linear(hidden_size(config), 1, dtype=torch.float32)
        self.init_weights(v_head_init_strategy, v_head_initializer_range)

    def init_weights(self, strategy: str | None, initializer_range: float = 0.2):
        """Initializes the weights by "normal"; None leaves them as they are."""
        if strategy not in (None, "normal"):
            raise UserError(f"v_head_init_strategy is {strategy!r}: give None or 'normal'")
        if strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, seq, hidden]` of any float dtype, on any device, to `[batch, seq, 1]` in the head's own."""
        return self.summary(self.dropout(hidden).to(self.summary.weight))


def load_head(source: str | Path, **hub_kwargs) -> dict[str, Tensor] | None:
    """The tensors `v_head.summary.*` of a checkpoint (safetensors or bin, in one file or several), on the CPU.

    Args:
        source: folder or hub name.
        **hub_kwargs: token, revision, cache_dir, subfolder, ...

    Returns:
        name -> tensor, or None if the checkpoint has no head.
    """
    from transformers.utils import cached_file

    for name in WEIGHT_FILES:
        file_path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        files = [] if file_path is None else [file_path]
        if file_path is not None and name.endswith(".json"):
            shards = json.loads(Path(file_path).read_text())["weight_map"]
            wanted = sorted({shard for key, shard in shards.items() if key.startswith(HEAD)})
            files = [cached_file(source, shard, **hub_kwargs) for shard in wanted]
        head = {}
        for file in files:
            head.update(_read_head_of_file(file))
        if head:
            return head
    return None


def save_head(folder: str | Path, state: dict[str, Tensor]):
    """Writes the head of a model's state beside its adapter."""
    from safetensors.torch import save_file

    head = {key: value.contiguous() for key, value in state.items() if key.startswith(HEAD)}
    save_file(head, Path(folder) / SAFE, metadata={"format": "pt"})


def _read_head_of_file(file: str) -> dict[str, Tensor]:
    if not file.endswith(".safetensors"):
        from transformers.modeling_utils import load_state_dict

        return {key: value for key, value in load_state_dict(file).items() if key.startswith(HEAD)}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys() if key.startswith(HEAD)}  # noqa: SIM118
