"""Value-head models: what they compute, what they save, what they refuse. test_trl.py compares with TRL."""

import copy
import json
import logging

import pytest
import torch
from torch import nn

from coati.errors import UserError
from coati.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, ValueHead
from coati.models.value_head import load_head
from tests.models.language_models import CAUSAL, SEQ2SEQ, batch_of, config_of, language_model, value_head_class

FAMILIES = CAUSAL + SEQ2SEQ


def make(family: str, **head):
    """A tiny value-head model in eval mode, whose head is large enough to see."""
    model = value_head_class(family)(language_model(family), **{"v_head_init_strategy": "normal", **head})
    return model.eval()


def last_hidden(family: str, output) -> torch.Tensor:
    return (output.decoder_hidden_states if family in SEQ2SEQ else output.hidden_states)[-1]


def same_outputs(ours, theirs, **tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_the_base_models_and_values_the_heads(family):
    model, batch = make(family), batch_of(family)
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    logits, loss, values = model(**batch, labels=labels)
    base = model.pretrained_model(**batch, labels=labels, output_hidden_states=True)
    assert torch.equal(logits, base.logits)
    assert torch.equal(loss, base.loss)
    hidden = last_hidden(family, base)
    expected = hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias
    assert values.shape == labels.shape
    assert values.std() > 0.01
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert model(**batch)[1] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_returned_on_request_and_continues_the_sequence(family):
    model, batch = make(family), batch_of(family)
    assert len(model(**batch)) == 3
    logits, _, values = model(**batch)
    name = "decoder_input_ids" if family in SEQ2SEQ else "input_ids"
    first, rest = {name: batch[name][:, :3]}, {name: batch[name][:, 3:]}
    if family not in SEQ2SEQ:
        first["attention_mask"] = batch["attention_mask"][:, :3]
    *_, cache = model(**{**batch, **first}, return_past_key_values=True)
    again = model(**{**batch, **rest}, past_key_values=cache)
    real = batch["attention_mask"][:, 3:].bool() if family not in SEQ2SEQ else torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(again[0][real], logits[:, 3:][real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again[2][real], values[:, 3:][real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_has_the_base_models_names_and_loads_strictly(family):
    model = make(family)
    state = model.state_dict()
    assert state.keys() == model.pretrained_model.state_dict().keys() | {"v_head.summary.weight", "v_head.summary.bias"}
    other = value_head_class(family)(language_model(family, seed=1)).eval()
    assert not other.load_state_dict(state).missing_keys
    same_outputs(other(**batch_of(family)), model(**batch_of(family)))
    for wrong in ({**state, "more": torch.zeros(1)}, {k: v for k, v in state.items() if "summary.bias" not in k}):
        with pytest.raises(RuntimeError, match=r"more|summary\.bias"):
            other.load_state_dict(wrong)
        other.load_state_dict(wrong, strict=False)


def as_bin(folder, sharded: bool):
    """Turns a folder with safetensors into one as older releases wrote it."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    places = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
    for place in set(places.values()):
        torch.save({name: state[name] for name in names if places[name] == place}, folder / place)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_whole_and_opens_in_plain_transformers(family, kind, tmp_path):
    import transformers

    model, batch = make(family), batch_of(family)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if kind == "sharded safetensors" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (kind == "sharded safetensors")
    if "bin" in kind:
        as_bin(tmp_path, "sharded" in kind)
    again = type(model).from_pretrained(tmp_path)
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    same_outputs(again(**batch), model(**batch))
    if kind in ("safetensors", "sharded safetensors"):
        auto = getattr(transformers, model.auto_class)
        plain, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert info["unexpected_keys"] == {"v_head.summary.weight", "v_head.summary.bias"}
        assert torch.equal(plain(**batch).logits, model(**batch)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_stays_float32_under_a_bf16_model(family, tmp_path):
    make(family).save_pretrained(tmp_path)
    model, batch = value_head_class(family).from_pretrained(tmp_path, dtype=torch.bfloat16), batch_of(family)
    assert model.dtype == torch.bfloat16
    assert model.v_head.summary.weight.dtype == torch.float32
    logits, _, values = model(**batch)
    assert (logits.dtype, values.dtype) == (torch.float32, torch.float32)
    hidden = last_hidden(family, model.pretrained_model(**batch, output_hidden_states=True))
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(values, model.v_head.summary(hidden.float()).squeeze(-1))
    moved = model.to(torch.bfloat16)
    assert moved.v_head.summary.weight.dtype == torch.bfloat16
    assert moved(**batch)[2].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_what_the_base_model_generates(family):
    model, batch = make(family), batch_of(family)
    ids = batch["input_ids"][:1]
    ours = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert ours.shape[1] == (6 if family in SEQ2SEQ else ids.shape[1] + 5)
    assert torch.equal(ours, model.pretrained_model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False))


# --- the head


def test_dropout_is_the_configs_then_the_keywords_then_a_tenth():
    config = config_of("gpt2")
    assert ValueHead(config).dropout.p == 0.1
    assert ValueHead(config, summary_dropout_prob=0.3).dropout.p == 0.3
    config.summary_dropout_prob = 0.7
    assert ValueHead(config, summary_dropout_prob=0.3).dropout.p == 0.7


def test_dropout_acts_in_training_only():
    model, batch = make("gpt2", summary_dropout_prob=0.5), batch_of("gpt2")
    assert torch.equal(model(**batch)[2], model(**batch)[2])
    model.v_head.train()
    assert not torch.equal(model(**batch)[2], model(**batch)[2])


def test_normal_init_has_the_asked_spread():
    torch.manual_seed(0)
    config = config_of("llama", hidden_size=4096)
    for spread in (0.2, 0.01):
        head = ValueHead(config, v_head_init_strategy="normal", v_head_initializer_range=spread)
        assert head.summary.weight.std().item() == pytest.approx(spread, rel=0.1)
        assert head.summary.bias.item() == 0
    assert ValueHead(config, v_head_init_strategy="normal").summary.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert ValueHead(config).summary.weight.abs().max() <= 1 / 64, "nn.Linear's own bound, 1 / sqrt(width)"


def test_an_unknown_init_strategy_is_an_error():
    with pytest.raises(UserError, match="v_head_init_strategy is 'xavier': give None or 'normal'"):
        make("gpt2", v_head_init_strategy="xavier")


def test_the_width_is_found_under_its_many_names():
    from types import SimpleNamespace as Config

    assert ValueHead(Config(hidden_size=8, word_embed_proj_dim=4)).summary.in_features == 4
    assert ValueHead(Config(hidden_size=8)).summary.in_features == 8
    assert ValueHead(Config(decoder=Config(hidden_size=6))).summary.in_features == 6
    assert ValueHead(Config(text_config=Config(hidden_size=5))).summary.in_features == 5
    with pytest.raises(UserError, match="SimpleNamespace has no hidden_size"):
        ValueHead(Config())


# --- loading


def test_a_checkpoint_without_a_head_gets_a_new_one_and_a_warning(tmp_path, caplog):
    language_model("llama").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert [r.message for r in caplog.records if "no value head" in r.message and str(tmp_path) in r.message]
    assert model.v_head.summary.weight.requires_grad
    assert load_head(tmp_path) is None


def test_a_checkpoint_with_a_head_loads_without_a_word(tmp_path, caplog, capfd):
    make("llama").save_pretrained(tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert not caplog.records
    assert "v_head" not in "".join(capfd.readouterr())


def test_from_pretrained_takes_a_model_and_the_heads_keywords():
    base = language_model("gpt2")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, summary_dropout_prob=0.4)
    assert model.pretrained_model is base
    assert model.v_head.dropout.p == 0.4
    assert (model.config, model.device, model.is_peft_model) == (base.config, base.device, False)


def test_a_model_without_language_model_head_or_of_the_other_kind_is_an_error():
    from transformers import AutoModel, AutoModelForSequenceClassification

    causal, seq2seq = AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
    llama, t5 = config_of("llama"), config_of("t5")
    for model_class, model in (
        (causal, AutoModel.from_config(llama)),
        (causal, AutoModelForSequenceClassification.from_config(llama)),
        (seq2seq, AutoModel.from_config(t5)),
        (causal, language_model("t5")),
        (seq2seq, language_model("llama")),
    ):
        with pytest.raises(UserError, match=f"{type(model).__name__} is no language model"):
            model_class(model)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), 7, None], ids=str)
def test_what_is_no_model_is_an_error(wrong):
    with pytest.raises(UserError, match="a value head goes on a transformers model"):
        AutoModelForCausalLMWithValueHead.from_pretrained(wrong)


def test_a_head_of_another_width_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    make("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors") | {"v_head.summary.weight": torch.zeros(1, 5)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"the value head in {tmp_path} doesn't fit LlamaConfig: size mismatch"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_weights_of_another_architecture_are_an_error(tmp_path):
    make("llama").save_pretrained(tmp_path)
    config_of("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"the checkpoint in {tmp_path} lacks .* weights of GPT2LMHeadModel"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't load a model from nowhere/at-all"):
        AutoModelForCausalLMWithValueHead.from_pretrained("nowhere/at-all")


def test_weights_of_another_size_are_an_error(tmp_path):
    make("llama").save_pretrained(tmp_path)
    config_of("llama", intermediate_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"the weights in {tmp_path} don't fit its config: .*mlp"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_base_checkpoint_without_its_prefix_keeps_its_head(tmp_path):
    """The gpt2 of the hub has the decoder's weights only, without `transformer.`; what we save of it has a head."""
    from transformers import AutoModel

    torch.manual_seed(0)
    AutoModel.from_config(config_of("gpt2")).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "headed")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "headed")
    same_outputs(again(**batch_of("gpt2")), model(**batch_of("gpt2")))


# --- being a module


@pytest.mark.parametrize("family", ["gpt2", "gemma", "t5", "bart"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    model = make(family, summary_dropout_prob=0.0)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path), copy.deepcopy(model)):
        each.load_state_dict(each.state_dict())
        assert each.get_input_embeddings().weight is each.get_output_embeddings().weight


def test_it_can_be_part_of_another_module():
    """Names are hidden and restored wherever it stands."""
    outer = nn.ModuleDict({"policy": make("llama")})
    state = outer.state_dict()
    assert "policy.model.embed_tokens.weight" in state and "policy.v_head.summary.bias" in state
    other = nn.ModuleDict({"policy": AutoModelForCausalLMWithValueHead(language_model("llama", seed=1)).eval()})
    other.load_state_dict(state)
    same_outputs(other["policy"](**batch_of("llama")), outer["policy"](**batch_of("llama")))


def test_saving_takes_a_given_state_dict_and_leaves_it_alone(tmp_path):
    model, state = make("gpt2"), make("gpt2").state_dict()
    given = {name: value + 1 for name, value in state.items()}
    given["lm_head.weight"] = given["transformer.wte.weight"]
    names = list(given)
    model.save_pretrained(save_directory=tmp_path, state_dict=given)
    assert list(given) == names
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], given[name]) for name in names)


