"""LoRA: its settings are respected, value heads train, both kinds of folder open."""

import json
import warnings

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from tests.distributed.world import family_config
from tests.models.families import FAMILIES, padded, rows, tiny_config

BATCH = padded(rows(), "right")


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    Actor(config=tiny_config("llama")).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_noise(model):
    """Adapters start as the identity: give them something to say."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def assert_saved_and_merged(actor: Actor, expected: torch.Tensor, folder):
    """Both folders that an adapted model is saved as say what it says."""
    actor.save_pretrained(folder / "adapter")
    assert torch.equal(Actor(folder / "adapter").eval()(*BATCH), expected)
    actor.save_pretrained(folder / "merged", merge=True)
    merged = Actor(folder / "merged").eval()
    assert not merged.has_adapter
    torch.testing.assert_close(merged(*BATCH), expected, rtol=1e-4, atol=1e-5)


def test_alpha_scales_the_adapter(base):
    """PITFALL 21: W + alpha / rank B A, to the last digit."""
    for alpha in (4.0, 12.0):
        actor = with_noise(Actor(base, lora=LoraSettings(rank=2, alpha=alpha, target_modules=["q_proj"])))
        layer = actor.transformer.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == alpha / 2
        low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        x = torch.randn(3, 32)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + alpha / 2 * x @ low_rank.T)


def test_variants_are_those_of_their_papers(base):
    """rsLoRA's scale (2312.03732, eq. 7), and DoRA's rows of trained length (2402.09353, eq. 5), in float64."""
    x = torch.randn(3, 32)
    for variant in ("rslora", "dora"):
        settings = LoraSettings(rank=4, alpha=12.0, target_modules=["q_proj"], variant=variant)
        actor = with_noise(Actor(base, lora=settings))
        layer = actor.transformer.model.layers[0].self_attn.q_proj
        weight, a, b = (
            part.weight.double() for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
        )
        if variant == "rslora":
            expected = weight + 12.0 / 2 * b @ a
        else:
            length = layer.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(length.double(), weight.norm(dim=1), rtol=1e-5, atol=1e-6)  # at the start
            length.data.mul_(1.5)
            summed = weight + 12.0 / 4 * b @ a
            expected = length.double()[:, None] * summed / summed.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer(x).double(), x.double() @ expected.T, rtol=1e-4, atol=1e-5)


def test_dropout_is_applied_in_training_only(base):
    """PITFALL 21: the dropout that was asked for is there."""
    for dropout in (0.0, 0.5):
        actor = with_noise(Actor(base, lora=LoraSettings(rank=2, dropout=dropout)))
        assert torch.equal(actor(*BATCH), actor(*BATCH))
        actor.train()
        assert torch.equal(actor(*BATCH), actor(*BATCH)) == (dropout == 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class", [Critic, RewardModel])
def test_the_value_head_trains_and_nothing_else_but_adapters(family, model_class):
    """PITFALL 21: the head is not frozen by target modules."""
    torch.manual_seed(0)
    model = with_noise(model_class(config=tiny_config(family), lora=LoraSettings(rank=2)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"value_head.{name}" for name, _ in model.value_head.named_parameters()} < trainable
    assert all("lora_" in name or name.startswith("value_head") for name in trainable)
    model(*BATCH).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in trainable
    )


def test_adapters_are_off_for_the_reference(base):
    actor = with_noise(Actor(base, lora=LoraSettings(rank=2)))
    assert not torch.equal(actor(*BATCH), actor(*BATCH, adapter=False))
    assert torch.equal(actor(*BATCH, adapter=False), Actor(base).eval()(*BATCH))


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("model_class", [Actor, Critic, RewardModel])
def test_adapter_folder_round_trips_and_still_trains(base, model_class, variant, tmp_path):
    """PITFALL 21, PITFALL 30: adapter and value head are saved, as safetensors, without the frozen weights."""
    torch.manual_seed(2)
    model = with_noise(model_class(base, lora=LoraSettings(rank=2, alpha=8.0, dropout=0.25, variant=variant)))
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    assert "model.safetensors" not in names
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (2, 8.0, 0.25)
    again = model_class(folder)
    assert torch.equal(again.eval()(*BATCH), model(*BATCH))
    trainable = lambda m: {name for name, p in m.named_parameters() if p.requires_grad}  # noqa: E731
    assert trainable(again) == trainable(model)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("model_class", [Actor, Critic, RewardModel])
def test_merged_folder_is_a_plain_model(base, model_class, variant, tmp_path):
    """PITFALL 21: the merged weights give the outputs of base and adapter; the model in training keeps its adapter."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(2)
    model = with_noise(model_class(base, lora=LoraSettings(rank=2, variant=variant)))
    expected = model(*BATCH)
    model.save_pretrained(tmp_path / "merged", merge=True)
    assert torch.equal(model(*BATCH), expected)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = model_class(tmp_path / "merged").eval()
    assert not merged.has_adapter
    torch.testing.assert_close(merged(*BATCH), expected, rtol=1e-4, atol=1e-5)
    auto = AutoModelForCausalLM if model_class is Actor else AutoModel
    _, loading = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


