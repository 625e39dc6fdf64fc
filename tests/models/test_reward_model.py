"""Reward models and the sequence classifiers of transformers are the same folders."""

import json

import pytest
import torch

from coati.errors import UserError
from coati.models import Critic, LoraSettings, RewardModel
from coati.models.attention import set_eager_where_capped
from tests.models.decoders import DECODERS, decoder_config
from tests.models.families import GROUPED, SHARED, padded, rows, tiny_config


def reward_model(config, **options) -> RewardModel:
    """With a head that tells sequences apart."""
    torch.manual_seed(0)
    model = RewardModel(config=config, **options).eval()
    torch.nn.init.normal_(model.value_head.weight)
    return model


def classifier(config):
    import transformers

    torch.manual_seed(0)
    return with_our_attention(transformers.AutoModelForSequenceClassification.from_config(config).eval())


def with_our_attention(plain):
    """Transformers leaves soft caps out by default; ours doesn't."""
    set_eager_where_capped(plain)
    return plain


def opened(folder):
    """In plain transformers, nothing missing and nothing left over."""
    from transformers import AutoModelForSequenceClassification

    plain, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return with_our_attention(plain.eval())


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_ours_open_in_plain_transformers_and_theirs_in_ours(name, tmp_path):
    """PITFALL 23. Both ways, with the same scores to 1e-6."""
    model = reward_model(decoder_config(name))
    model.save_pretrained(tmp_path / "ours", as_sequence_classifier=True)
    ids, mask = padded(rows(), "right", extra=1)
    expected = model(ids, mask)
    assert expected.std() > 1e-3
    torch.testing.assert_close(
        opened(tmp_path / "ours")(ids, attention_mask=mask).logits[:, 0], expected, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(RewardModel(tmp_path / "ours").eval()(ids, mask), expected, rtol=0, atol=1e-6)

    theirs = classifier(decoder_config(name, num_labels=1))
    theirs.save_pretrained(tmp_path / "theirs")
    again = RewardModel(tmp_path / "theirs").eval()
    torch.testing.assert_close(again(ids, mask), theirs(ids, attention_mask=mask).logits[:, 0], rtol=0, atol=1e-6)
    critic = Critic(tmp_path / "theirs")
    assert critic.value_head.weight.equal(theirs.score.weight) and critic.value_head.bias == 0


def test_theirs_train_further_and_are_saved_as_either(tmp_path):
    classifier(tiny_config("gpt2", num_labels=1)).save_pretrained(tmp_path / "theirs", max_shard_size="20kB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = RewardModel(tmp_path / "theirs", dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, mask = padded(rows(), "right")
    before = model.eval()(ids, mask).detach()
    model(ids, mask).sum().backward()
    optimizer.step()
    after = model(ids, mask).detach()
    assert (after < before).all()
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "classifier", as_sequence_classifier=True)
    for folder in ("plain", "classifier"):
        assert torch.equal(RewardModel(tmp_path / folder).eval()(ids, mask), after)
    names = {p.name for p in (tmp_path / "classifier").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_a_folder_may_be_written_over_as_the_other_kind(tmp_path):
    ids, mask = padded(rows(), "right")
    for seed, as_classifier in enumerate((False, True, False)):
        model = reward_model(tiny_config("llama"))
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.value_head.weight)
        model.save_pretrained(tmp_path, as_sequence_classifier=as_classifier)
        assert torch.equal(RewardModel(tmp_path).eval()(ids, mask), model(ids, mask))


def test_the_pad_token_is_written_where_it_is_known(tmp_path):
    for name, own, given, written in (("a", 0, 5, 0), ("b", None, 5, 5), ("c", None, None, None)):
        model = reward_model(tiny_config("llama", pad_token_id=own))
        model.save_pretrained(tmp_path / name, as_sequence_classifier=True, pad_token_id=given)
        assert json.loads((tmp_path / name / "config.json").read_text())["pad_token_id"] == written
        assert model.config.pad_token_id == own


def test_a_gathered_state_and_merged_adapters_are_saved(tmp_path):
    ids, mask = padded(rows(), "right")
    source = reward_model(tiny_config("gpt2"))
    state = {key: value.clone() for key, value in source.state_dict().items()}
    other = RewardModel(config=tiny_config("gpt2"))
    other.save_pretrained(tmp_path / "state", state, as_sequence_classifier=True)
    assert torch.equal(opened(tmp_path / "state")(ids, attention_mask=mask).logits[:, 0], source(ids, mask))

    source.save_pretrained(tmp_path / "base")
    adapted = RewardModel(tmp_path / "base", lora=LoraSettings(rank=2)).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "merged", merge=True, as_sequence_classifier=True)
    scores = opened(tmp_path / "merged")(ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(scores, adapted(ids, mask), rtol=0, atol=1e-5)
    assert not torch.allclose(scores, source(ids, mask), atol=1e-3)
    with pytest.raises(UserError, match="merge"):
        adapted.save_pretrained(tmp_path / "adapter", as_sequence_classifier=True)


def test_a_config_goes_with_their_folder(tmp_path):
    classifier(tiny_config("llama", num_labels=1)).save_pretrained(tmp_path)
    config = tiny_config("llama", attention_dropout=0.5)
    assert config.num_labels == 2
    model = RewardModel(tmp_path, config)
    assert model.config.attention_dropout == 0.5 and config.num_labels == 2


def test_a_classifier_of_several_labels_is_scored_with_and_not_trained(tmp_path):
    classifier(tiny_config("llama", num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has 3 labels.*a reward of type classifier, SequenceClassifierReward"):
        RewardModel(tmp_path)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "CTRL", "T5"])
def test_another_kind_of_head_is_named(name, tmp_path):
    import transformers

    sizes = {
        "T5": dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "CTRL": dict(n_embd=32, dff=48, n_layer=2, n_head=4, n_positions=64),
    }
    encoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{name}Config")(**SHARED, **sizes.get(name, encoder), num_labels=1)
    classifier(config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match=f"{name}ForSequenceClassification has another head.*SequenceClassifierReward"):
        RewardModel(tmp_path / "theirs")
    if name != "T5":  # it has no forward without decoder ids
        with pytest.raises(UserError, match=f"{name}ForSequenceClassification"):
            RewardModel(config=config).save_pretrained(tmp_path / "ours", as_sequence_classifier=True)


def test_an_architecture_without_classifier_is_named(tmp_path):
    import transformers

    config = transformers.CohereConfig(**SHARED, **GROUPED)
    with pytest.raises(UserError, match="no sequence classifier of cohere models"):
        reward_model(config).save_pretrained(tmp_path, as_sequence_classifier=True)
