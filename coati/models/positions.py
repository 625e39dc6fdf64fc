"""The longest row that a model supports."""

from dataclasses import dataclass

from torch import nn

from coati.models.towers import towers

# tables computed in code for as many positions as a setting of the config says: ALiBi's biases, sinusoids
COMPUTED_TABLES = {"mpt": "max_seq_len", "ctrl": "n_positions"}


@dataclass(frozen=True)
class RowLimit:
    """A longest row, in tokens, and what in the model sets it."""

    tokens: int
    reason: str


def row_limit(model: nn.Module) -> RowLimit | None:
    """The longest row that a transformers model reads as it should; None where positions are unlimited.

    Learned positions end with their table. Frequencies that are chosen by length (rope types dynamic and longrope,
    2402.13753) are one choice for a whole batch, and another for the same tokens in generation: beyond the original
    length a row's log-probs depend on its neighbors.
    """
    limits = [limit for limit in (_of_table(model), _of_frequencies(model.config)) if limit is not None]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _of_table(model: nn.Module) -> RowLimit | None:
    tokens = model.get_input_embeddings()
    of_images = tuple(f"{name}." for name in towers(model))
    sizes = []
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and module is not tokens and not name.startswith(of_images)
        if is_table and (name.endswith("wpe") or "position" in name.rpartition(".")[2]):
            # RoBERTa and its kin count from the padding's number on; OPT and BART leave two rows out
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            sizes.append(module.num_embeddings - getattr(module, "offset", taken))
    setting = COMPUTED_TABLES.get(model.config.model_type)
    if setting is not None:
        sizes.append(getattr(model.config, setting))
    sizes += [len(table) for name, table in model.named_buffers() if name.endswith("embed_positions")]  # GPT-J's kind
    return RowLimit(min(sizes), "has a table of positions for") if sizes else None


def _of_frequencies(config) -> RowLimit | None:
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    limits = []
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            original = kind.get("original_max_position_embeddings") or text.max_position_embeddings
            limits.append(RowLimit(original, "changes its rotary frequencies (longrope) for rows beyond"))
        elif kind.get("rope_type") == "dynamic":
            limits.append(RowLimit(text.max_position_embeddings, "changes its rotary frequencies (dynamic) beyond"))
    return min(limits, key=lambda limit: limit.tokens, default=None)