def test_modes_go_together():
    """TRL leaves the head's dropout on after from_pretrained."""
    base = language_model("gpt2")
    assert not AutoModelForCausalLMWithValueHead(base).v_head.training
    assert AutoModelForCausalLMWithValueHead(base.train()).v_head.training


def test_gradient_checkpointing_and_input_gradients_are_the_base_models():
    model, batch = make("llama", summary_dropout_prob=0.0).train(), batch_of("llama")

    def gradients():
        model.zero_grad()
        logits, _, values = model(**batch)
        (logits.square().mean() + values.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing and model.pretrained_model.is_gradient_checkpointing
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])
    model.gradient_checkpointing_disable()
    assert not model.pretrained_model.is_gradient_checkpointing
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(batch["input_ids"]).requires_grad
    assert model.prepare_inputs_for_generation == model.pretrained_model.prepare_inputs_for_generation
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


@pytest.mark.parametrize("adapters", [False, True])
def test_push_to_hub_uploads_what_save_pretrained_writes(adapters, monkeypatch):
    """TRL loses the head of a model with adapters here."""
    from pathlib import Path

    import transformers.utils.hub as hub

    pushed = {}

    def upload(self, folder, repo_id, *args, **kwargs):
        pushed[repo_id] = {path.name for path in Path(folder).iterdir()} - {"generation_config.json", "README.md"}
        pushed["head"] = load_head(folder)

    class Api:
        def create_repo(self, name, **kwargs):
            return type("Repo", (), {"repo_id": name})

    class Card:
        def save(self, path):
            assert path

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = with_adapter("llama") if adapters else make("llama")
    model.push_to_hub("someone/model")
    expected = {"adapter_config.json", "adapter_model.safetensors"} if adapters else {"config.json"}
    assert pushed["someone/model"] == expected | {"model.safetensors"}
    assert torch.equal(pushed["head"]["v_head.summary.weight"], model.v_head.summary.weight)


