"""Small tokenizers, for examples that start from nothing."""

from collections.abc import Iterable

# of `character_tokenizer`: messages one after the other, EOS after responses
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}{{- message.content }}{% endif %}
{%- endfor %}"""


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


def character_tokenizer(characters: str, one_character: str = "."):
    """A token a character, as a `PreTrainedTokenizerFast` with `<pad>` and `<eos>`.

    Args:
        one_character: the regular expression that splits texts; where lines end within a text, one that matches that.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(one_character), "isolated")
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast
