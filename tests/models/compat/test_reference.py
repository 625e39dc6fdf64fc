"""Reference models: frozen copies, whose shared layers are one storage."""

import copy

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor, create_reference_model
from tests.models.language_models import CAUSAL, batch_of, config_of, language_model, value_head_class

# layer -> how its parameters are named; embeddings and what else stands in front of the layers
LAYERS = {
    "gpt2": "transformer.h.",
    "bloom": "transformer.h.",
    "opt": "model.decoder.layers.",
    "gpt_neox": "gpt_neox.layers.",
}
LATE = ("final_layer_norm", "project_out", "ln_f", "model.norm.", "final_layernorm", "embed_out", "v_head")


def is_early(family: str, name: str, count: int) -> bool:
    """Whether a parameter is of the embeddings or the first `count` layers, told in another way than the code's."""
    stem = LAYERS.get(family, "model.layers.")
    if stem in name:
        return int(name.split(stem)[1].split(".")[0]) < count
    return not any(word in name for word in LATE) and not name.startswith(("lm_head", "pretrained_model.lm_head"))


def addresses(model) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_first_layers_are_one_storage_and_the_rest_a_copy(family, wrapped):
    model = language_model(family)
    model = value_head_class(family)(model) if wrapped else model
    reference = create_reference_model(model.train(), num_shared_layers=1)
    shared = {name for name, address in addresses(reference).items() if address == addresses(model)[name]}
    assert shared == {name for name in addresses(model) if is_early(family, name, 1)}
    assert any("0" in name for name in shared) and not any(".1." in name for name in shared)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == addresses(model).keys() - shared, "shared layers are frozen in the model too"
    assert model.training and not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def logits_of(model, batch):
    output = model(**batch)
    return output[0] if isinstance(output, tuple) else output.logits


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("shared", [None, 1])
def test_training_moves_the_model_and_not_its_reference(family, shared):
    model, batch = value_head_class(family)(language_model(family)), batch_of(family)
    reference = create_reference_model(model, shared, "decoder.block.{layer}" if family == "t5" else None)
    start, kept = logits_of(model, batch), logits_of(reference, batch)
    torch.testing.assert_close(kept, start)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits, _, values = model(**batch)
    (logits.square().mean() + values.square().mean()).backward()
    optimizer.step()
    assert not torch.equal(logits_of(model, batch), start)
    assert torch.equal(logits_of(reference, batch), kept)


def test_a_full_copy_shares_nothing_and_freezes_nothing():
    model = language_model("gpt2")
    reference = create_reference_model(model)
    assert not set(addresses(model).values()) & set(addresses(reference).values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert reference.lm_head.weight is reference.transformer.wte.weight


def test_tied_embeddings_are_shared_as_one():
    model = language_model("gpt2")
    reference = create_reference_model(model, num_shared_layers=0)
    assert reference.lm_head.weight is reference.transformer.wte.weight
    assert reference.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


def test_shared_layers_are_never_copied(monkeypatch):
    """A second copy that is thrown away afterwards would still need the memory."""
    model, copied = language_model("llama"), []
    plain = torch.nn.Parameter.__deepcopy__
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda p, memo: copied.append(id(p)) or plain(p, memo))
    create_reference_model(model, num_shared_layers=1)
    early = {id(p) for name, p in model.named_parameters() if is_early("llama", name, 1)}
    assert copied and not early & set(copied)


def test_moving_the_reference_leaves_the_model_alone():
    model = language_model("llama")
    create_reference_model(model, num_shared_layers=1).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_layer_ten_is_not_layer_one():
    model = language_model("llama", num_hidden_layers=12)
    shared = {n for n, a in addresses(create_reference_model(model, 10)).items() if a == addresses(model)[n]}
    assert shared == {name for name in addresses(model) if is_early("llama", name, 10)}


def test_our_actor_and_a_lora_model_have_references():
    from peft import LoraConfig, get_peft_model

    actor = Actor(config=config_of("llama"))
    reference = create_reference_model(actor, num_shared_layers=1)
    ids = batch_of("llama")["input_ids"]
    assert torch.equal(reference(ids), actor.eval()(ids))
    adapted = get_peft_model(language_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    kept = copy.deepcopy(adapted)
    reference = create_reference_model(adapted, num_shared_layers=1)
    assert torch.equal(reference(ids).logits, kept.eval()(ids).logits)


def test_own_patterns_are_used():
    from transformers import AutoModel

    model = AutoModel.from_config(config_of("gpt2"))
    reference = create_reference_model(model, num_shared_layers=1, pattern="h.{layer}")
    same = {n for n, a in addresses(reference).items() if a == addresses(model)[n]}
    assert same == {n for n in addresses(model) if n.startswith(("wte", "wpe", "h.0."))}


@pytest.mark.parametrize(
    ("count", "pattern", "message"),
    [
        (2, None, r"no layer 2 in LlamaForCausalLM, .* like model\.layers\..*transformer\.h\.\{layer\}, .*give the"),
        (-1, None, "no layer -1"),
        (1, "blocks.{layer}", r"tried blocks\.\{layer\}; share fewer layers or give the pattern"),
        (1, "model.layers.1", r"pattern 'model.layers.1' lacks \{layer\}"),
    ],
)
def test_layers_that_are_not_there_are_errors(count, pattern, message):
    model = language_model("llama")
    with pytest.raises(UserError, match=message):
        create_reference_model(model, count, pattern)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sharded_weights_are_an_error():
    model = language_model("llama")
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(UserError, match="sharded over processes"):
        create_reference_model(model)
