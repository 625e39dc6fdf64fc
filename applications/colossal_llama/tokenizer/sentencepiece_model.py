"""`tokenizer.model` files of sentencepiece: which kind they are, and how they grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coati.errors import UserError

BPE = 2
NORMAL, CONTROL = 1, 3


def read_model(path: Path):
    """The `ModelProto` of a BPE model.

    Raises:
        UserError: the file is no sentencepiece model, or one of another kind (unigram, word, char).
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is no sentencepiece model; remove it if tokenizer.json is intact.") from None
    kind = model.trainer_spec.model_type
    if kind != BPE:
        name = model.trainer_spec.ModelType.Name(kind).lower()
        raise UserError(f"{path} is a sentencepiece {name} model; only BPE models can be extended.")
    return model


def extend_model(model, vocabulary) -> bytes:
    """The model with the vocabulary's new pieces, each ranking below all before it, and with equal ids.

    Added tokens that only `tokenizer.json` has stand between as control pieces, which no text gives.

    Raises:
        UserError: an id is another piece in the vocabulary.
    """
    pieces = [piece.piece for piece in model.pieces]
    by_id = {token: piece for piece, token in vocabulary.old.items()}
    for token, piece in enumerate(pieces):
        if by_id.get(token) != piece:
            raise UserError(
                f"tokenizer.model and tokenizer.json disagree: id {token} is {piece!r} and {by_id.get(token)!r}; "
                "remove the one that is out of date."
            )
    for token in range(len(pieces), vocabulary.first_new):
        model.pieces.add(piece=by_id.get(token, f"<unused_{token}>"), score=0, type=CONTROL)
    score = np.float32(min(piece.score for piece in model.pieces))
    for piece in vocabulary.new:
        # Mistral's model has scores of -1e9, where float32 has steps of 64: equal scores would be no order.
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        model.pieces.add(piece=piece, score=float(score), type=NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()
