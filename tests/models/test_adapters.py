"""Adapters as peft and others write them: loaded whole or refused, saved whole, merged exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.models.adapters import unsaved
from tests.models.families import VOCABULARY, padded, rows, tiny_config

BATCH = padded(rows(), "right")
TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "opt": ["q_proj", "fc1"], "bloom": ["query_key_value"]}


def base_folder(folder, family: str, **overrides):
    torch.manual_seed(0)
    Actor(config=tiny_config(family, **overrides)).save_pretrained(folder / "base")
    return folder / "base"


def settings_of(family: str, **changes):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": TARGETS[family], **changes})


@torch.no_grad()
def trained(model):
    """As after some training: everything that trains has moved."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def adapted(folder, config, auto: str = "AutoModelForCausalLM", tokens: int | None = None, **options):
    """An adapter as peft alone makes and saves it, on what `auto` loads from FOLDER/base; its place and the model."""
    import transformers
    from peft import get_peft_model

    model = getattr(transformers, auto).from_pretrained(folder / "base", **options)
    if tokens is not None:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    model = trained(get_peft_model(model, config))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """Of a plain model's next tokens, as an `Actor` gives them."""
    chosen = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return torch.nn.functional.pad(chosen, (1, 0))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- the head that an adapter was trained with


@pytest.mark.parametrize("full_names", [False, True])
@pytest.mark.parametrize("family", TARGETS)
@torch.no_grad()
def test_a_classifiers_adapter_scores_as_in_peft(family, full_names, tmp_path):
    """REPORT 2: an adapter of task SEQ_CLS, as TRL's reward trainer leaves it, with its `score`. Its layers may be
    named in full, which have another name in a model without a head."""
    base_folder(tmp_path, family)
    config = settings_of(family, task_type="SEQ_CLS")
    if full_names:
        from transformers import AutoModelForSequenceClassification

        names = [
            name for name, _ in AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").named_modules()
        ]
        config.target_modules = {name for name in names if name.rpartition(".")[2] in TARGETS[family]}
        config.rank_pattern = {sorted(config.target_modules)[0]: 3}
    folder, theirs = adapted(tmp_path, config, "AutoModelForSequenceClassification", num_labels=1)
    ids, mask = BATCH
    expected = theirs(ids, attention_mask=mask).logits[:, 0]
    assert expected.std() > 0.01
    ours = RewardModel(folder).eval()
    assert_close(ours(ids, mask), expected)
    assert Critic(folder).value_head.weight.equal(load_file(folder / "adapter_model.safetensors")[SCORE])
    trained(ours).save_pretrained(tmp_path / "ours")
    assert torch.equal(RewardModel(tmp_path / "ours").eval()(ids, mask), ours(ids, mask))


SCORE = "base_model.model.score.weight"


@pytest.mark.parametrize("kind", ["a layer", "the head", "embeddings and head"])
@pytest.mark.parametrize("family", TARGETS)
@torch.no_grad()
def test_a_policys_adapter_reads_texts_alike_under_a_value_head(family, kind, tmp_path):
    """REPORT 2: train_rm and PPO's critic start from what SFT left with --merge_lora false; what it holds of the
    language model's head is left out."""
    base = base_folder(tmp_path, family)
    head = {"llama": "lm_head", "gpt2": "lm_head", "opt": "lm_head", "bloom": "lm_head"}[family]
    if kind == "a layer":
        actor = trained(Actor(base, lora=LoraSettings(rank=2, target_modules=TARGETS[family])))
        actor.save_pretrained(tmp_path / "adapter")
        theirs = actor.model
    elif kind == "the head":
        _, theirs = adapted(tmp_path, settings_of(family, target_modules=[*TARGETS[family], head]))
    else:
        names = [
            {"llama": "embed_tokens", "gpt2": "wte", "opt": "embed_tokens", "bloom": "word_embeddings"}[family],
            head,
        ]
        _, theirs = adapted(tmp_path, settings_of(family, task_type="CAUSAL_LM", modules_to_save=names))
    ids = torch.stack(rows(lengths=(5, 5)))
    seen = []
    theirs.get_base_model().get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    theirs(input_ids=ids)
    for model_class in (RewardModel, Critic):
        model = model_class(tmp_path / "adapter").eval()
        assert_close(model.value_head(seen[0]).squeeze(-1), model.token_values(ids, None))
        trained(model).save_pretrained(tmp_path / model_class.__name__)
        again = model_class(tmp_path / model_class.__name__).eval()
        assert torch.equal(again(ids), model(ids))