# --- as TRL 0.11

CLASSES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)


def test_class_attributes_are_trls():
    """REPORT 33: by class and by instance; a subclass may give its own."""
    import transformers

    heads = ("lm_head", "embed_out")
    expected = [(transformers.AutoModelForCausalLM, heads)]
    expected += [(transformers.AutoModelForSeq2SeqLM, (*heads, "output_projection"))]
    for model_class, family, (parent, namings) in zip(CLASSES, ("gpt2", "t5"), expected, strict=True):
        for owner in (model_class, make(family)):
            assert owner.transformers_parent_class is parent
            assert tuple(owner.lm_head_namings) == namings
            assert set(owner.supported_args) == {
                "summary_dropout_prob",
                "v_head_initializer_range",
                "v_head_init_strategy",
            }


def test_a_subclass_loads_by_its_own_parent_class(tmp_path):
    """REPORT 33: the attribute is what `from_pretrained` loads with."""
    import transformers

    class OfGPT2(AutoModelForCausalLMWithValueHead):
        transformers_parent_class = transformers.GPT2LMHeadModel

    language_model("gpt2").save_pretrained(tmp_path / "gpt2")
    assert isinstance(OfGPT2.from_pretrained(tmp_path / "gpt2").pretrained_model, transformers.GPT2LMHeadModel)
    with pytest.raises(UserError, match="no language model with a language model head that GPT2LMHeadModel would load"):
        OfGPT2(transformers.AutoModel.from_config(config_of("gpt2")))


