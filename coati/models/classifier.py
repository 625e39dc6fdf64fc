"""Sequence classifiers of transformers whose head is one linear layer, `score`, read at the last token: the reward
models of most other libraries."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from coati.errors import UserError


def reads_last_token(classifier: nn.Module) -> bool:
    """Its logits are `score(last hidden states)` at the last real token, as for Llama, GPT-2 and other decoders."""
    return isinstance(getattr(classifier, "score", None), nn.Linear)


def at_last_token(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Of values `[batch, seq, ...]`, each row's at its last real token, `[batch, ...]`; padding on either side."""
    positions = torch.arange(values.shape[1], device=values.device)
    last = (attention_mask.long() * positions).argmax(dim=1)
    return values[torch.arange(len(values), device=values.device), last]


def stored_classifier(source: str | Path):
    """The config of a checkpoint that was saved as a sequence classifier; None for any other.

    Raises:
        UserError: a classifier of several labels that are no objectives.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return None
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or []):
        return None
    if config.num_labels != max(len(getattr(config, "objectives", None) or []), 1):
        raise UserError(
            f"the classifier in {source} has {config.num_labels} labels, a reward model has one score: "
            "score with it as it is (a reward of type classifier, SequenceClassifierReward)"
        )
    return config


def score_weight(classifier: nn.Module) -> Tensor:
    """The head's weight, `[labels, hidden]`.

    Raises:
        UserError: its logits are not those of one linear layer without bias on the last hidden states.
    """
    parts = {name for name, part in classifier.named_children() if next(part.parameters(), None) is not None}
    linear = reads_last_token(classifier) and classifier.score.bias is None
    if not linear or parts != {classifier.base_model_prefix, "score"}:
        raise UserError(
            f"{type(classifier).__name__} has another head than a RewardModel's one linear layer `score` at the last "
            "token: its checkpoints can score as they are (a reward of type classifier, SequenceClassifierReward)"
        )
    return classifier.score.weight


def save_classifier(folder: str | Path, config, trunk: dict[str, Tensor], head: Tensor, pad_token_id: int | None):
    """Writes the weights of a transformer and of a head `[labels, hidden]` as a sequence classifier. Where the config
    names objectives, they are its labels.

    Raises:
        UserError: the architecture has no such classifier.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(config)
    config.num_labels = len(head)
    if objectives := getattr(config, "objectives", None):
        config.problem_type = "regression"
        config.id2label = dict(enumerate(objectives))
        config.label2id = {name: label for label, name in enumerate(objectives)}
    text = config.get_text_config()
    text.pad_token_id = text.pad_token_id if text.pad_token_id is not None else pad_token_id
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"transformers has no sequence classifier of {config.model_type} models") from error
    score_weight(classifier)
    prefix = classifier.base_model_prefix
    state = {f"{prefix}.{name}": value for name, value in trunk.items()} | {"score.weight": head}
    classifier.load_state_dict({name: value.contiguous() for name, value in state.items()}, assign=True)
    classifier.save_pretrained(str(folder))
