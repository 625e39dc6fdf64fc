"""The memory planner: its arithmetic, its words, and real runs beside it (docs/memory.md has more of those)."""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections import Counter
from typing import Any, Literal, get_args, get_origin

import pytest
from transformers import GPT2Config, LlamaConfig, OPTConfig

import coati.trainers
from coati.cli import main
from coati.config import configure
from coati.config.plugin import PluginConfig
from coati.config.schema import leaves, section_classes, types_of
from coati.errors import UserError
from coati.models import Actor, Critic, LoraSettings, RewardModel
from coati.models.shared_weights import SharedWeights
from coati.parallel import make_engine
from coati.parallel.factory import engine_class
from coati.planner.dry_run import Workload, plan
from coati.planner.report import conclusion, read_workload
from coati.trainers.algorithms import ALGORITHMS
from coati.trainers.config import PPOConfig, SFTConfig
from coati.trainers.trainer import Trainer
from tests.conftest import ROOT, reward_model
from tests.models.test_lora import with_noise
from tests.models.test_shared_weights import storages

# Attention narrow enough to be a small part, and a vocabulary that is no other width
SHAPE = dict(hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000)
LLAMA = LlamaConfig(**SHAPE, num_hidden_layers=4)
WEIGHTS = 2 * 1000 * 64 + 64 + 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 176 + 2 * 64)


def sft(gpus: int = 1, shape=LLAMA, on_gpu: bool = True, **settings):
    settings = {"precision": "bf16", "plugin": "zero2", "max_length": 128, "micro_batch_size": 4, **settings}
    return plan(Workload("sft", configure(SFTConfig, **settings), shape, gpus, on_gpu))


def kinds(found, moment: str | None = None) -> Counter:
    total = Counter()
    for (_, kind), nbytes in found.phases[moment or found.worst].items():
        total[kind] += nbytes
    return total


def test_zero_divides_the_optimizer_states_by_the_ranks():
    one, four = kinds(sft(1)), kinds(sft(4))
    assert one["optimizer states"] == 12 * WEIGHTS
    assert four["optimizer states"] == 3 * WEIGHTS
    assert one["parameters"] == pytest.approx(2 * WEIGHTS, rel=0.01)  # and a few buffers
    assert four["parameters"] == one["parameters"]


def test_ddp_keeps_float32_weights_and_buckets():
    found = kinds(sft(4, plugin="ddp"))
    assert found["parameters"] == pytest.approx(4 * WEIGHTS, rel=0.01)
    assert found["optimizer states"] >= 8 * WEIGHTS
    assert found["communication"] == 4 * WEIGHTS


def test_offloading_leaves_no_states_on_the_gpu():
    assert kinds(sft(plugin="zero2-offload"))["optimizer states"] == 0
    assert kinds(sft(plugin="zero2-offload", on_gpu=False))["optimizer states"] == 12 * WEIGHTS


def test_precision_halves_activations_but_not_the_float32_logits():
    low, high = kinds(sft()), kinds(sft(precision="fp32"))
    assert high["activations"] > 1.5 * low["activations"]
    logits = 4 * 128 * 1000
    assert low["logits"] >= (2 + 4) * logits, "bf16 logits and their float32 copy"


def test_a_gpu_has_more_logits_at_a_time():
    wide = LlamaConfig(**SHAPE | {"vocab_size": 100_000}, num_hidden_layers=1)
    cpu, gpu = (kinds(sft(shape=wide, on_gpu=on_gpu, plugin="ddp"))["logits"] for on_gpu in (False, True))
    assert gpu > 3 * cpu


def test_checkpointing_saves_most_activations():
    assert kinds(sft(gradient_checkpointing=True))["activations"] < 0.5 * kinds(sft())["activations"]


def test_layers_inputs_wait_on_the_host():
    how = dict(gradient_checkpointing=True, max_length=512)
    for layers in (4, 8):
        shape = LlamaConfig(**SHAPE | {"num_hidden_layers": layers})
        here, there = (kinds(sft(shape=shape, **how, offload_activations=on), "learn") for on in (False, True))
        inputs = layers * 4 * 512 * 64 * 2
        assert here["activations"] - there["activations"] == pytest.approx(inputs, rel=0.35)
    on_cpu = [kinds(sft(**how, offload_activations=on, on_gpu=False))["activations"] for on in (False, True)]
    assert on_cpu[0] <= on_cpu[1]