def test_a_head_is_found_by_its_name_where_the_model_does_not_say(monkeypatch):
    """REPORT 33: that is what `lm_head_namings` is for."""
    base = language_model("gpt_neox")
    monkeypatch.setattr(type(base), "get_output_embeddings", lambda self: None)
    assert AutoModelForCausalLMWithValueHead(base).v_head.summary.weight.device.type == "cpu"


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_init_weights_draws_the_head_anew(family):
    """REPORT 33."""
    model = make(family)
    before = model.v_head.summary.weight.clone()
    model._init_weights()
    assert torch.equal(model.v_head.summary.weight, before)
    model._init_weights(v_head_init_strategy="normal", v_head_initializer_range=7.0, summary_dropout_prob=0.3)
    assert model.v_head.summary.weight.std() > 2
    assert model.v_head.summary.bias == 0
    with pytest.raises(UserError, match="'xavier': give None or 'normal'"):
        model._init_weights(v_head_init_strategy="xavier")


@pytest.mark.parametrize(
    ("dropout", "kind"), [(0, nn.Identity), (0.0, nn.Identity), (None, nn.Identity), (0.2, nn.Dropout)]
)
def test_no_dropout_is_no_layer(dropout, kind):
    """REPORT 33: from the keyword and from the config."""
    assert type(ValueHead(config_of("gpt2"), summary_dropout_prob=dropout).dropout) is kind
    config = config_of("llama")
    config.summary_dropout_prob = dropout
    assert type(ValueHead(config).dropout) is kind
    assert type(make("gpt2", summary_dropout_prob=dropout).v_head.dropout) is kind


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_head_that_the_base_carries_is_taken_over(family, adapters):
    """REPORT 33: all-linear adapters are for the language model, not for its head."""
    base = language_model(family)
    base.v_head = ValueHead(base.config, v_head_init_strategy="normal")
    expected = {name: tensor.clone() for name, tensor in base.v_head.state_dict().items()}
    names = set(language_model(family).state_dict())
    options = {"peft_config": lora()} if adapters else {}
    model = value_head_class(family).from_pretrained(base, **options).eval()
    assert all(torch.equal(model.v_head.state_dict()[name], tensor) for name, tensor in expected.items())
    if not adapters:
        assert set(model.state_dict()) == names | {f"v_head.{name}" for name in expected}
    assert not [name for name, _ in model.named_parameters() if "v_head" in name and "lora" in name]


def test_a_head_of_another_shape_on_the_base_is_refused():
    """REPORT 33."""
    base = language_model("gpt2")
    base.v_head = nn.Linear(32, 1)
    with pytest.raises(UserError, match="the value head in GPT2LMHeadModel doesn't fit"):
        AutoModelForCausalLMWithValueHead.from_pretrained(base)


