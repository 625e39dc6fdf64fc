"""Sequence classifiers as rewards: a text's score is that of the text alone in plain transformers, however it is
batched and padded."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.errors import UserError
from coati.rewards import SequenceClassifierReward
from tests.models.decoders import DECODERS, decoder_config
from tests.rewards.samples import samples

EOS = "<|endoftext|>"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
TEXTS = ["The lamp is red.", "", "A chair", f"Thank you.{EOS}", "late " * 12, f"{EOS}{EOS}", f"{EOS}x"]


@cache
def gpt2_tokenizer(**special):
    """Byte-level BPE with one special token, as GPT-2 has it: no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the lamp is red, thank you, late again"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(special or dict(eos_token=EOS, bos_token=EOS)))


@cache
def word_tokenizer():
    """As BERT has it: [CLS] text [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the lamp is red thank you late again".split()]  # noqa: SIM905
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **names)


def make(config, seed: int = 0):
    """A classifier with logits of about 1."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        if name.startswith(("score", "classifier")) and parameter.ndim == 2:
            torch.nn.init.normal_(parameter)
    return model


def decoder(name: str = "gpt2", **changes):
    """As it is published: no pad token in the config."""
    ids = dict(vocab_size=len(gpt2_tokenizer()), pad_token_id=None, bos_token_id=0, eos_token_id=0)
    return make(decoder_config(name, **{**ids, "num_labels": 1, **changes}))


def encoder(name: str = "Bert", **changes):
    import transformers

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    if name == "Bart":
        sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48)
        sizes |= dict(encoder_attention_heads=4, decoder_attention_heads=4, eos_token_id=3, decoder_start_token_id=3)
    sizes |= dict(vocab_size=len(word_tokenizer()), max_position_embeddings=40, pad_token_id=0)
    return make(getattr(transformers, f"{name}Config")(**sizes, **{"num_labels": 1, **changes}))


@torch.no_grad()
def alone(model, texts: list[str]) -> torch.Tensor:
    """Each text by itself in plain transformers, which without a pad token reads the last token; logits `[batch,
    labels]`. A text without tokens becomes one pad token."""
    plain = copy.deepcopy(model).eval()
    plain.config.pad_token_id = None
    encoded = [gpt2_tokenizer()(text)["input_ids"] or [gpt2_tokenizer().eos_token_id] for text in texts]
    return torch.cat([plain(torch.tensor([ids])).logits for ids in encoded])


@cache
def chai():
    """The recipe of the Chai reward models, over a small GPT-2."""
    model = decoder(n_positions=300)
    plain = copy.deepcopy(model).eval()
    options = dict(pad_token=EOS, truncation_side="left", padding_side="right", max_length=256)
    return SequenceClassifierReward(model, gpt2_tokenizer(), **options), plain


def test_the_gpt2_recipe():
    """PITFALL 6: pad = EOS, and texts that contain or end in EOS are scored at their own last token."""
    reward, plain = chai()
    scores = reward.score(samples(["Say: "] * len(TEXTS), TEXTS, answer=[1] * len(TEXTS)))
    assert scores.shape == (len(TEXTS),) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, alone(plain, [f"Say: {t}" for t in TEXTS])[:, 0], rtol=1e-5, atol=1e-5)
    assert reward.model.config.pad_token_id == gpt2_tokenizer().eos_token_id == 0


@torch.no_grad()
def test_why_transformers_alone_will_not_do():
    """It refuses batches, and once it has a pad token it scores a text that ends in EOS one token early."""
    reward, plain = chai()
    tokenizer = reward.tokenizer
    batch = tokenizer(["Thank you.", f"Thank you.{EOS}"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match="padding token"):
        plain(ids, attention_mask=mask)
    early = reward.model(ids, attention_mask=mask).logits[:, 0]
    assert torch.allclose(early[0], early[1])
    ours = reward.score(samples(["", ""], ["Thank you.", f"Thank you.{EOS}"]))
    assert torch.allclose(ours[0], early[0], atol=1e-5) and not torch.allclose(ours[1], early[1], atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["the", " lamp", "é", "\n", EOS, "{", "x" * 9]), max_size=8).map("".join), min_size=1
    ),
    batch_size=st.integers(1, 5),
    side=st.sampled_from(["left", "right"]),
)
def test_scores_do_not_depend_on_batches_and_padding(texts, batch_size, side):
    reward, plain = chai()
    other = copy.copy(reward)
    other.tokenizer, other.batch_size = copy.deepcopy(reward.tokenizer), batch_size
    other.tokenizer.padding_side = side
    scores = other.score(samples([""] * len(texts), texts))
    torch.testing.assert_close(scores, alone(plain, texts)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_decoders_are_read_at_the_last_token(name, side):
    reward = SequenceClassifierReward(decoder(name), gpt2_tokenizer(), padding_side=side, batch_size=4)
    scores = reward.score(samples([""] * len(TEXTS), TEXTS))
    torch.testing.assert_close(scores, alone(reward.model, TEXTS)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "Bart"])