def test_feed_forward_blocks_are_as_wide_as_their_stretch():
    shape = LlamaConfig(**SHAPE | {"intermediate_size": 1024}, num_hidden_layers=4)
    how = dict(shape=shape, gradient_checkpointing=True, max_length=512)
    whole, parts = (kinds(sft(**how, feed_forward_tokens=tokens), "learn") for tokens in (0, 64))
    assert parts["activations"] < 0.4 * whole["activations"]


def test_lora_has_states_of_its_adapters_only():
    found = kinds(sft(lora_rank=4))
    assert 0 < found["optimizer states"] < 12 * WEIGHTS / 5
    assert found["parameters"] > 2 * WEIGHTS


def test_adapters_split_with_their_layers():
    """Half of the frozen weights on each of two ranks; of each adapter the matrix that the split goes through."""
    settings = dict(lora_rank=4, plugin="ddp", precision="fp32")
    whole, split = (kinds(sft(2, tensor_parallel=ranks, **settings)) for ranks in (1, 2))
    assert split["parameters"] == pytest.approx(whole["parameters"] / 2, rel=0.05)
    before, outputs, inputs, after = 5 * 64, 64 + 2 * 32 + 2 * 176, 64 + 176, 2 * 64
    share = (before + outputs / 2 + inputs / 2 + after) / (before + outputs + inputs + after)
    assert split["optimizer states"] == pytest.approx(share * whole["optimizer states"], rel=0.01)


def test_experts_split_with_their_layers():
    """Half of all matrices on each of two ranks; every token passes two experts, whichever these are."""
    from transformers import MixtralConfig

    def shape(**changes):
        return MixtralConfig(**SHAPE | dict(num_local_experts=4, num_experts_per_tok=2) | changes, num_hidden_layers=2)

    settings = dict(plugin="ddp", precision="fp32")
    whole, split = (kinds(sft(2, shape(), tensor_parallel=ranks, **settings)) for ranks in (1, 2))
    assert split["parameters"] == pytest.approx(whole["parameters"] / 2, rel=0.05)
    many = kinds(sft(2, shape(num_local_experts=8), **settings))
    assert many["parameters"] > 1.5 * whole["parameters"]
    assert many["activations"] == pytest.approx(whole["activations"], rel=0.1)
    assert kinds(sft(2, shape(num_experts_per_tok=4), **settings))["activations"] > 1.3 * whole["activations"]


def test_gemini_shards_what_is_trained_and_large():
    large = LlamaConfig(**SHAPE | {"hidden_size": 1024, "vocab_size": 32000}, num_hidden_layers=4)
    one, eight = kinds(sft(1, large, plugin="gemini")), kinds(sft(8, large, plugin="gemini"))
    assert eight["parameters"] < 0.2 * one["parameters"]
    assert kinds(sft(8, plugin="gemini"))["parameters"] == kinds(sft(1, plugin="gemini"))["parameters"]


def test_deep_models_are_continued_in_a_straight_line():
    def deep(layers):
        return sft(4, LlamaConfig(**SHAPE, num_hidden_layers=layers)).peak.total()

    sizes = [deep(layers) for layers in (8, 10, 12)]  # 8 layers are gone through one by one
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=8) and sizes[1] > sizes[0]


@pytest.mark.parametrize("kind", ["tensor", "sequence"])
def test_splitting_a_batch_over_ranks_halves_the_logits(kind):
    whole, half = kinds(sft(2, plugin="zero1")), kinds(sft(2, plugin="zero1", **{f"{kind}_parallel": 2}))
    assert half["logits"] == pytest.approx(whole["logits"] / 2, rel=0.01)


