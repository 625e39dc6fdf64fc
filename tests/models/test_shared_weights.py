"""Frozen weights that models have in common are in memory once, and those that train or differ never are."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.models.shared_weights import SharedWeights
from tests.distributed.world import family_config
from tests.models.families import FAMILIES, padded, rows, tiny_config
from tests.models.test_lora import with_noise
from tests.models.test_quantized import quantized

BATCH = padded(rows(), "right")
LORA = LoraSettings(rank=2)


def storages(*models: nn.Module | nn.Parameter) -> dict[int, int]:
    """Bytes by address of the memory of models, or weights, with what quantized layers keep beside their weights."""
    tensors = [p for model in models for p in ([model] if isinstance(model, nn.Parameter) else model.parameters())]
    states = [p.quant_state for p in tensors if hasattr(p, "quant_state")]
    tensors += [value for state in states for value in (state.absmax, *(s.absmax for s in [state.state2] if s))]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def frozen(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if not p.requires_grad]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def make_base(folder, family: str = "llama", seed: int = 0, **sizes) -> str:
    torch.manual_seed(seed)
    Actor(config=tiny_config(family, **sizes)).save_pretrained(folder)
    return str(folder)


def three_roles(base: str, folder) -> list:
    """A policy and a critic that get new adapters, and a reward model that is an adapter's folder."""
    with_noise(RewardModel(base, lora=LORA)).save_pretrained(folder)
    models = [Actor(base, lora=LORA), Critic(base, lora=LORA), RewardModel(folder)]
    return [with_noise(model) for model in models]


def outputs(models) -> list[torch.Tensor]:
    return [model(*BATCH) for model in models]


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_is_one_base_and_all_adapters_and_heads(family, tmp_path):
    """Also where the policy's output layer is one that the others lack."""
    models = three_roles(make_base(tmp_path / "base", family), tmp_path / "reward")
    expected, before, base = outputs(models), storages(*models), storages(Actor(tmp_path / "base"))
    own = sum(p.nbytes for model in models for p in trained(model))
    shared = SharedWeights()
    saved = [shared.share(model) for model in models]
    assert saved[0] == 0 and saved[1] == saved[2] == sum(p.nbytes for p in frozen(models[1])) > 0
    assert sum(storages(*models).values()) == sum(base.values()) + own == sum(before.values()) - sum(saved)
    assert all(torch.equal(*pair) for pair in zip(outputs(models), expected, strict=True))


def test_a_weight_that_differs_in_one_bit_is_a_model_s_own(tmp_path):
    """The others are shared; 0 and -0 are different ones, though equal."""
    base = make_base(tmp_path / "base")
    for bit, layer in ((1, "up_proj"), (-(2**31), "down_proj")):
        one, other = Actor(base, lora=LORA), Critic(base, lora=LORA)
        weights = [model.transformer.base_model.layers[1].mlp.get_submodule(layer) for model in (one, other)]
        with torch.no_grad():
            for part in weights:
                part.weight.view(-1)[5] = 0.0
            weights[1].weight.view(-1).view(torch.int32)[5] ^= bit
        shared = SharedWeights()
        shared.share(one)
        saved = shared.share(other)
        assert saved == sum(p.nbytes for p in frozen(other)) - weights[1].weight.nbytes
        assert storages(weights[0]).keys().isdisjoint(storages(weights[1]))