@pytest.mark.parametrize("adapters", [False, True])
def test_push_to_hub_calls_the_base_models_with_its_head_on_it(adapters, monkeypatch, tmp_path):
    """REPORT 33: positional and keyword arguments get through; afterwards states are what they were."""
    model = with_adapter("llama") if adapters else make("llama")
    before, calls = set(model.state_dict()), []

    def push(self, *args, **kwargs):
        assert self.v_head is model.v_head
        self.save_pretrained(str(tmp_path))
        calls.append((self, args, kwargs))
        return "address"

    monkeypatch.setattr(type(model.pretrained_model), "push_to_hub", push)
    assert model.push_to_hub("someone/model", private=True, commit_message="first") == "address"
    [(base, args, kwargs)] = calls
    assert base is model.pretrained_model
    assert (args, kwargs) == (("someone/model",), {"private": True, "commit_message": "first"})
    assert torch.equal(load_head(tmp_path)["v_head.summary.weight"], model.v_head.summary.weight)
    assert set(model.state_dict()) == before
    assert not model.load_state_dict(model.state_dict()).missing_keys
    assert "save_pretrained" not in vars(model.pretrained_model)


def test_errors_have_trls_words(tmp_path):
    """REPORT 33: those that its users search for."""
    import peft

    load = AutoModelForCausalLMWithValueHead.from_pretrained
    language_model("llama").save_pretrained(tmp_path)
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    cases = {
        "PreTrainedModel": lambda: load(17),
        "PeftModel": lambda: load(language_model("llama"), reward_adapter=str(tmp_path)),
        "reward modeling adapter": lambda: make("llama").compute_reward_score(torch.tensor([[3, 4]])),
        "PromptLearningConfig": lambda: load(language_model("llama"), peft_config=tuning),
        "peft.PeftConfig": lambda: load(language_model("llama"), peft_config=3),
        "string": lambda: load(language_model("llama"), peft_config=lora(), reward_adapter=tmp_path),
        "language model head": lambda: AutoModelForCausalLMWithValueHead(language_model("t5")),
    }
    for words, call in cases.items():
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_contradictory_generation_config_does_not_stop_a_save(family, tmp_path, caplog):
    """REPORT 1: with a warning that says what was changed."""
    language_model(family).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9, "top_p": 0.6}))
    with caplog.at_level(logging.WARNING):
        model = value_head_class(family).from_pretrained(tmp_path / "base")
    assert "do_sample" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["top_p"] == 0.6


# --- adapters


def lora(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **settings})


def with_adapter(family: str, source=None, **settings):
    torch.manual_seed(3)
    task = "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"
    source = language_model(family) if source is None else source
    peft_config = lora(task_type=task, **settings)
    model = value_head_class(family).from_pretrained(source, peft_config=peft_config, v_head_init_strategy="normal")
    return model.eval()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "t5"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_adapter_and_head_round_trip_beside_each_other(family, is_trainable, tmp_path):
    """The head always trains, and "all-linear" leaves it alone."""
    language_model(family).save_pretrained(tmp_path / "base")
    model, batch = with_adapter(family, tmp_path / "base"), batch_of(family)
    assert not [name for name, _ in model.v_head.named_parameters() if "lora" in name]
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    plain = value_head_class(family).from_pretrained(tmp_path / "base")
    assert not torch.equal(plain(**batch)[0], model(**batch)[0])
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
    again = value_head_class(family).from_pretrained(tmp_path / "adapter", is_trainable=is_trainable)
    assert again.is_peft_model
    same_outputs(again(**batch), model(**batch))
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert {"v_head.summary.weight", "v_head.summary.bias"} <= trainable
    assert any("lora_" in name for name in trainable) == is_trainable