@pytest.mark.parametrize(
    "shape",
    [
        GPT2Config(n_embd=64, n_layer=2, n_head=4),
        OPTConfig(hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128),
    ],
)
def test_ppo_has_four_models_and_three_phases_of_any_architecture(shape):
    sizes = dict(batch_size=8, micro_batch_size=2, max_prompt_length=32, max_new_tokens=16)
    config = configure(PPOConfig, precision="bf16", rewards=[reward_model("scorer")], **sizes)
    models = ("actor", "critic", "reference", "reward model")
    found = plan(Workload("ppo", config, shape, 2))
    assert {"generate", "score", "evaluate", "learn"} <= set(found.phases)
    assert set(models) <= {model for (model, kind), n in found.peak.items() if n and kind == "parameters"}
    assert kinds(found, "generate")["KV cache"] > 0
    assert found.peak.total() == max(phase.total() for phase in found.phases.values())


def test_a_plan_with_adapters_is_all_that_the_command_prints(tmp_path):
    """In a process of its own: peft imports bitsandbytes, which looks for a kernel and says so, once."""
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(LLAMA.to_dict()))
    command = [sys.executable, "-m", "coati.cli", "plan", "sft", "--model_config", str(shape), "--lora_rank", "2"]
    done = subprocess.run([*command, "--max_length", "32"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sft · ")


def test_the_command_prints_a_table_a_verdict_and_the_best_change(tmp_path, capsys):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(LLAMA.to_dict()))
    argv = ["plan", "sft", "--model_config", str(shape), "--gpus", "2", "--plugin", "ddp"]
    assert main([*argv, "--memory", "80"]) == 0
    output = capsys.readouterr().out
    assert "ddp bf16 · 2 x GPU" in output and output.count("*") == 2
    assert "fits: " in output and "saves" in output.splitlines()[-1]


def test_a_run_that_does_not_fit_is_told_so():
    found = sft()
    assert conclusion(found, 0.001, fits=False).startswith("does not fit: ")
    assert f"({found.worst})" in conclusion(found, 80, fits=True)


def test_mistakes_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="--model FOLDER"):
        read_workload("sft", [], 1, True)
    with pytest.raises(UserError, match="this model on this machine"):
        read_workload("sft", ["--model", str(tmp_path)], 1, True)
    with pytest.raises(UserError, match="multiple of 4"):
        sft(6, tensor_parallel=4, plugin="zero1")
    with pytest.raises(UserError, match="one of ddp, zero1"):
        sft(plugin="zero9")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [("sft", {"plugin": "zero2", "gradient_checkpointing": True}), ("ppo", {"plugin": "gemini"})],
    ids=["sft", "ppo"],
)
def test_plans_are_within_15_percent_of_real_peaks(method, settings):
    from tools.measure_memory import SMALL, Case, compare

    small = SMALL | {"num_hidden_layers": 2, "hidden_size": 128}
    [(case, planned, measured)] = compare([Case(method, 2, small, settings)])
    assert planned == pytest.approx(measured, rel=0.15), case


