"""The tensors of a model with a row for each token: which they are, and what the new rows begin as."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coati.errors import UserError
from colossal_llama.tokenizer.tokenizer_folder import is_byte_level

Rule = Literal["mean", "original", "random"]
BLOCK = 1024
# Far below any logit, and a number in float16 too.
NEVER = -1e4


@dataclass
class TokenTensors:
    """Names in the checkpoint: the input embedding `[tokens, hidden]`, the head alike and its bias `[tokens]`."""

    embedding: str
    head: str | None
    bias: str | None
    tied: bool
    shapes: dict[str, list[int]]

    def changed(self) -> list[str]:
        """The names of the tensors that get rows; a tied head has none of its own."""
        head = [] if self.tied else [self.head]
        return [name for name in (self.embedding, *head, self.bias) if name]


def find_token_tensors(folder: Path, names: set[str]) -> TokenTensors:
    """Ask transformers' model class, built without memory, which tensors these are, and find them in `names`.

    Raises:
        UserError: transformers has no causal language model for the folder's config, or a tensor isn't there.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{folder} is no causal language model that transformers knows ({reason}).") from error
    modules = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = bool(head is not None and getattr(config.get_text_config(), "tie_word_embeddings", False))

    prefix = model.base_model_prefix + "."

    def find(module, parameter: str, required: bool = True) -> str | None:
        name = f"{modules[id(module)]}.{parameter}"
        for spelling in (name, name.removeprefix(prefix), prefix + name):
            if spelling in names:
                return spelling
        if required:
            raise UserError(f"{folder} has no tensor {name}; only models saved by transformers can be extended.")
        return None

    return TokenTensors(
        embedding=find(embedding, "weight"),
        head=find(head, "weight", required=not tied) if head is not None else None,
        bias=find(head, "bias") if getattr(head, "bias", None) is not None else None,
        tied=tied,
        shapes={name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    )


def token_sources(old, new, rule: Rule) -> dict[int, list[int]]:
    """For each id that only the new tokenizer has, the old ids whose rows' mean it begins with.

    "mean": the old pieces of the token's own text, as the old merges make them of it: no BOS, no space that the token
    does not begin with; of a part of a character its bytes' pieces. An added token's text is tokenized as any text.

    "original": as Colossal-LLaMA-2's `init_model.py`, which tokenizes the vocabulary's string as if it were a text, so
    that sentencepiece's pieces get a leading space's row into their mean; a byte-level piece is decoded first.

    Args:
        old, new: `tokenizers.Tokenizer`s.

    Returns:
        The list is empty for a token that the old tokenizer can't encode.
    """
    from tokenizers import decoders

    known, model = old.get_vocab(), old.model
    added = {token.content for token in new.get_added_tokens_decoder().values()}
    byte_level = is_byte_level(json.loads(old.to_str()))
    sources = {}
    for piece, token in new.get_vocab().items():
        if piece in known:
            continue
        if piece not in added and rule != "original":
            sources[token] = [part.id for part in model.tokenize(piece)]
            continue
        text = decoders.ByteLevel().decode([piece]) if byte_level and piece not in added else piece
        ids = old.encode(text, add_special_tokens=False).ids
        spurious = rule != "original" and len(ids) > 1 and ids[0] == known.get("▁") and not text.startswith(" ")
        sources[token] = ids[1:] if spurious else ids
    return sources


@dataclass
class RowPlan:
    """The rows from `kept` to `size`: each the mean of old rows (`sources`), or drawn at random, or padding.

    Ids without an entry in `sources` are padding, and those with an empty one have nothing to go by: they are the mean
    of all old rows; in a head's bias padding is `NEVER`.
    """

    kept: int
    size: int
    sources: dict[int, list[int]]
    random: bool
    seed: int

    def blocks(self, weight, is_bias: bool) -> Iterator[bytes]:
        """The rows' bytes in the dtype of `weight`, `[old tokens, ...]`."""
        import torch

        mean, deviation = _moments(weight[: self.kept])
        generator = torch.Generator().manual_seed(self.seed)
        for first in range(self.kept, self.size, BLOCK):
            tokens = range(first, min(first + BLOCK, self.size))
            rows = mean_rows(weight, [self.sources.get(token, []) for token in tokens], mean)
            if self.random:
                noise = torch.randn(rows.shape, generator=generator) * deviation
                drawn = [row for row, token in enumerate(tokens) if self.sources.get(token, [token]) != [token]]
                rows[drawn] = noise[drawn]
            if is_bias:
                rows[[row for row, token in enumerate(tokens) if token not in self.sources]] = NEVER
            yield rows.to(weight.dtype).contiguous().view(torch.uint8).numpy().tobytes()


def mean_rows(weight, sources: list[list[int]], default):
    """Float32 `[len(sources), ...]`: means of rows of `weight`, or `default` where there are no sources."""
    import torch

    counts = torch.tensor([len(ids) for ids in sources])
    flat = torch.tensor([token for ids in sources for token in ids], dtype=torch.long)
    owner = torch.repeat_interleave(torch.arange(len(sources)), counts)
    sums = torch.zeros(len(sources), *weight.shape[1:]).index_add_(0, owner, weight[flat].float())
    shape = (-1, *[1] * (weight.dim() - 1))
    return torch.where(counts.view(shape) > 0, sums / counts.clamp(min=1).view(shape), default)


def _moments(weight):
    """The mean row, float32, and the standard deviation of all elements; a block is in memory at a time."""
    import torch

    total = torch.zeros(weight.shape[1:], dtype=torch.float64)
    squares = 0.0
    for block in weight.split(BLOCK):
        total += block.double().sum(0)
        squares += block.double().square().sum().item()
    mean = total.sum().item() / weight.numel()
    variance = squares / weight.numel() - mean**2
    return (total / len(weight)).float(), max(variance, 0.0) ** 0.5
