"""A small tokenizer from texts, for examples that start from nothing."""

from collections.abc import Iterable


def byte_level_tokenizer(texts: Iterable[str], size: int, special: dict[str, str]):
    """A byte-level BPE tokenizer of at most `size` tokens as a `PreTrainedTokenizerFast`.

    Args:
        special: `bos_token`, `eos_token`, `pad_token`: they get the first ids, and none is added to texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = dict(special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