TINY = LlamaConfig(**SHAPE, num_hidden_layers=1)
RUN = dict(precision="bf16", plugin="zero2", batch_size=4, micro_batch_size=2, max_length=16, samples=2)
ROLLOUTS = dict(max_prompt_length=8, max_new_tokens=4, rewards=["math"])
SETTINGS = {  # of one row of each algorithm; and what else a setting asks for
    "sft": dict(max_new_tokens=4),
    "reward": {},
    "prm": {},
    "preference": {},
    "ppo": ROLLOUTS,
    "grpo": ROLLOUTS | dict(group_size=2),
    "distill": ROLLOUTS | dict(teacher="teacher"),
}
MORE = {
    "sft": [dict(num_beams=2), dict(lora_rank=2), dict(max_tokens_per_batch=32)],
    "reward": [
        dict(use_margin=True),
        dict(share_prompts=True),
        dict(gradient_checkpointing=True),
        dict(objectives=["a", "b"]),
    ],
    "prm": [dict(lora_rank=2)],
    "preference": [dict(share_prompts=True), dict(cache_reference=True), dict(lora_rank=2)],
    "ppo": [
        dict(shared_trunk=True),
        dict(lora_rank=2),
        dict(lora_rank=2, tensor_parallel=2, plugin="zero1"),
        dict(ptx_data=["texts"], ptx_coefficient=0.1),
        dict(kl_target=1.0, normalize_reward=True),
        dict(rewards=[dict(type="classifier", path="classifier")]),
        dict(rewards=[dict(type="process", path="prm", reduce="none")]),
        dict(rewards=[dict(type="model", path="scorer", objectives={"a": 1.0})]),
        dict(rewards=[dict(type="judge", path="judge", mode="pairwise", reference_column="gold")]),
        dict(rewards=[dict(type="judge", path="judge")], tensor_parallel=2, plugin="zero1"),
        dict(rewards=[dict(type="judge", path="judge")], plugin="gemini"),
        dict(rollout_engine="vllm", plugin="ddp"),
    ],
    "grpo": [
        dict(dynamic_sampling=True),
        dict(share_prompts=True),
        dict(kl_coefficient=0.1, refresh_reference=1),
        dict(kl_coefficient=0.1, lora_rank=2),
        dict(rollout_engine="vllm"),
        dict(plugin="gemini", entropy_coefficient=0.1),
        dict(algorithm="cispo", score_centering=8),
    ],
    "distill": [
        dict(on_policy_share=0.5),
        dict(lora_rank=2),
        dict(plugin="gemini"),
        dict(sequence_parallel=2),
        dict(teacher="self", teacher_ema=0.1, teacher_prompt="{prompt} {response}", eval_data=["held out"]),
        dict(teacher="self", teacher_ema=0.1, lora_rank=2),
        dict(teacher=None, teachers={"a": "A", "b": "B"}, teacher_column="domain", on_policy_share=0.5),
    ],
}


OF_METHODS = {"sdpo": dict(teacher="self")}
OF_ENVIRONMENTS = ("echo", "turns", "turn")  # methods and values that ask for one


def choices(config: type) -> tuple[list[dict], list[dict]]:
    """Each method of an algorithm; and settings of the first one that have, between them, each value of all those that
    have a few to choose from."""
    field = config.__pydantic_fields__.get("algorithm")
    if field is None:
        return [], []
    types = [types_of(kind)[0] for kind in section_classes(field.annotation)]
    types = [kind for kind in types if kind not in OF_ENVIRONMENTS]
    own = {path: leaf.kinds[0] for path, leaf in leaves(config, types[0]).items() if leaf.section == "algorithm"}
    own = {path: get_args(kind) for path, kind in own.items() if get_origin(kind) is Literal and "type" not in path}
    own = {path: [value for value in values if value not in OF_ENVIRONMENTS] for path, values in own.items()}
    most = max([len(values) for values in own.values()], default=0)
    methods = [{"algorithm": kind, "batch_size": 8} | OF_METHODS.get(kind, {}) for kind in types[1:]]
    return methods, [{path: values[i % len(values)] for path, values in own.items()} for i in range(most)]


# methods with other models, rows or phases than the first one of their algorithm; the rest is slow
UNLIKE = ("kto", "simpo", "sao", "remax", "sdpo")
CASES: list[Any] = []
for name, algorithm in ALGORITHMS.items():
    methods, values = choices(algorithm.config)
    alike = [changes for changes in methods if changes["algorithm"] not in UNLIKE]
    methods = [changes for changes in methods if changes not in alike]
    CASES += [(name, changes) for changes in [dict(eval_data=["held out"]), *methods, *MORE[name]]]
    CASES += [pytest.param(name, changes, marks=pytest.mark.slow) for changes in [*alike, *values]]

TALK = dict(environment=f"{ROOT / 'tests' / 'talk.py'}:Talk", max_tokens=64, max_turns=3, turn_rewards=True)
CASES += [
    ("grpo", TALK | changes)
    for changes in (
        dict(eval_data=["held out"]),
        dict(advantage="turns"),
        dict(algorithm="echo", batch_size=8),
        dict(dynamic_sampling=True),
        dict(plugin="gemini"),
    )
]
CASES += [("ppo", TALK), ("ppo", TALK | dict(gae_level="turn")), ("ppo", TALK | dict(rollout_engine="vllm"))]


