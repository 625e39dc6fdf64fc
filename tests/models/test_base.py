"""BaseModel's contract: a path, a config, both; sizes; keywords; saving; dropout."""

import json
from pathlib import Path

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor, BaseModel, Critic, RewardModel
from coati.models.base import disable_dropout, hidden_size
from coati.parallel import PluginConfig
from coati.parallel.factory import engine_class
from tests.models.families import FAMILIES, VOCABULARY, padded, rows, tiny_config

CLASSES = {"base": BaseModel, "actor": Actor, "critic": Critic, "reward": RewardModel}


def outputs(model, ids, mask):
    """What a model computes, as one tensor."""
    model.eval()
    with torch.no_grad():
        return model.run(ids, mask).last_hidden_state if type(model) is BaseModel else model(ids, mask)


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", CLASSES)
def test_neither_path_nor_config_is_an_error(name):
    with pytest.raises(ValueError, match="path, a config, or both"):
        CLASSES[name]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLASSES)
def test_round_trip_is_bit_equal(family, name, tmp_path):
    """PITFALL 23: config.json is written. PITFALL 30: safetensors only."""
    torch.manual_seed(0)
    model = CLASSES[name](config=tiny_config(family))
    model.save_pretrained(tmp_path)
    again = CLASSES[name](tmp_path)
    assert_same_weights(model, again)
    ids, mask = padded(rows(), "right")
    assert torch.equal(outputs(model, ids, mask), outputs(again, ids, mask))
    files = {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    assert files - {"generation_config.json", "value_head.safetensors"} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLASSES)