@torch.no_grad()
def test_a_reward_models_adapter_can_become_a_policys(tmp_path):
    """REPORT 2: the other way round, from a model without a head to one with it."""
    base = base_folder(tmp_path, "llama")
    scorer = trained(RewardModel(base, lora=LoraSettings(rank=2)))
    scorer.save_pretrained(tmp_path / "adapter")
    ids = torch.stack(rows(lengths=(5, 5)))
    actor = Actor(tmp_path / "adapter").eval()
    hidden = actor.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert_close(scorer.value_head(hidden).squeeze(-1), scorer.token_values(ids, None))


def test_an_adapter_without_a_head_takes_that_of_its_base(tmp_path):
    """REPORT 2: peft scores with the base's `score`, if the adapter has none."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).save_pretrained(
        tmp_path / "base"
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = trained(get_peft_model(theirs, settings_of("llama")))
    theirs.save_pretrained(tmp_path / "adapter")
    ids, mask = BATCH
    assert_close(RewardModel(tmp_path / "adapter").eval()(ids, mask), theirs(ids, attention_mask=mask).logits[:, 0])


def rewrite(folder, change):
    """The adapter's tensors, changed in place by `change`."""
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


LAYER = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("model_class", [Actor, RewardModel])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(LAYER), r"lacks 1 tensors .*layers\.1\.self_attn\.q_proj\.lora_B"),
        (lambda s: s.update({LAYER.replace("layers.1", "layers.7"): s[LAYER].clone()}), r"no place for .*layers\.7"),
        (lambda s: s.update({"base_model.model.classifier.dense.weight": torch.ones(2, 2)}), "classifier.dense"),
        (lambda s: s.update({LAYER: torch.ones(3, 3)}), "size mismatch"),
    ],
    ids=["missing", "unexpected", "another head", "another size"],
)
def test_an_adapter_that_does_not_fit_is_refused(model_class, change, said, tmp_path):
    """REPORT 2: nothing of an adapter is left random or dropped in silence."""
    base_folder(tmp_path, "llama")
    folder, _ = adapted(tmp_path, settings_of("llama"))
    rewrite(folder, change)
    with pytest.raises(UserError, match=said):
        model_class(folder)


def test_heads_that_are_no_score_of_this_model_are_refused(tmp_path):
    """REPORT 2: several labels have no place in a value head, and a score has none in a policy."""
    base_folder(tmp_path, "llama")
    folder, _ = adapted(tmp_path, settings_of("llama", task_type="SEQ_CLS"), "AutoModelForSequenceClassification")
    with pytest.raises(UserError, match=r"head in .*adapter \(weight \[2, 32\]\) is no value head"):
        RewardModel(folder)
    with pytest.raises(UserError, match=r"no place for \(score\.weight\)"):
        Actor(folder)