@torch.no_grad()
def test_encoders_are_read_as_they_read_themselves(name):
    reward = SequenceClassifierReward(encoder(name), word_tokenizer(), batch_size=2)
    texts = ["thank you", "the lamp is red", "", "late late late late late late"]
    expected = [reward.model(**word_tokenizer()(t, return_tensors="pt")).logits[0, 0] for t in texts]
    torch.testing.assert_close(reward.score(samples([""] * 4, texts)), torch.stack(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=f"{name}ForSequenceClassification.*padding stays on the right"):
        SequenceClassifierReward(reward.model, word_tokenizer(), padding_side="left")


@torch.no_grad()
def test_longer_texts_lose_the_side_that_is_asked_for():
    reward, plain = chai()
    long = "".join(f"{i} " for i in range(200))
    ids = gpt2_tokenizer()(long)["input_ids"]
    assert len(ids) > 256
    left, right = (plain(torch.tensor([part])).logits[0] for part in (ids[-256:], ids[:9]))
    torch.testing.assert_close(reward.score(samples(["", ""], [long, "x"]))[:1], left, rtol=1e-5, atol=1e-5)
    short = SequenceClassifierReward(reward.model, gpt2_tokenizer(), truncation_side="right", max_length=9)
    torch.testing.assert_close(short.score(samples([""], [long])), right, rtol=1e-5, atol=1e-5)


def test_texts_longer_than_the_model_reads_are_cut_to_it():
    """GPT-2 has embeddings for 64 positions here; BLOOM reads any length."""
    assert SequenceClassifierReward(decoder(), gpt2_tokenizer()).score(samples([""], ["x " * 200])).isfinite().all()
    bloom = SequenceClassifierReward(decoder("Bloom"), gpt2_tokenizer())
    assert bloom.max_length is None
    torch.testing.assert_close(
        bloom.score(samples([""], ["x" * 99])), alone(bloom.model, ["x" * 99])[0], rtol=1e-4, atol=1e-5
    )
    assert SequenceClassifierReward(encoder(), word_tokenizer()).max_length == 32
    with pytest.raises(UserError, match="reads 1 to 64 tokens, not max_length 65"):
        SequenceClassifierReward(decoder(), gpt2_tokenizer(), max_length=65)


def test_the_label_is_chosen_by_name_or_index():
    labels = dict(id2label={0: "bad", 1: "good", 2: "1"}, label2id={"bad": 0, "good": 1, "1": 2})
    model = decoder(num_labels=3, **labels)
    logits = alone(model, TEXTS)
    for label, column in (("good", 1), (0, 0), ("0", 0), ("1", 2), (1, 1)):
        scores = SequenceClassifierReward(model, gpt2_tokenizer(), label=label).score(samples([""] * len(TEXTS), TEXTS))
        torch.testing.assert_close(scores, logits[:, column], rtol=1e-4, atol=1e-5)
    for label in (None, "nice", 3, -1):
        with pytest.raises(UserError, match=rf"labels bad, good, 1, not {label}.*the setting `label`"):
            SequenceClassifierReward(model, gpt2_tokenizer(), label=label)


@pytest.mark.parametrize("kind", ["single", "several", "multi"])
def test_what_is_read_of_the_label(kind):
    problem = dict(problem_type="multi_label_classification") if kind == "multi" else {}
    model = decoder(num_labels=1 if kind == "single" else 3, **problem)
    logits = alone(model, TEXTS)
    expected = logits.softmax(1)[:, -1] if kind == "several" else logits.sigmoid()[:, -1]
    for output, values in (("probability", expected), ("log_prob", expected.log()), ("logit", logits[:, -1])):
        reward = SequenceClassifierReward(model, gpt2_tokenizer(), label=logits.shape[1] - 1, output=output)
        torch.testing.assert_close(reward.score(samples([""] * len(TEXTS), TEXTS)), values, rtol=1e-4, atol=1e-5)


def test_prompt_and_response_are_joined_by_a_template_or_by_the_chat_template():
    tokenizer = copy.deepcopy(gpt2_tokenizer())
    tokenizer.chat_template = CHAT
    model = decoder()
    joined = {
        "{prompt}{response}": "why {x}?so",
        "Q: {prompt}\nA: {response}{{}}": "Q: why {x}?\nA: so{}",
        "chat": f"<user>why {{x}}?{EOS}<assistant>so{EOS}",
    }
    for template, text in joined.items():
        reward = SequenceClassifierReward(model, tokenizer, template=template)
        torch.testing.assert_close(
            reward.score(samples(["why {x}?"], ["so"])), alone(model, [text])[0], rtol=1e-4, atol=1e-5
        )
    for template in ("{prompt}", "{prompt}{reply}", "{response", "{}", "{0}{response}", ""):
        with pytest.raises(UserError, match="write chat, pair, or a text with"):
            SequenceClassifierReward(model, tokenizer, template=template)
    with pytest.raises(UserError, match="no chat template"):
        SequenceClassifierReward(model, gpt2_tokenizer(), template="chat")


@torch.no_grad()
def test_a_pair_of_texts_gets_the_tokenizers_separator():
    reward = SequenceClassifierReward(encoder(), word_tokenizer(), template="pair")
    prompts, responses = ["thank you", "late"], ["the lamp is red", "again"]
    expected = [
        reward.model(**word_tokenizer()(p, r, return_tensors="pt")).logits[0, 0]
        for p, r in zip(prompts, responses, strict=True)
    ]
    torch.testing.assert_close(reward.score(samples(prompts, responses)), torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_chat_template_writes_its_special_tokens_itself():
    """PITFALL 18: the tokenizer adds no second [CLS]."""
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m.content }} {% endfor %}"
    reward = SequenceClassifierReward(encoder(), tokenizer, template="chat")
    ids = tokenizer.convert_tokens_to_ids(["[CLS]", "thank", "you", "late"])
    expected = reward.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(reward.score(samples(["thank you"], ["late"])), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_brings_its_tokenizer_and_another_may_be_named(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path / "whole")
    gpt2_tokenizer().save_pretrained(tmp_path / "whole")
    expected = alone(model, TEXTS)[:, 0]
    reward = SequenceClassifierReward(tmp_path / "whole")
    assert reward.name == "whole" and not reward.model.training
    torch.testing.assert_close(reward.score(samples([""] * len(TEXTS), TEXTS)), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "bare")
    gpt2_tokenizer().save_pretrained(tmp_path / "tokenizer")
    reward = SequenceClassifierReward(str(tmp_path / "bare"), str(tmp_path / "tokenizer"), dtype=torch.bfloat16)
    assert reward.model.dtype == torch.bfloat16
    assert reward.score(samples(["a"], ["b"])).dtype == torch.float32


def test_the_given_tokenizer_is_left_as_it_is():
    tokenizer = copy.deepcopy(gpt2_tokenizer())
    SequenceClassifierReward(decoder(), tokenizer, padding_side="left")
    assert tokenizer.pad_token is None
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")


def no_pad_token():
    return gpt2_tokenizer(bos_token=EOS)


@pytest.mark.parametrize(
    ("model", "tokenizer", "options", "says"),
    [
        (decoder, no_pad_token, {}, "no pad token and no EOS.*the setting `pad_token`"),
        (decoder, gpt2_tokenizer, dict(pad_token="[PAD]"), r"no token '\[PAD\]' to pad with"),
        (encoder, lambda: copy_without_pad(word_tokenizer()), {}, "no pad token: name a token"),
        (decoder, lambda: None, {}, "give its tokenizer too"),
        (decoder, lambda: "nowhere", {}, "can't load the tokenizer of.*from nowhere.*the setting `tokenizer`"),
        (encoder, gpt2_tokenizer, {}, r"has \d+ tokens but the vocabulary of .* is 12: give the classifier's own"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(model, tokenizer, options, says):
    with pytest.raises(UserError, match=says):
        SequenceClassifierReward(model(), tokenizer(), **options)


def copy_without_pad(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    return tokenizer


def test_a_model_that_looks_for_eos_is_not_padded_with_it():
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.eos_token = "[PAD]"
    with pytest.raises(UserError, match="takes EOS '\\[PAD\\]' for the text's end"):
        SequenceClassifierReward(encoder(), tokenizer)


def test_a_checkpoint_that_is_no_classifier_is_refused(tmp_path):
    """A score that is drawn anew at each start would be worse than none."""
    from coati.models import Actor, LoraSettings

    actor = Actor(config=decoder_config("llama"))
    actor.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=r"policy lacks 1 weights of LlamaForSequenceClassification: score.weight"):
        SequenceClassifierReward(tmp_path / "policy", gpt2_tokenizer())
    Actor(tmp_path / "policy", lora=LoraSettings(rank=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter: merge it"):
        SequenceClassifierReward(tmp_path / "adapter", gpt2_tokenizer())
    with pytest.raises(UserError, match="nowhere"):
        SequenceClassifierReward("nowhere", gpt2_tokenizer())