def plan_of(name: str, gpus: int = 2, own=TINY, others=(), on_gpu: bool = True, **changes):
    config = configure(ALGORITHMS[name].config, **{**RUN, **SETTINGS[name], **changes})
    return plan(Workload(name, config, own, gpus, on_gpu, other_configs=dict(others)))


def models(found) -> set[str]:
    """Those that have weights in some phase."""
    items = [item for phase in found.phases.values() for item in phase.items()]
    return {model for (model, kind), nbytes in items if kind == "parameters" and nbytes}


@pytest.mark.parametrize("plugin, precision", [("ddp", "fp32"), ("ddp", "bf16"), ("zero2", "bf16")])
def test_adapters_of_one_base_are_planned_with_one_base(plugin, precision, tmp_path, runtime):
    """As many bytes of weights as the run's models hold; with another base for the reward model, that too."""
    bases = [str(tmp_path / name) for name in ("base", "other")]
    for place in bases:
        Actor(config=TINY).save_pretrained(place)
        with_noise(RewardModel(place, lora=LoraSettings(2))).save_pretrained(f"{place}-reward")
    sizes = dict(model=bases[0], lora_rank=2, plugin=plugin, precision=precision, kl_coefficient=0.1)

    def weights(place: str) -> Counter:
        found = plan_of(
            "ppo", gpus=1, **sizes, rewards=[reward_model(f"{place}-reward")], critic_model=f"{place}-reward"
        )
        return Counter({model: n for (model, kind), n in found.peak.items() if kind == "parameters"})

    config, shared, real = PluginConfig(plugin=plugin, precision=precision), SharedWeights(), []
    for model_class in (Actor, Critic, RewardModel):
        how = dict(lora=LoraSettings(2), dtype=engine_class(config).loads_in(config))
        real.append(model_class(bases[0] if model_class is Actor else f"{bases[0]}-reward", **how))
        shared.share(real[-1])
        make_engine(real[-1], config, runtime, optimizer=None if model_class is RewardModel else {})
    one, two = (weights(place) for place in bases)
    buffers = sum(buffer.nbytes for model in real for buffer in model.buffers())
    assert one.total() == pytest.approx(sum(storages(*real).values()), abs=buffers)
    base = sum(p.nbytes for p in {*real[0].parameters()} & {*real[1].parameters()})
    assert two == one + Counter({"critic": base}), "of this base too the critic and the reward model are adapters"


@pytest.mark.parametrize("plugin", ["ddp", "zero2"])
def test_a_base_in_4_bits_is_planned_as_bitsandbytes_has_it(plugin, tmp_path, runtime):
    """Weights and their scales, once for policy, critic and reward model; the reward model's are recorded with it."""
    base, reward = str(tmp_path / "base"), str(tmp_path / "reward")
    Actor(config=LLAMA).save_pretrained(base)
    with_noise(RewardModel(base, lora=LoraSettings(2), quantize_base=True)).save_pretrained(reward)
    how = dict(model=base, lora_rank=2, plugin=plugin, precision="bf16", rewards=[reward_model(reward)])
    how |= dict(critic_model=reward, kl_coefficient=0.1)
    config, shared, real = PluginConfig(plugin=plugin, precision="bf16"), SharedWeights(), []
    for model_class, source in ((Actor, base), (Critic, reward), (RewardModel, reward)):
        dtype = engine_class(config).loads_in(config)
        lora = LoraSettings(2) if source == base else None
        real.append(model_class(source, lora=lora, quantize_base=True, dtype=dtype))
        shared.share(real[-1])
        make_engine(real[-1], config, runtime, optimizer=None if model_class is RewardModel else {})
    packed = {p.data_ptr(): p for p in real[0].parameters() if hasattr(p, "quant_state")}
    scales = [scale for p in packed.values() for scale in (p.quant_state.absmax, p.quant_state.state2.absmax)]
    expected = sum(storages(*real).values()) + sum(scale.nbytes for scale in scales)
    assert len(packed) == 7 * LLAMA.num_hidden_layers
    found = plan_of("ppo", gpus=1, own=LLAMA, **how, quantize_base="nf4").peak
    assert sum(n for (_, kind), n in found.items() if kind == "parameters") == pytest.approx(expected, rel=0.01)
    assert {model for (model, kind), n in found.items() if kind == "parameters" and n > expected / 4} == {"actor"}
    whole = plan_of("ppo", gpus=1, own=LLAMA, **how).peak
    assert sum(n for (_, kind), n in whole.items() if kind == "parameters") > 1.5 * expected