def test_models_of_another_base_share_with_their_own_kind(tmp_path):
    bases = [make_base(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    models = [Actor(bases[0], lora=LORA), Critic(bases[1], lora=LORA), RewardModel(bases[1], lora=LORA)]
    shared = SharedWeights()
    saved = [shared.share(model) for model in models]
    assert saved[1] == sum(p.nbytes for p in frozen(models[1]) if p.ndim == 1), "norms begin as ones"
    assert saved[2] == sum(p.nbytes for p in frozen(models[2]))


def test_a_base_is_the_same_whatever_its_adapters_wrap(tmp_path):
    """Other layers, embeddings that train whole or in part, experts."""
    base = make_base(tmp_path / "base")
    models = [Critic(base).requires_grad_(False)]
    for more in ({}, dict(modules_to_save=["embed_tokens"]), dict(trainable_token_indices=[1, 2])):
        models.append(Actor(base))
        models[-1].model = get_peft_model(models[-1].model, LoraConfig(target_modules=["q_proj"], **more))
    shared = SharedWeights()
    saved = [shared.share(model) for model in models]
    head = models[1].transformer.get_output_embeddings().weight
    assert saved[1:] == [sum(p.nbytes for p in frozen(models[1])) - n for n in (head.nbytes, 0, 0)]

    torch.manual_seed(0)
    Actor(config=family_config("mixtral", 60)).save_pretrained(tmp_path / "experts")
    shared, experts = SharedWeights(), LoraSettings(2, target_modules=["all-linear", "gate_up_proj", "down_proj"])
    models = [Actor(tmp_path / "experts", lora=LORA), Critic(tmp_path / "experts", lora=experts)]
    assert [shared.share(model) for model in models] == [0, sum(p.nbytes for p in frozen(models[1]))]
    assert models[1](*BATCH).isfinite().all()


def test_weights_that_train_are_never_shared(tmp_path):
    """Neither with those of another model that trains, nor with equal ones that are frozen."""
    base = make_base(tmp_path / "base")
    shared = SharedWeights()
    models = [Actor(base).requires_grad_(False), Actor(base), Critic(base), Actor(base, lora=LORA)]
    saved = [shared.share(model) for model in models]
    assert saved == [0, 0, 0, sum(p.nbytes for p in frozen(models[3]))]
    for i, model in enumerate(models[1:], 1):
        of_others = storages(*models[:i], *models[i + 1 :])
        assert not any(p.untyped_storage().data_ptr() in of_others for p in trained(model))


def test_tied_ends_stay_tied(tmp_path):
    """Whichever model comes first: the one with an output layer, or the one without."""
    base = make_base(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    for classes in ((Actor, Critic), (Critic, Actor), (Actor, Actor)):
        models = [model_class(base, lora=LORA) for model_class in classes]
        shared = SharedWeights()
        saved = [shared.share(model) for model in models]
        assert saved == [0, sum(p.nbytes for p in frozen(models[1]))]
        for model in models:
            head = model.transformer.get_output_embeddings()
            assert head is None or head.weight is model.transformer.get_input_embeddings().weight


def test_a_base_that_an_engine_has_narrowed_is_shared_with_models_that_come_wide(tmp_path):
    base = make_base(tmp_path / "base")
    one, other = Actor(base, lora=LORA), Critic(base, lora=LORA)
    for parameter in frozen(one):
        parameter.data = parameter.data.to(torch.bfloat16)
    shared = SharedWeights()
    shared.share(one)
    assert shared.share(other) > 0
    assert {p.dtype for p in frozen(other)} == {torch.bfloat16}
    assert {p.dtype for p in trained(other)} == {torch.float32}


def test_merging_one_model_s_adapter_leaves_the_others(tmp_path):
    models = three_roles(make_base(tmp_path / "base"), tmp_path / "reward")
    shared = SharedWeights()
    for model in models:
        shared.share(model)
    expected = outputs(models)
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i), merge=True)
        assert all(torch.equal(*pair) for pair in zip(outputs(models), expected, strict=True))
        again = type(model)(tmp_path / str(i)).eval()
        torch.testing.assert_close(again(*BATCH), expected[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested"])
@torch.no_grad()
def test_a_base_in_4_bits_is_in_memory_once(kind, tmp_path):
    """With the scales of its blocks. A base whose scales differ is another one."""
    base = quantized(tmp_path, kind)
    models = three_roles(base, tmp_path / "reward")
    ids = torch.stack(rows(lengths=(9, 9)))
    expected = [model.eval()(ids) for model in models]
    own = sum(p.nbytes for model in models for p in trained(model))
    other = Critic(base, lora=LORA)
    weight = other.transformer.layers[0].mlp.up_proj.base_layer.weight
    weight.quant_state.absmax.view(torch.uint8)[0] ^= 1
    alone = sum(storages(Actor(base, lora=LORA).requires_grad_(False)).values())
    alone -= sum(p.nbytes for p in trained(models[0]))
    shared = SharedWeights()
    for model in models:
        shared.share(model)
    assert sum(storages(*models).values()) == alone + own
    assert all(torch.equal(model(ids), output) for model, output in zip(models, expected, strict=True))
    assert shared.share(other) == sum(p.nbytes for p in frozen(other)) - weight.nbytes
    for model in models:
        for module in model.modules():
            if hasattr(module, "quant_state"):
                assert module.quant_state is module.weight.quant_state


def test_of_8_bits_only_what_is_not_quantized_is_shared(tmp_path):
    """These layers keep more than their weights, and take them apart when they first compute."""
    base = quantized(tmp_path, "8 bits")
    one, other = Actor(base, lora=LORA), Critic(base, lora=LORA)
    shared = SharedWeights()
    shared.share(one)
    assert shared.share(other) == sum(p.nbytes for p in frozen(other) if type(p) is nn.Parameter)


def test_a_model_that_is_gone_leaves_nothing(tmp_path):
    """Such as a reference whose log-probs have been computed once and for all."""
    base = make_base(tmp_path / "base")
    shared = SharedWeights()
    model = Actor(base).requires_grad_(False)
    shared.share(model)
    weights = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    assert shared.share(Critic(base, lora=LORA)) == 0
