"""Reward models of several objectives: what their folders say, and what plain transformers makes of them."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from coati.errors import UserError
from coati.models import Critic, LoraSettings, ObjectiveRewardModel, RewardModel
from coati.models.objectives import objective_weights, stored_objectives
from tests.models.decoders import decoder_config
from tests.models.families import padded, rows, tiny_config

NAMES = ["helpfulness", "verbosity", "coherence"]
WEIGHTS = {"helpfulness": 0.75, "coherence": -2.0}


def make(config, names=NAMES, **options) -> ObjectiveRewardModel:
    """With a head that tells sequences and objectives apart."""
    torch.manual_seed(0)
    model = ObjectiveRewardModel(config=config, objectives=names, **options).eval()
    torch.nn.init.normal_(model.value_head.weight)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("objectives")
    make(tiny_config("llama")).save_pretrained(path)
    return path


@torch.no_grad()
def test_a_folder_says_what_its_outputs_are(folder):
    ids, mask = padded(rows(), "right")
    expected = make(tiny_config("llama"))(ids, mask)
    model = ObjectiveRewardModel(folder).eval()
    assert stored_objectives(folder) == model.objectives == NAMES
    assert model(ids, mask).equal(expected) and expected.shape == (len(ids), 3) and expected.std(0).min() > 1e-3
    assert AutoModel.from_pretrained(folder).config.objectives == NAMES
    left = model(*padded(rows(), "left", extra=2))
    torch.testing.assert_close(left, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "Qwen2"])
@torch.no_grad()
def test_as_a_classifier_it_has_the_same_outputs_in_plain_transformers(name, tmp_path):
    """PITFALL 23. With the objectives as labels; and the folder is a model of objectives again."""
    model = make(decoder_config(name))
    model.save_pretrained(tmp_path, as_sequence_classifier=True)
    ids, mask = padded(rows(), "right", extra=1)
    plain, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert plain.config.problem_type == "regression" and plain.config.id2label == dict(enumerate(NAMES))
    torch.testing.assert_close(plain.eval()(ids, attention_mask=mask).logits, model(ids, mask), rtol=0, atol=1e-5)
    again = ObjectiveRewardModel(tmp_path).eval()
    assert again.objectives == NAMES
    torch.testing.assert_close(again(ids, mask), model(ids, mask), rtol=0, atol=1e-6)


@torch.no_grad()
def test_with_weights_a_model_of_one_score_or_a_critic_starts_from_the_sum(folder, tmp_path):
    ids, mask = padded(rows(), "right")
    by_objective = ObjectiveRewardModel(folder).eval()(ids, mask)
    expected = 0.75 * by_objective[:, 0] - 2.0 * by_objective[:, 2]
    model = RewardModel(folder, weights=WEIGHTS).eval()
    torch.testing.assert_close(model(ids, mask), expected, rtol=0, atol=1e-5)
    critic = Critic(folder, weights=WEIGHTS)
    assert critic.value_head.weight.equal(model.value_head.weight) and critic.value_head.bias == 0
    model.save_pretrained(tmp_path)
    assert stored_objectives(tmp_path) == []  # it is a model of one score
    torch.testing.assert_close(RewardModel(tmp_path).eval()(ids, mask), expected, rtol=0, atol=1e-5)


def test_an_adapter_keeps_its_objectives(tmp_path):
    make(tiny_config("llama")).save_pretrained(tmp_path / "base")
    adapted = ObjectiveRewardModel(tmp_path / "base", lora=LoraSettings(rank=2)).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ids, mask = padded(rows(), "right")
    again = ObjectiveRewardModel(tmp_path / "adapter").eval()
    assert again.objectives == NAMES
    torch.testing.assert_close(again(ids, mask), adapted(ids, mask), rtol=0, atol=1e-6)


def test_a_model_of_pairs_gives_its_transformer_and_not_its_head(tmp_path):
    torch.manual_seed(1)
    RewardModel(config=tiny_config("llama")).save_pretrained(tmp_path)
    pairs, model = RewardModel(tmp_path), ObjectiveRewardModel(tmp_path, objectives=["coherence"])
    assert model.value_head.weight.shape == (1, 32) and not model.value_head.weight.equal(pairs.value_head.weight)
    expected = pairs.transformer.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in model.transformer.state_dict().items())


@torch.no_grad()
def test_a_model_of_one_objective_is_a_model_of_one_score(tmp_path):
    make(tiny_config("llama"), ["coherence"]).save_pretrained(tmp_path)
    ids, mask = padded(rows(), "right")
    single = ObjectiveRewardModel(tmp_path).eval()(ids, mask)
    assert single.shape == (len(ids), 1) and RewardModel(tmp_path).eval()(ids, mask).equal(single[:, 0])
    assert objective_weights(tmp_path, None) is None and objective_weights(tmp_path, {"coherence": 2}) == {
        "coherence": 2
    }


@pytest.mark.parametrize("model_class", [RewardModel, Critic])
@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (None, r"has the objectives helpfulness, verbosity, coherence.*say how they count.*objectives: \{helpfulness"),
        ({"honesty": 1.0}, "has no objective 'honesty', but helpfulness, verbosity, coherence"),
    ],
)
def test_what_is_wrong_about_weights_is_one_line(model_class, weights, says, folder):
    with pytest.raises(UserError, match=says) as raised:
        model_class(folder, weights=weights)
    assert "\n" not in str(raised.value)


def test_other_models_have_no_objectives(folder, tmp_path):
    RewardModel(config=tiny_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a model of one score: leave out objectives"):
        RewardModel(tmp_path, weights=WEIGHTS)
    with pytest.raises(UserError, match="no reward model of several objectives"):
        ObjectiveRewardModel(tmp_path)
    with pytest.raises(UserError, match="has the objectives helpfulness, verbosity, coherence, not honesty"):
        ObjectiveRewardModel(folder, objectives=["honesty"])


def test_a_head_that_is_missing_is_no_head_of_random_weights(tmp_path):
    make(tiny_config("llama")).save_pretrained(tmp_path)
    (tmp_path / "value_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"has objectives but no head: put its value_head\.safetensors there"):
        Critic(tmp_path, weights=WEIGHTS)


def test_a_classifier_of_labels_without_names_in_its_config_stays_one(folder, tmp_path):
    make(tiny_config("llama")).save_pretrained(tmp_path, as_sequence_classifier=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["objectives"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has 3 labels.*a reward of type classifier"):
        ObjectiveRewardModel(tmp_path)