def test_a_product_unpacks_a_weight_for_as_long_as_it_takes():
    """With adapters nothing but the weights is different: activations are those of a model that isn't quantized."""
    plain, packed = (
        sft(lora_rank=4, micro_batch_size=1, plugin="zero2", **how) for how in ({}, {"quantize_base": "nf4"})
    )
    widest = 2 * 64 * 176
    assert abs(kinds(packed)["activations"] - kinds(plain)["activations"]) <= 2 * widest


def test_every_trainer_is_an_algorithm():
    for module in pkgutil.iter_modules(coati.trainers.__path__, "coati.trainers."):
        importlib.import_module(module.name)
    waiting, found = [Trainer], set()
    while waiting:
        kind = waiting.pop()
        derived = [
            c for c in kind.__subclasses__() if c.__module__.startswith("coati.")
        ]  # others are not the package's
        waiting += derived
        if not derived:
            found.add(kind.algorithm)
    assert found == set(ALGORITHMS) == set(SETTINGS)


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: str(value))
def test_every_algorithm_can_be_planned(name, changes):
    found = plan_of(name, **changes)
    assert found.phases["learn"].total() > 0
    assert kinds(found, "learn")["optimizer states"] > 0
    rolls_out = "max_prompt_length" in SETTINGS[name]
    assert ("generate" in found.phases) == (rolls_out or (name == "sft" and "eval_data" in changes))


def test_models_are_those_of_the_run():
    shared = models(plan_of("preference"))
    assert shared == {"actor", "reference"}
    assert models(plan_of("preference", algorithm="orpo")) == {"actor"}
    assert models(plan_of("preference", lora_rank=2)) == {"actor"}
    assert models(plan_of("preference", cache_reference=True)) == {"actor"}
    assert models(plan_of("grpo")) == {"actor"}
    assert models(plan_of("grpo", kl_coefficient=0.1)) == {"actor", "reference"}
    assert models(plan_of("distill")) == models(plan_of("distill", on_policy_share=0.0)) == {"actor", "teacher"}
    assert models(plan_of("ppo")) == {"actor", "critic", "reference"}
    assert models(plan_of("ppo", shared_trunk=True, kl_coefficient=0.0)) == {"actor"}
    classifier = dict(type="classifier", path="c")
    assert models(plan_of("ppo", rewards=[classifier])) == {"actor", "critic", "reference", "classifier"}
    judge = dict(type="judge", path="j")
    assert models(plan_of("ppo", rewards=[judge])) == {"actor", "critic", "reference", "judge"}


def test_a_judge_is_counted_as_it_is_shared():
    def parameters(**changes) -> int:
        found = plan_of("ppo", rewards=[dict(type="judge", path="j")], plugin="zero1", **changes)
        return max(phase["judge", "parameters"] for phase in found.phases.values())

    assert 0 < parameters(tensor_parallel=2) < 0.75 * parameters(sequence_parallel=2)


def test_teachers_are_counted_with_their_rows():
    def of_teacher(kind: str, **changes) -> int:
        return max(phase["teacher", kind] for phase in plan_of("distill", **changes).phases.values())

    one, large = of_teacher("parameters"), LlamaConfig(**SHAPE | {"vocab_size": 4000}, num_hidden_layers=1)
    routed = dict(teacher=None, teachers={"a": "A", "b": "B"}, teacher_column="domain")
    assert of_teacher("parameters", **routed) == 2 * one
    assert of_teacher("parameters", **routed, others={"B": large}) > 2 * one + 2 * 2 * 3000 * 64 - 1
    # an average is kept in float32 beside the weights in bf16
    assert of_teacher("parameters", teacher="self", teacher_ema=0.1) == pytest.approx(3 * one, rel=0.01)
    longer = dict(teacher_prompt="{prompt} {response}", max_length=400)
    assert of_teacher("activations", **longer) > 10 * of_teacher("activations")