def test_plain_peft_and_transformers_open_the_adapter_folder(tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    language_model("llama").save_pretrained(tmp_path / "base")
    model, batch = with_adapter("llama", tmp_path / "base"), batch_of("llama")
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        plain = auto.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(plain(**batch).logits, model(**batch)[0])


def test_a_wrapped_peft_model_works_without_from_pretrained():
    from peft import get_peft_model

    base, batch = language_model("llama"), batch_of("llama")
    model = AutoModelForCausalLMWithValueHead(get_peft_model(base, lora(task_type="CAUSAL_LM")).eval())
    assert model.is_peft_model and model.active_adapter == "default"
    state = model.state_dict()
    assert any("lora_" in name for name in state), "TRL leaves adapters out of the state dict"
    model.load_state_dict(state)
    same_outputs(
        model(**batch)[:2], AutoModelForCausalLMWithValueHead.from_pretrained(model.pretrained_model)(**batch)[:2]
    )


def test_the_adapter_and_the_head_learn(tmp_path):
    model, batch = with_adapter("llama").train(), batch_of("llama")
    logits, _, values = model(**batch)
    (logits.square().mean() + values.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "v_head" in name), name


def test_adapters_on_four_bit_weights_are_prepared_for_training(tmp_path):
    from transformers import BitsAndBytesConfig

    language_model("llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded = {}
    for checkpointing in (False, True):
        loaded[checkpointing] = model = AutoModelForCausalLMWithValueHead.from_pretrained(
            tmp_path, quantization_config=bits, peft_config=lora(), use_gradient_checkpointing=checkpointing
        )
        assert model.is_gradient_checkpointing == checkpointing
        assert model.v_head.summary.weight.dtype == torch.float32
        assert {p.dtype for name, p in model.named_parameters() if "norm" in name} == {torch.float32}
    logits, _, values = loaded[False](**batch_of("llama"))
    (logits.square().mean() + values.square().mean()).backward()
    trainable = [p for p in loaded[False].parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None for p in trainable)


def test_weights_off_the_devices_are_an_error(tmp_path):
    """A device map that only says where all weights are is none."""
    make("llama").save_pretrained(tmp_path)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    assert load(tmp_path, device_map={"": "cpu"}).device == torch.device("cpu")
    with pytest.raises(UserError, match="weights of LlamaForCausalLM are offloaded"):
        load(tmp_path, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "rest")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_and_prefix_tuning_are_errors(kind):
    import peft

    base = language_model("llama")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match=f"{kind}: prompt and prefix tuning don't work"):
        AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=config)
    with pytest.raises(UserError, match=f"{kind}: prompt and prefix tuning don't work"):
        AutoModelForCausalLMWithValueHead(peft.get_peft_model(base, config))


def test_a_peft_config_that_is_none_is_an_error():
    with pytest.raises(UserError, match="peft_config is a dict: give a peft config such as LoraConfig"):
        AutoModelForCausalLMWithValueHead.from_pretrained(language_model("llama"), peft_config={"r": 2})


def test_a_second_adapter_is_ignored_with_a_warning(caplog):
    model = with_adapter("llama")
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLMWithValueHead.from_pretrained(model.pretrained_model, peft_config=lora(r=7))
    assert "peft_config is ignored" in caplog.text
    assert model.peft_config["default"].r == 2


# --- reward adapters


