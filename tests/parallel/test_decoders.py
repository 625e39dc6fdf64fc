"""What the three sizes of model parallelism accept, and how they refuse the rest."""

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.parallel import PluginConfig, check_plugin
from coati.parallel.decoders import DECODERS, check_splits, find_decoder
from coati.parallel.sequence import causal_mask
from tests.distributed.world import family_config

WITHOUT_LATENTS = {"self_attn.q_proj"}  # DeepSeek's smaller models have it instead of q_a_proj and q_b_proj


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("model_class", (Actor, Critic, RewardModel))
def test_every_entry_finds_its_layers_and_projections(model_class, family):
    """Bare, with a language-model head, with our heads; no projection is left out or counted twice."""
    part, entry = find_decoder(model_class(config=family_config(family, 60)))
    layers = getattr(part, entry.layers)
    assert len(layers) == 3
    named = {name: m for layer in layers for name, m in layer.named_modules() if name}
    matrices = {name for name, m in named.items() if getattr(m, "weight", None) is not None and m.weight.ndim == 2}
    block = f"{entry.block_of_experts or None}."
    replicated = {name for name in matrices if name.startswith((block, *entry.per_head))}
    split = set(entry.column + entry.row)
    assert matrices - split <= replicated
    assert split - matrices <= WITHOUT_LATENTS and len(split) == len(entry.column + entry.row)
    assert (entry.experts in named) == bool(entry.experts)
    whole = {name for name, p in part.named_parameters() if not name.startswith(entry.layers)}
    known = {entry.embedding, *entry.positions, *entry.entrance}
    after = {name for name in whole if name.partition(".")[0] not in known}
    assert all("norm" in name or "ln_f" in name or name.startswith("project_out") for name in after)


def test_a_classifier_is_found_too():
    from transformers import AutoModelForSequenceClassification

    part, _ = find_decoder(AutoModelForSequenceClassification.from_config(family_config("llama", 60)))
    assert type(part).__name__ == "LlamaModel"


def test_an_unknown_architecture_is_refused_with_a_way_out():
    from transformers import BloomConfig

    with pytest.raises(UserError, match=r"support llama, .*, not bloom: use --plugin zero2.*add-an-architecture"):
        find_decoder(Actor(config=BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)))


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("llama", (4, 1), "2 key-value heads: not divisible by tensor_parallel 4; set tensor_parallel to 2$"),
        ("gpt2", (3, 1), "4 attention heads: not divisible by tensor_parallel 3; set tensor_parallel to 2 or 4$"),
        ("llama", (1, 4), "3 layers: pipeline_parallel 4 leaves stages empty"),
        ("gpt2", (2, 1, True), "gpt2's code can't split the sequence"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(family, sizes, message):
    with pytest.raises(UserError, match=message):
        check_splits(Actor(config=family_config(family, 60)), *sizes)


def test_experts_and_their_neighbors_are_divided_too():
    config = family_config("qwen2_moe", 60)
    config.num_attention_heads, config.num_key_value_heads, config.shared_expert_intermediate_size = 8, 8, 64
    check_splits(Actor(config=config), 4, 1)
    with pytest.raises(UserError, match="4 experts: not divisible by tensor_parallel 8; set tensor_parallel to 2 or 4"):
        check_splits(Actor(config=config), 8, 1)
    config.shared_expert_intermediate_size = 30
    with pytest.raises(UserError, match=r"30 columns of shared experts: .* 4; set tensor_parallel to 2"):
        check_splits(Actor(config=config), 4, 1)


def test_adapters_of_experts_can_not_be_split():
    lora = LoraSettings(rank=2, target_modules=["q_proj", "gate_up_proj"])
    with pytest.raises(UserError, match=r"splits .*mlp\.experts.*, which has an adapter: leave it out of lora_target"):
        check_splits(Actor(config=family_config("mixtral", 60), lora=lora), 2, 1)
    lora = LoraSettings(rank=2)
    check_splits(Actor(config=family_config("mixtral", 60), lora=lora), 2, 1)


def test_heads_that_nothing_divides_leave_one_remedy():
    """SmolLM2 has 9 heads and 3 for keys and values, others 7 and 1."""
    config = family_config("llama", 60)
    config.num_attention_heads, config.num_key_value_heads, config.hidden_size = 9, 3, 72
    config.head_dim, config.intermediate_size = 8, 144
    with pytest.raises(UserError, match=r"9 attention heads: .* tensor_parallel 2; set tensor_parallel to 3$"):
        check_splits(Actor(config=config), 2, 1)
    config.num_attention_heads, config.num_key_value_heads = 7, 1
    with pytest.raises(UserError, match=r"7 attention heads: .*; leave tensor_parallel out$"):
        check_splits(Actor(config=config), 2, 1)


def adapted(**settings) -> Actor:
    """With an adapter that peft makes of these settings."""
    from peft import LoraConfig, get_peft_model

    actor = Actor(config=family_config("llama", 60))
    actor.model = get_peft_model(actor.model, LoraConfig(r=2, **settings))
    return actor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_modules=["q_proj", "lm_head"]), "splits .*lm_head, which has an adapter: leave it out of"),
        (dict(target_modules=["embed_tokens"]), "splits .*embed_tokens, which has an adapter"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), "splits .*lm_head, which has an adapter"),
        (dict(target_modules=["q_proj"], use_dora=True), "that of .*q_proj is of another kind: use --plugin zero2, or"),
        (dict(target_modules=["o_proj"], lora_bias=True), "that of .*o_proj is of another kind"),
        (dict(target_modules=["q_proj"], modules_to_save=["up_proj"]), "that of .*up_proj is of another kind"),
    ],
    ids=str,
)
def test_adapters_that_can_not_be_split_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_splits(adapted(**settings), 2, 1)
    check_splits(adapted(**settings), 1, 2)
    check_splits(adapted(target_modules="all-linear", use_rslora=True), 2, 1)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (
            dict(plugin="gemini", precision="bf16", tensor_parallel=2),
            {},
            "gemini doesn't combine .* use --plugin zero1",
        ),
        (dict(plugin="zero2", pipeline_parallel=2), {}, "once per micro-batch .* use --plugin zero1"),
        (dict(tensor_parallel=2, sequence_parallel=2), {}, "sequence_parallel doesn't combine with tensor_parallel 2"),
        (dict(tensor_parallel=2, pipeline_parallel=2), dict(world_size=6), "needs a multiple of 4 processes: 6"),
        (dict(pipeline_parallel=0), {}, "pipeline_parallel is 0: it must be at least 1"),
        (dict(split_sequence=True), {}, "use it with tensor_parallel only"),
    ],
)
def test_combinations_are_refused_in_a_line(settings, options, message):
    with pytest.raises(UserError, match=message):
        check_plugin(PluginConfig(**settings), **options)


def test_the_causal_mask_knows_padding_and_windows():
    real = torch.tensor([[False, True, True, True]])
    mask = causal_mask(real, 4, 2, real.device)[0, 0]
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert mask.int().tolist() == expected
    assert causal_mask(torch.ones(2, 3), 3, None, real.device) is None