@pytest.mark.parametrize("max_tokens", [256, 1024])
def test_episodes_have_keys_and_values_of_rows_that_wait_and_of_those_that_come_back(max_tokens):
    """A layer in bf16; 64 responses are generated together."""
    per_token = 2 * 2 * TINY.num_hidden_layers * TINY.num_key_value_heads * TINY.head_dim
    rows = dict(gpus=1, batch_size=64, minibatches=1)
    episodes = plan_of("grpo", **rows, **TALK | dict(max_tokens=max_tokens))
    single = plan_of("grpo", **rows, max_prompt_length=max_tokens - ROLLOUTS["max_new_tokens"])
    slots = kept = 64 * max_tokens
    found = episodes.phases["generate"]["actor", "KV cache"]
    assert found >= per_token * (slots + kept + min(kept, 4 * 8192))
    assert found > single.phases["generate"]["actor", "KV cache"]
    for phase in ("learn", "evaluate"):
        assert episodes.phases[phase]["actor", "KV cache"] == 0


@pytest.mark.parametrize("on_gpu", [True, False])
def test_vllm_has_weights_and_a_cache_of_its_own_and_sleeps_on_a_gpu(on_gpu):
    found = plan_of("grpo", rollout_engine="vllm", vllm_cache=0.5, on_gpu=on_gpu)
    generating, training = found.phases["generate"], found.phases["learn"]
    assert generating["vLLM", "KV cache"] == 2**29
    assert generating["vLLM", "parameters"] == pytest.approx(generating["actor", "parameters"], rel=0.01)
    kept = {item: 0 if on_gpu else generating[item] for item in generating if item[0] == "vLLM"}
    assert {item: training[item] for item in kept} == kept


def test_what_is_read_once_is_the_prompt_and_not_the_responses():
    def activations(**lengths):
        whole, shared = (
            kinds(plan_of("grpo", share_prompts=share, group_size=4, micro_batch_size=4, **lengths), "learn")
            for share in (False, True)
        )
        return shared["activations"] / whole["activations"]

    assert activations(max_prompt_length=64, max_new_tokens=4) < 0.5  # 80 tokens for 272
    assert activations(max_prompt_length=8, max_new_tokens=64) > 0.8  # 264 for 288


def test_gemini_shards_frozen_models_too():
    large = LlamaConfig(**SHAPE | {"hidden_size": 1024, "vocab_size": 32000}, num_hidden_layers=1)
    one, eight = (plan_of("preference", gpus, large, plugin="gemini", batch_size=8).peak for gpus in (1, 8))
    assert eight["reference", "parameters"] < 0.2 * one["reference", "parameters"]


def test_a_reward_model_of_another_depth_is_continued_by_its_own():
    deep, shallow = (LlamaConfig(**SHAPE, num_hidden_layers=layers) for layers in (16, 2))
    found = plan_of("ppo", own=deep, others={"scorer": shallow}, rewards=[reward_model("scorer")]).peak
    width = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 176 + 2 * 64
    assert found["reward model", "parameters"] == pytest.approx(2 * (1000 * 64 + 2 * width), rel=0.01)
    assert found["actor", "parameters"] == pytest.approx(2 * (2 * 1000 * 64 + 16 * width), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(rollout_engine="vllm", plugin="gemini"), "vLLM .* ddp, zero1, zero2, or --rollout_engine coati"),
        (dict(batch_size=3), "not a multiple"),
        (dict(group_size=1), "group_size must be at least 2"),
        (
            dict(router_loss=0.1, plugin="zero1", pipeline_parallel=2),
            "router_loss needs all layers .* leave out pipeline_parallel",
        ),
    ],
)
def test_a_plan_refuses_what_the_run_would(changes, words):
    with pytest.raises(UserError, match=words):
        plan_of("grpo", **changes)


def test_a_plan_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan_of("preference", cache_reference=True, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