@pytest.fixture
def reward_adapter(tmp_path):
    """A folder with an adapter trained as a sequence classifier on llama, and that classifier."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    language_model("llama").save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = lora(task_type="SEQ_CLS", lora_dropout=0.5, target_modules=["q_proj", "up_proj"])
    classifier = get_peft_model(classifier, config).eval()
    classifier.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward", classifier


def snapshot(model):
    """What computing a score must leave alone."""
    modes = {name: module.training for name, module in model.named_modules()}
    adapters = (model.active_adapter, model.active_adapters)
    return adapters, modes, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_reward_scores_are_the_classifiers_and_the_policy_stays_as_it_was(reward_adapter, training):
    folder, classifier = reward_adapter
    batch = batch_of("llama")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder.parent / "base", peft_config=lora(task_type="CAUSAL_LM", lora_dropout=0.5), reward_adapter=str(folder)
    ).train(training)
    model.pretrained_model.base_model.model.lm_head.eval()
    before = snapshot(model.pretrained_model)
    scores = model.compute_reward_score(**batch)
    assert snapshot(model.pretrained_model) == before
    assert before[0] == ("default", ["default"])
    assert (scores.shape, scores.dtype, scores.requires_grad) == ((2, 6, 1), torch.float32, False)
    last = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(scores[torch.arange(2), last], classifier(**batch).logits)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "reward_adapter" in name]


def test_a_failing_forward_leaves_the_policy_as_it_was_too(reward_adapter):
    folder, _ = reward_adapter
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder.parent / "base", peft_config=lora(task_type="CAUSAL_LM"), reward_adapter=str(folder)
    ).train()
    before = snapshot(model.pretrained_model)
    with pytest.raises((RuntimeError, IndexError)):
        model.compute_reward_score(torch.tensor([[10_000]]))
    assert snapshot(model.pretrained_model) == before


def test_scores_are_float32_under_a_bf16_model(reward_adapter):
    folder, _ = reward_adapter
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder.parent / "base", peft_config=lora(), reward_adapter=str(folder), dtype=torch.bfloat16
    )
    scores = model.compute_reward_score(**batch_of("llama"))
    assert (model.dtype, model.score.weight.dtype, scores.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("kind", [dict(lora_bias=True), dict(bias="all"), dict(bias="lora_only")], ids=str)
def test_only_biases_of_its_own_are_in_a_reward_adapter(tmp_path, kind):
    """REPORT 2: TRL takes any bias for the score's. Those of the base model are the policy's too: loading them would
    change it."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    language_model("llama", attention_bias=True).save_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    config = lora(task_type="SEQ_CLS", target_modules=["q_proj"], **kind)
    classifier = get_peft_model(classifier, config).eval()
    classifier.save_pretrained(tmp_path / "biased")
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    options = dict(peft_config=lora(task_type="CAUSAL_LM"), reward_adapter=str(tmp_path / "biased"))
    if "bias" in kind:
        with pytest.raises(UserError, match="trains biases of the base model"):
            load(tmp_path / "base", **options)
        return
    model, batch = load(tmp_path / "base", **options), batch_of("llama")
    assert model.score.bias is None
    last = batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(model.compute_reward_score(**batch)[torch.arange(2), last], classifier(**batch).logits)


def test_a_frozen_policy_adapter_stays_frozen(reward_adapter, tmp_path):
    """peft makes an adapter trainable when it activates it."""
    folder, _ = reward_adapter
    with_adapter("llama", folder.parent / "base").save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy", reward_adapter=str(folder))
    model.compute_reward_score(batch_of("llama")["input_ids"])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["v_head.summary.weight", "v_head.summary.bias"]


def test_the_policys_folder_has_no_reward_adapter(reward_adapter, tmp_path):
    folder, _ = reward_adapter
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        folder.parent / "base", peft_config=lora(task_type="CAUSAL_LM"), reward_adapter=str(folder)
    )
    model.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "saved", reward_adapter=str(folder))
    batch = batch_of("llama")
    same_outputs(again(**batch), model(**batch))
    assert torch.equal(again.compute_reward_score(**batch), model.compute_reward_score(**batch))


@pytest.mark.parametrize("change", ["a tensor is missing", "a layer is unknown"])
def test_a_reward_adapter_is_loaded_whole(reward_adapter, change):
    """REPORT 2: peft says what it could not place, and leaves the rest random."""
    from safetensors.torch import load_file, save_file

    folder, _ = reward_adapter
    state = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in state if "layers.1" in name and "lora_B" in name)
    tensor = state.pop(name) if change == "a tensor is missing" else state[name].clone()
    if change == "a layer is unknown":
        state[name.replace("layers.1", "layers.7")] = tensor
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    place = "layers.1" if change == "a tensor is missing" else "layers.7"
    with pytest.raises(UserError, match=rf"reward adapter .* doesn't fit this model: .*{place}"):
        AutoModelForCausalLMWithValueHead.from_pretrained(
            folder.parent / "base", peft_config=lora(task_type="CAUSAL_LM"), reward_adapter=str(folder)
        )


def test_reward_adapters_that_do_not_fit_are_errors(reward_adapter, tmp_path):
    folder, _ = reward_adapter
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    with pytest.raises(UserError, match="reward_adapter is a PosixPath: give a folder or a hub name"):
        load(language_model("llama"), peft_config=lora(), reward_adapter=folder)
    with pytest.raises(UserError, match="needs a model with a peft adapter"):
        load(language_model("llama"), reward_adapter=str(folder))
    with_adapter("llama").save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="policy has no score layer"):
        load(language_model("llama"), peft_config=lora(), reward_adapter=str(tmp_path / "policy"))
    with pytest.raises(UserError, match="no reward adapter: load it with reward_adapter"):
        make("llama").compute_reward_score(torch.tensor([[3, 4]]))