def test_peft_opens_the_adapter_folder_by_itself(base, tmp_path):
    from peft import AutoPeftModelForCausalLM

    actor = with_noise(Actor(base, lora=LoraSettings(rank=2)))
    actor.save_pretrained(tmp_path / "adapter")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.stack(rows(lengths=(5, 5)))
    torch.testing.assert_close(plain(ids).logits, actor.run(ids, None).logits)


def test_gradient_checkpointing_reaches_the_adapters(base):
    actor = with_noise(Actor(base, lora=LoraSettings(rank=2))).train()
    actor.enable_gradient_checkpointing()
    actor(*BATCH).sum().backward()
    assert all(p.grad is not None for name, p in actor.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_modules_that_train_whole_are_saved_merged_and_off_for_the_reference(tied, tmp_path):
    """A tied output layer becomes one of its own."""
    torch.manual_seed(0)
    Actor(config=tiny_config("llama", tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")
    whole = ["embed_tokens", "lm_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        actor = with_noise(Actor(tmp_path / "base", lora=LoraSettings(rank=2, modules_to_save=whole)))
    trained = {name: p for name, p in actor.named_parameters() if p.requires_grad and "lora_" not in name}
    assert [name.split(".modules_to_save")[0].rpartition(".")[2] for name in trained] == whole
    for parameter in trained.values():
        parameter += 0.1 * torch.randn_like(parameter)
    expected = actor(*BATCH)
    assert not torch.allclose(expected, actor(*BATCH, adapter=False), atol=1e-3)
    assert torch.equal(actor(*BATCH, adapter=False), Actor(tmp_path / "base").eval()(*BATCH))
    assert_saved_and_merged(actor, expected, tmp_path)


def test_modules_to_save_that_match_nothing_are_named_where_there_is_a_head(base):
    with pytest.raises(UserError, match=r"lora_modules_to_save embeddings matches nothing; .* embed_tokens, .*lm_head"):
        Actor(base, lora=LoraSettings(rank=2, modules_to_save=["embeddings"]))
    critic = Critic(base, lora=LoraSettings(rank=2, modules_to_save=["embed_tokens", "lm_head"]))
    trained = [name for name, p in critic.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert len(trained) == 1 and "embed_tokens" in trained[0]


def test_target_modules_that_match_nothing_are_named(base):
    with pytest.raises(UserError, match=r"\['c_attn'\] match nothing.*q_proj"):
        Actor(base, lora=LoraSettings(rank=2, target_modules=["c_attn"]))


def test_an_adapter_without_its_base_is_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="base_model_name_or_path"):
        Actor(tmp_path)


def test_rank_zero_trains_all_weights(base):
    actor = Actor(base, lora=LoraSettings(rank=0))
    assert not actor.has_adapter
    assert all(p.requires_grad for p in actor.parameters())


EXPERTS = ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("names", [[], EXPERTS])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3", "gpt_oss"])
def test_adapters_beside_experts_and_of_experts_are_saved_and_merged(family, names, tmp_path):
    """Routers have none, experts only if they are named, and the start says so."""
    config = family_config(family, 60)
    torch.manual_seed(0)
    Actor(config=config).save_pretrained(tmp_path / "base")
    settings = LoraSettings(rank=2, target_modules=["all-linear", *names])
    model = with_noise(Actor(tmp_path / "base", lora=settings))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    assert any(name.endswith("self_attn.o_proj") for name in adapted)
    assert not [name for name in adapted if name.endswith(("mlp.gate", "mlp.router", "shared_expert_gate"))]
    assert any(".experts" in name for name in adapted) == bool(names)
    assert [note for note in model.notes if "add down_proj and gate_up_proj" in note] == [] or not names
    assert bool(names) or len(model.notes) == 1
    expected = model(*BATCH)
    assert not torch.allclose(expected, model(*BATCH, adapter=False), atol=1e-3)
    assert_saved_and_merged(model, expected, tmp_path)


def test_experts_take_plain_adapters_only(tmp_path):
    for changes in (dict(dropout=0.1), dict(variant="dora")):
        with pytest.raises(UserError, match=r"adapters of experts .*gate_up_proj.* neither lora_dropout nor"):
            Actor(config=family_config("mixtral", 60), lora=LoraSettings(rank=2, target_modules=EXPERTS, **changes))