def test_plain_transformers_opens_the_folder(family, name, tmp_path):
    """PITFALL 23: the saved folder gives the same outputs in AutoModel or AutoModelForCausalLM, nothing missing."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    model = CLASSES[name](config=tiny_config(family))
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if name == "actor" else AutoModel
    plain, loading = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = torch.stack(rows(lengths=(6, 6)))
    model.eval()
    with torch.no_grad():
        expected, result = plain(ids), model.run(ids, None)
    part = "logits" if name == "actor" else "last_hidden_state"
    assert torch.equal(getattr(result, part), getattr(expected, part))


def test_saving_a_state_dict_from_elsewhere(tmp_path):
    """Sharded plugins hand over gathered copies, in which tied weights no longer share memory."""
    torch.manual_seed(0)
    for name in ("actor", "critic"):
        source = CLASSES[name](config=tiny_config("gpt2"))
        state = {key: value.clone() + 1 for key, value in source.state_dict().items()}
        source.save_pretrained(tmp_path / name, state)
        again = CLASSES[name](tmp_path / name).state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], state[key]) for key in state)


def test_path_with_config_takes_the_weights_under_that_config(tmp_path):
    model = BaseModel(config=tiny_config("llama"))
    model.save_pretrained(tmp_path)
    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0}, attention_dropout=0.5)
    both = BaseModel(tmp_path, config)
    assert_same_weights(model, both)
    assert both.config.attention_dropout == 0.5
    ids, mask = padded(rows(), "right")
    assert not torch.equal(outputs(model, ids, mask), outputs(both, ids, mask)), "the config changes the rotation"


def test_keywords_reach_from_pretrained_and_from_config(tmp_path):
    BaseModel(config=tiny_config("llama")).save_pretrained(tmp_path)
    for source in (dict(pretrained=str(tmp_path)), dict(config=tiny_config("llama"))):
        model = Critic(**source, dtype=torch.bfloat16, attn_implementation="eager")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.config._attn_implementation == "eager"
    with pytest.raises(TypeError, match="no_such_option"):
        BaseModel(tmp_path, no_such_option=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("name", CLASSES)
def test_attention_that_needs_cuda_is_one_clear_error_without_it(name, attention):
    with pytest.raises(UserError, match=rf"{attention} needs CUDA.*sdpa"):
        CLASSES[name](config=tiny_config("llama"), attn_implementation=attention)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        BaseModel(tmp_path)


def test_pickled_weights_are_not_needed_and_a_broken_folder_is_an_error(tmp_path):
    """PITFALL 30: no file that we write is a pickle."""
    Actor(config=tiny_config("llama")).save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model"):
        Actor(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_last_hidden_state_size_is_right_and_costs_no_forward_pass(family, monkeypatch):
    from transformers import PreTrainedModel

    expected = 16 if family == "opt" else 32
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a forward pass"))
        patch.setattr(PreTrainedModel, "to", lambda *a, **k: pytest.fail("a device move"))
        model = BaseModel(config=tiny_config(family))
    assert model.last_hidden_state_size == expected
    assert outputs(model, *padded(rows(), "right")).shape == (3, 7, expected)


def test_hidden_size_of_composite_and_unknown_configs():
    from transformers import PreTrainedConfig, T5Config

    config = PreTrainedConfig()
    config.text_config = tiny_config("gpt2")
    assert hidden_size(config) == 32
    assert hidden_size(T5Config(d_model=24)) == 24
    with pytest.raises(UserError, match="hidden_size"):
        hidden_size(PreTrainedConfig())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLASSES)
def test_resized_embeddings_keep_the_old_rows_and_are_saved(family, name, tmp_path):
    torch.manual_seed(0)
    model = CLASSES[name](config=tiny_config(family))
    before = model.transformer.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(new_num_tokens=VOCABULARY + 5)
    after = model.transformer.get_input_embeddings().weight
    assert torch.equal(after[:VOCABULARY], before)
    model.save_pretrained(tmp_path)
    again = CLASSES[name](tmp_path)
    assert again.config.vocab_size == model.config.vocab_size == VOCABULARY + 5
    assert outputs(again, *padded(rows() + [torch.tensor([VOCABULARY + 4])], "right")).isfinite().all()


@pytest.mark.parametrize("family", [pytest.param("opt"), *(f for f in FAMILIES if f != "opt")])
def test_disable_dropout_makes_two_forwards_in_training_mode_equal(family):
    """PITFALL 32: with dropout on, log-probs at sampling and in training differ."""
    torch.manual_seed(0)
    dropout = {"attention_dropout": 0.3} if family in ("llama", "qwen3", "mistral") else {}
    model = Actor(config=tiny_config(family, **dropout), attn_implementation="eager").train()
    ids, mask = padded(rows(), "right")
    assert not torch.equal(model(ids, mask), model(ids, mask)), "there is dropout to disable"
    disable_dropout(model)
    first = model(ids, mask)
    assert torch.equal(first, model(ids, mask))
    assert torch.equal(first, model.eval()(ids, mask))


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(name):
    torch.manual_seed(0)
    model = CLASSES[name](config=tiny_config("llama")).train()
    ids, mask = padded(rows(), "right")
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, mask).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.enable_gradient_checkpointing()
    assert model.transformer.is_gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def mapped_from(folder) -> list[tuple[int, int]]:
    """Addresses of this process that show the weights' files in a folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    areas = [line[0].split("-") for line in lines if line[-1].startswith(str(folder)) and "safetensors" in line[-1]]
    return [(int(start, 16), int(end, 16)) for start, end in areas]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells which files are mapped")
@pytest.mark.parametrize("plugin", ["zero1", "zero2", "zero2-offload", "gemini"])
def test_weights_in_the_working_precision_are_mapped_from_the_file_and_not_read_by_each_process(plugin, tmp_path):
    """So processes of a machine share what they load; the plugins then take their shards from it."""
    config = PluginConfig(plugin=plugin, precision="bf16")
    stored = Actor(config=tiny_config("llama"), dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path)
    actor = Actor(str(tmp_path), dtype=engine_class(config).loads_in(config))
    areas = mapped_from(tmp_path)
    outside = [
        name for name, p in actor.named_parameters() if not any(start <= p.data_ptr() < end for start, end in areas)
    ]
    assert areas and not outside
