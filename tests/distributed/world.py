"""Tiny models of several architectures, and runs of several layouts in one process group."""

from pathlib import Path

from tests.conftest import reward_model, settings_for

BUDGET = 200  # tokens: two of the longest rows, or one pair
LAYOUTS = {
    "ddp": dict(plugin="ddp"),
    "zero1": dict(plugin="zero1", max_tokens_per_batch=BUDGET),
    "zero2": dict(plugin="zero2"),
    "zero2-offload": dict(plugin="zero2-offload"),
    "gemini, bf16": dict(plugin="gemini", precision="bf16"),
    "tp2": dict(tensor_parallel=2),
    "tp2, split_sequence": dict(tensor_parallel=2, split_sequence=True),
    "pp2": dict(pipeline_parallel=2, max_tokens_per_batch=BUDGET),
    "sp2": dict(sequence_parallel=2),
    "tp2 x pp2": dict(tensor_parallel=2, pipeline_parallel=2),
    "tp2 x zero1": dict(tensor_parallel=2, plugin="zero1"),
    "pp2 x zero1": dict(pipeline_parallel=2, plugin="zero1"),
    "sp2 x zero1": dict(sequence_parallel=2, plugin="zero1"),
}


FOUR_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0])  # one layer has none
FOUR_LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ROUTED |= dict(n_shared_experts=1, first_k_dense_replace=1)


def family_config(family: str, tokenizer_size: int):
    """Three layers (an odd number for two stages), an odd vocabulary, grouped queries if there are any, no dropout."""
    import transformers

    common = dict(vocab_size=tokenizer_size + 1, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    grouped = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    grouped |= dict(num_key_value_heads=2, max_position_embeddings=128)
    match family:
        case "gpt2":
            sizes = dict(n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=64)
            return transformers.GPT2Config(**common, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        case "opt":
            sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4)
            sizes |= dict(word_embed_proj_dim=16, max_position_embeddings=128)
            return transformers.OPTConfig(**common, **sizes, dropout=0.0, attention_dropout=0.0)
        case "phi":
            return transformers.PhiConfig(**common, **{**grouped, "num_key_value_heads": 4})
        case "qwen2":
            window = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
            return transformers.Qwen2Config(**common, **grouped, **window, tie_word_embeddings=True)
        case "qwen3":
            return transformers.Qwen3Config(**common, **grouped, head_dim=8, tie_word_embeddings=True)
        case "gemma":
            return transformers.GemmaConfig(**common, **grouped, head_dim=8)
        case "mistral":
            return transformers.MistralConfig(**common, **grouped, sliding_window=6)
        case "olmo2":
            return transformers.Olmo2Config(**common, **grouped)
        case "olmoe":
            return transformers.OlmoeConfig(**common, **grouped, num_experts=4, num_experts_per_tok=2, clip_qkv=8.0)
        case "mixtral":
            return transformers.MixtralConfig(**common, **grouped, **FOUR_LOCAL)
        case "qwen2_moe":
            widths = dict(moe_intermediate_size=16, shared_expert_intermediate_size=32)
            return transformers.Qwen2MoeConfig(**common, **grouped, **FOUR_EXPERTS, **widths)
        case "qwen3_moe":
            experts = FOUR_EXPERTS | dict(moe_intermediate_size=16, norm_topk_prob=True)
            return transformers.Qwen3MoeConfig(**common, **grouped, **experts, head_dim=8)
        case "glm4_moe":  # a dense layer first
            experts = ROUTED | dict(n_group=1, topk_group=1)
            return transformers.Glm4MoeConfig(**common, **grouped, **experts, head_dim=8, use_qk_norm=True)
        case "deepseek_v3":
            experts = ROUTED | dict(n_group=2, topk_group=1)
            latents = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
            return transformers.DeepseekV3Config(
                **common, **{**grouped, "num_key_value_heads": 4}, **experts, **latents
            )
        case "gpt_oss":
            plain = {"rope_type": "default", "rope_theta": 1e4}
            window = dict(head_dim=8, sliding_window=6, rope_parameters=plain)
            return transformers.GptOssConfig(**common, **grouped, **FOUR_LOCAL, **window)
        case "llama":
            return transformers.LlamaConfig(**common, **grouped, tie_word_embeddings=False)
    raise ValueError(family)


def runs_under(layout: str, family: str) -> bool:
    """Whether a layout isn't refused (test_decoders.py): gpt-oss has no attention that sequence parallelism knows."""
    without = {"gpt2": ("split_sequence",), "gpt_oss": ("split_sequence", "sp2")}
    return not any(name in layout for name in without.get(family, ()))


def make_family(family: str, world: dict[str, str], folder: Path) -> dict[str, str]:
    """The tiny world with a policy and a reward model of this architecture."""
    import torch
    from transformers import AutoTokenizer

    from coati.models import Actor, RewardModel

    tokenizer = AutoTokenizer.from_pretrained(world["tokenizer"])
    config = family_config(family, len(tokenizer))
    torch.manual_seed(3)
    paths = {}
    for name, model in (("policy", Actor(config=config)), ("scorer", RewardModel(config=config))):
        with torch.no_grad():
            for parameter in model.parameters():
                # larger than the usual start, or all losses would be the loss of knowing nothing
                parameter.add_(torch.randn_like(parameter) * 0.05)
        paths[name] = str(folder / f"{family}-{name}")
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    # loaded from beside the model, as its type may choose another class of tokenizer
    return world | paths | {"tokenizer": paths["policy"]}


def family_job(name: str, algorithm: str, world, folder: Path, /, **changes) -> dict:
    """Four steps, or one iteration of PPO with a reward model."""
    settings = settings_for(algorithm, world, output_dir=str(folder / name), model=world["policy"], model_config=None)
    settings |= dict(steps=4, learning_rate=1e-3, save_every=0) | changes
    if algorithm == "ppo":
        settings |= dict(steps=1, rewards=[reward_model(world["scorer"])], critic_learning_rate=1e-3) | changes
    return {"name": name, "algorithm": algorithm, "settings": settings}


def without_ties(steps: list[dict]) -> list[dict]:
    """Before the first update the policy is its reference: which response of a pair it prefers then is rounding."""
    first, *others = steps
    return [{name: value for name, value in first.items() if name != "accuracy"}, *others]