def test_a_lack_in_what_is_trained_whole_is_named(tmp_path):
    """REPORT 2: peft stops there with a KeyError."""
    base_folder(tmp_path, "llama")
    folder, _ = adapted(tmp_path, settings_of("llama", modules_to_save=["lm_head"]))
    rewrite(folder, lambda s: s.pop("base_model.model.lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks base_model\.model\.lm_head\.weight"):
        Actor(folder)


def test_prompt_tuning_is_refused(tmp_path):
    from peft import PromptTuningConfig

    base_folder(tmp_path, "llama")
    folder, _ = adapted(tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="PROMPT_TUNING"):
        Actor(folder)


# --- everything that trains is saved


def kinds():
    """Ways to train a few tensors of llama beside, or instead of, LoRA's."""
    from peft import IA3Config, LoHaConfig

    return {
        "lora": settings_of("llama"),
        "rslora": settings_of("llama", use_rslora=True),
        "dora": settings_of("llama", use_dora=True),
        "modules_to_save": settings_of("llama", modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"),
        "norms": settings_of("llama", modules_to_save=["input_layernorm"]),
        "embeddings": settings_of("llama", target_modules=["q_proj", "embed_tokens", "lm_head"]),
        "biases": settings_of("llama", bias="all"),
        "lora's biases": settings_of("llama", bias="lora_only"),
        "tokens": settings_of("llama", trainable_token_indices=[3, 9]),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
    }


KINDS = ("lora", "rslora", "dora", "modules_to_save", "norms", "embeddings", "biases", "lora's biases", "tokens")
KINDS += ("ia3", "loha")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_trained_tensor_is_saved_and_comes_back(kind, tied, tmp_path):
    """REPORT 3, and REPORT 6 where weights are tied: continued, saved, read back and merged, the policy is the same."""
    base_folder(tmp_path, "llama", attention_bias=True, tie_word_embeddings=tied)
    folder, theirs = adapted(tmp_path, kinds()[kind])
    actor, ids = Actor(folder), torch.stack(rows(lengths=(6, 6)))
    assert_close(actor.eval()(ids), log_probs(theirs, ids))
    names = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in actor.model.named_parameters() if p.requires_grad} == names
    assert unsaved(actor.model) == []
    expected = trained(actor)(ids)
    actor.save_pretrained(tmp_path / "saved")
    stored = list(load_file(tmp_path / "saved" / "adapter_model.safetensors").values())
    for name, parameter in actor.model.named_parameters():
        held = any(tensor.shape == parameter.shape and torch.equal(tensor, parameter) for tensor in stored)
        assert held or not parameter.requires_grad, name
    assert torch.equal(Actor(tmp_path / "saved").eval()(ids), expected)
    actor.save_pretrained(tmp_path / "merged", merge=True)
    assert actor.transformer.config.tie_word_embeddings == tied
    assert torch.equal(actor(ids), expected)
    torch.testing.assert_close(Actor(tmp_path / "merged").eval()(ids), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("place", [["lm_head"], ["wte"], ["c_attn", "lm_head", "wte"]])
@torch.no_grad()
def test_a_merged_export_of_tied_embeddings_is_the_policy(place, tmp_path):
    """REPORT 6: GPT-2's are always tied; the export's are not, and plain transformers opens it."""
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path, "gpt2")
    actor = trained(Actor(base, lora=LoraSettings(rank=2, target_modules=place)))
    ids = torch.stack(rows(lengths=(6, 6)))
    actor.save_pretrained(tmp_path / "merged", merge=True)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(log_probs(plain.eval(), ids), actor(ids), rtol=1e-4, atol=2e-5)
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


# --- more tokens than the base has


MORE = VOCABULARY + 8


def with_more_tokens():
    return {
        "frozen": settings_of("llama"),
        "whole": settings_of("llama", modules_to_save=["embed_tokens", "lm_head"]),
        "lora": settings_of("llama", target_modules=["q_proj", "embed_tokens", "lm_head"]),
        "tokens": settings_of("llama", trainable_token_indices=[VOCABULARY, MORE - 1]),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["frozen", "whole", "lora", "tokens"])
@torch.no_grad()
def test_an_adapter_trained_after_adding_tokens_brings_them(kind, tied, tmp_path):
    """REPORT 28: peft's file holds the embeddings then; the base gets their number, and so does what is saved."""
    base_folder(tmp_path, "llama", tie_word_embeddings=tied)
    folder, theirs = adapted(tmp_path, with_more_tokens()[kind], tokens=MORE)
    ids = torch.tensor([[5, VOCABULARY, 7, MORE - 1, 9]])
    actor = Actor(folder).eval()
    assert_close(actor(ids), log_probs(theirs, ids))
    expected = trained(actor)(ids)
    actor.save_pretrained(tmp_path / "again")
    assert torch.equal(Actor(tmp_path / "again").eval()(ids), expected)
    values = Critic(folder).eval()(ids)
    assert values.isfinite().all()
    actor.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(Actor(tmp_path / "merged").eval()(ids), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["frozen", "lora", "tokens"])
def test_an_adapter_that_lacks_its_new_tokens_is_refused(kind, tmp_path):
    """REPORT 28: rows that nobody has can't be drawn at random."""
    base_folder(tmp_path, "llama")
    folder, _ = adapted(tmp_path, with_more_tokens()[kind], tokens=MORE)
    drop = [name for name in load_file(folder / "adapter_model.safetensors") if name.endswith("embed_tokens.weight")]
    drop += [
        name
        for name in load_file(folder / "adapter_model.safetensors")
        if "embed_tokens" in name and "base_layer" in name
    ]
    assert drop
    rewrite(folder, lambda s: [s.pop(name) for name in drop])
    with pytest.raises(
        UserError, match=f"trained with {MORE} tokens and doesn't hold their embeddings.* has {VOCABULARY}"
    ):
        Actor(folder)
