"""Tensor, pipeline and sequence parallelism against one process: the same losses, weights and greedy responses; every
layout's checkpoint goes on under every other.

Figures of every layout and architecture are in docs/plugins.md: `python tools/layout_table.py` writes them.
"""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.forks import run_jobs
from tests.distributed.world import LAYOUTS, family_job, make_family, runs_under

pytestmark = pytest.mark.distributed
FAMILIES = ("llama", "qwen3", "gpt2", "opt")
OTHERS = ("mistral", "qwen2", "gemma", "phi", "olmo2")
EXPERTS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss")
ALGORITHMS = ("sft", "reward", "ppo")
TWO = ("tp2", "tp2, split_sequence", "pp2", "sp2")
WHOLE = ("ddp", "zero1", "zero2", "zero2-offload")  # test_plugins.py has these every time, for one architecture
FOUR = ("tp2 x pp2", "tp2 x zero1")
SAVED = {
    "ddp": dict(plugin="ddp"),
    "zero2": dict(plugin="zero2"),
    "gemini": dict(plugin="gemini", precision="bf16"),
    "tp2": LAYOUTS["tp2"],
    "pp2": LAYOUTS["pp2"],
}
BEFORE = 2  # steps before the checkpoint that others go on from


def crossings(layouts) -> list[tuple[str, str]]:
    """From each layout to the next one, so that each is left and reached."""
    names = list(layouts)
    return list(zip(names, names[1:] + names[:1], strict=True))


CROSSINGS = crossings(SAVED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def worlds(tiny_world, folder) -> dict[str, dict]:
    return {family: make_family(family, tiny_world, folder) for family in FAMILIES + OTHERS + EXPERTS}


def cases(layouts, pairs) -> list[tuple[str, str, str]]:
    """Each layout with each of these families and algorithms."""
    return [
        (layout, family, algorithm) for layout in layouts for family, algorithm in pairs if runs_under(layout, family)
    ]


# every layout, every algorithm and every architecture; the rest of the table is slow
QUICK = cases(TWO, [("llama", "ppo")])
QUICK += [("tp2, split_sequence", "llama", "sft"), ("pp2", "llama", "reward")]
QUICK += [("pp2", "qwen3", "ppo"), ("pp2", "gpt2", "ppo"), ("tp2", "opt", "ppo")]
REST = [case for case in cases(TWO, [("llama", algorithm) for algorithm in ALGORITHMS]) if case not in QUICK]
# dense and shared experts beside the others; latent attention; sinks, and experts' biases; norms across heads
OF_EXPERTS = cases(("tp2, split_sequence", "pp2"), [("glm4_moe", "ppo")])
OF_EXPERTS += cases(("tp2",), [("deepseek_v3", "sft"), ("gpt_oss", "sft"), ("olmoe", "sft")])
QUICK += OF_EXPERTS
LONG = ("zero2", "tp2", "pp2", "sp2")  # with what spares memory for long rows
# without padding: pairs, windows, experts, a reference
PADDING_FREE = [("zero2", "llama", "ppo"), ("tp2", "qwen2_moe", "sft"), ("zero2", "mistral", "preference")]
PADDING_FREE += [("zero2", "llama", "grpo"), ("ddp", "llama", "reward")]
EVENED = ("one", "zero2", "tp2, split_sequence", "sp2")  # with a loss that evens the load of experts
# policy, critic and a reference without adapters; norms per head and tied ends; fused layers
ADAPTED = cases(("tp2, split_sequence", "pp2", "sp2"), [("llama", "ppo")])
ADAPTED += cases(("tp2",), [(family, "sft") for family in ("qwen3", "gpt2", "deepseek_v3")])
QUANTIZED = cases(("zero2",), [("llama", "ppo"), ("gpt2", "sft")])
EVERY_QUANTIZED = cases(WHOLE, [(family, "ppo") for family in FAMILIES + OTHERS + EXPERTS])
EVERY_ADAPTED = [(family, "ppo") for family in FAMILIES + OTHERS + EXPERTS]
EVERY_ADAPTED += [("llama", algorithm) for algorithm in ("sft", "reward", "grpo", "preference")]


def jobs(worlds, folder, layouts, families=FAMILIES) -> list[dict]:
    return jobs_of(cases(layouts, list(itertools.product(families, ALGORITHMS))), worlds, folder)


def jobs_of(some_cases, worlds, folder) -> list[dict]:
    return [
        family_job(f"{layout}-{family}-{algorithm}", algorithm, worlds[family], folder, **LAYOUTS.get(layout, {}))
        | {"few_logits": layout != "one"}
        for layout, family, algorithm in some_cases
    ]


def adapted_jobs(some_cases, worlds, folder, kind: str = "lora") -> list[dict]:
    """With LoRA, or ("qlora") with LoRA on a base in 4 bits."""
    found, of_kind = [], dict(lora_rank=4, lora_alpha=32.0) | ({"quantize_base": "nf4"} if kind == "qlora" else {})
    for layout, family, algorithm in some_cases:
        name = f"{layout}-{family}-{kind} {algorithm}"
        found.append(family_job(name, algorithm, worlds[family], folder, **of_kind | LAYOUTS.get(layout, {})))
    return found


def alone(some_cases) -> list[tuple[str, str, str]]:
    """The runs of one process that cases are compared with."""
    return list(dict.fromkeys(("one", *case[1:]) for case in some_cases))


def evened_jobs(layouts, worlds, folder) -> list[dict]:
    changes = dict(router_loss=0.5)
    return [
        family_job(f"{layout}-evened", "sft", worlds["qwen2_moe"], folder, **changes, **LAYOUTS.get(layout, {}))
        for layout in layouts
    ]


def padding_free_jobs(some_cases, worlds, folder) -> list[dict]:
    """Those of one process have padding."""
    found = []
    for layout, family, algorithm in some_cases:
        changes = dict(max_tokens_per_batch=200, padding_free=layout != "one") | LAYOUTS.get(layout, {})
        name = f"{layout}-{family}-{algorithm} without padding"
        found.append(family_job(name, algorithm, worlds[family], folder, **changes))
    return found


def long_jobs(worlds, folder) -> list[dict]:
    changes = dict(gradient_checkpointing=True, offload_activations=True, feed_forward_tokens=8)
    return [
        family_job(f"{layout}-long", "sft", worlds["llama"], folder, **changes, **LAYOUTS[layout]) for layout in LONG
    ]


@pytest.fixture(scope="module")
def one_process(worlds, folder):
    ours = jobs_of(alone(QUICK), worlds, folder) + evened_jobs(EVENED[:1], worlds, folder)
    ours += adapted_jobs(alone(ADAPTED), worlds, folder)
    ours += adapted_jobs(alone(QUANTIZED), worlds, folder, "qlora")
    ours += padding_free_jobs(alone(PADDING_FREE), worlds, folder)
    return run_jobs(ours, folder / "one", 1)


@pytest.fixture(scope="module")
def two_processes(worlds, folder):
    ours = jobs_of(QUICK, worlds, folder) + adapted_jobs(ADAPTED, worlds, folder)
    ours += adapted_jobs(QUANTIZED, worlds, folder, "qlora") + long_jobs(worlds, folder)
    ours += padding_free_jobs(PADDING_FREE, worlds, folder)
    return run_jobs(ours + evened_jobs(EVENED[1:], worlds, folder), folder / "two", 2)


@pytest.fixture(scope="module")
def one_process_each(worlds, folder):
    """For the slow tests: every architecture with every algorithm."""
    return run_jobs(jobs(worlds, folder / "each", ["one"]), folder / "each", 1)


@pytest.fixture(scope="module")
def four_processes(worlds, folder):
    return run_jobs(jobs(worlds, folder, FOUR, ["llama"]), folder / "four", 4)


def assert_same(found: dict, expected: dict):
    """Every metric of every step, and the final weights by two projections of each."""
    for mine, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, numbers in expected["weights"].items():
        # pairs tell differences only, so a norm's bias before the head learns nothing but rounding errors
        tolerance = 1e-3 if name.endswith(("ln_f.bias", "final_layer_norm.bias", "final_layernorm.bias")) else 1e-4
        assert found["weights"][name] == pytest.approx(numbers, rel=1e-4, abs=tolerance), name


@pytest.mark.parametrize(("layout", "family", "algorithm"), QUICK)
def test_two_processes_give_the_single_process_run(layout, family, algorithm, one_process, two_processes):
    assert_same(two_processes[f"{layout}-{family}-{algorithm}"], one_process[f"one-{family}-{algorithm}"])


@pytest.fixture(scope="module")
def the_rest(worlds, folder):
    return run_jobs(jobs_of(REST, worlds, folder), folder / "rest", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "family", "algorithm"), REST)
def test_so_does_every_layout_with_every_algorithm(layout, family, algorithm, one_process_each, the_rest):
    assert_same(the_rest[f"{layout}-{family}-{algorithm}"], one_process_each[f"one-{family}-{algorithm}"])


@pytest.mark.parametrize("layout", EVENED[1:])
def test_the_load_of_experts_is_evened_alike(layout, one_process, two_processes):
    expected = one_process["one-evened"]
    assert expected["steps"][-1]["router_loss"] > 1.001
    assert_same(two_processes[f"{layout}-evened"], expected)


@pytest.mark.parametrize(("layout", "family", "algorithm"), PADDING_FREE)
def test_rows_without_padding_are_learned_as_padded_ones(layout, family, algorithm, one_process, two_processes):
    found, expected = (f"{where}-{family}-{algorithm} without padding" for where in (layout, "one"))
    assert_same(two_processes[found], one_process[expected])


@pytest.mark.parametrize("layout", LONG)
def test_rows_in_stretches_are_learned_as_whole_ones(layout, one_process, two_processes):
    """Layers whose inputs wait on the host, and feed-forward blocks of 8 tokens at a time."""
    assert_same(two_processes[f"{layout}-long"], one_process["one-llama-sft"])


@pytest.mark.parametrize(("layout", "family", "algorithm"), OF_EXPERTS)
def test_experts_are_stored_under_the_hubs_names(layout, family, algorithm, folder, two_processes):
    """One by one, as published checkpoints have them, whatever process had which; gpt-oss has them stacked there."""
    from transformers import AutoModelForCausalLM

    path = folder / f"{layout}-{family}-{algorithm}" / "model"
    stored = load_file(path / "model.safetensors")
    first = "gate_up_proj" if family == "gpt_oss" else "0.gate_proj.weight"
    assert f"model.layers.2.mlp.experts.{first}" in stored
    _, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    expected = load_file(folder / f"one-{family}-{algorithm}" / "model" / "model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.allclose(stored[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


@pytest.mark.parametrize(("layout", "family", "algorithm"), ADAPTED)
def test_adapters_train_as_in_a_single_process(layout, family, algorithm, folder, one_process, two_processes):
    """And are merged into the same model, though no process has all of it."""
    found, expected = f"{layout}-{family}-lora {algorithm}", f"one-{family}-lora {algorithm}"
    assert_same(two_processes[found], one_process[expected])
    assert all(norm > 1e-4 for name, (norm, _) in one_process[expected]["weights"].items() if "lora_B" in name)
    found, expected = (load_file(folder / name / "model" / "model.safetensors") for name in (found, expected))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


@pytest.mark.parametrize(("layout", "family", "algorithm"), QUANTIZED)
def test_adapters_on_a_base_in_4_bits_train_as_in_a_single_process(
    layout, family, algorithm, folder, one_process, two_processes
):
    found, expected = f"{layout}-{family}-qlora {algorithm}", f"one-{family}-qlora {algorithm}"
    assert_same(two_processes[found], one_process[expected])
    found, expected = (load_file(folder / name / "model" / "model.safetensors") for name in (found, expected))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


@pytest.fixture(scope="module")
def whole(worlds, folder):
    return run_jobs(jobs(worlds, folder, (*WHOLE, "gemini, bf16")), folder / "whole", 2)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plugin", WHOLE)
def test_the_plugins_that_keep_models_whole_do_for_every_architecture(
    plugin, family, algorithm, one_process_each, whole
):
    assert_same(whole[f"{plugin}-{family}-{algorithm}"], one_process_each[f"one-{family}-{algorithm}"])


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ("sft", "reward"))
@pytest.mark.parametrize("family", FAMILIES)
def test_gemini_in_bf16_stays_near_the_fp32_run(family, algorithm, one_process_each, whole):
    """bf16 has 8 bits of mantissa: losses within 2 % of the loss or of 1. (Greedy responses of PPO differ.)"""
    expected, found = (r[f"{n}-{family}-{algorithm}"] for r, n in ((one_process_each, "one"), (whole, "gemini, bf16")))
    losses = [[step["loss"] for step in result["steps"]] for result in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2, abs=2e-2)


@pytest.fixture(scope="module")
def others(worlds, folder):
    results = {}
    for family in FAMILIES[1:] + OTHERS + EXPERTS:
        for processes, layouts in ((1, ("one",)), (2, TWO)):
            ours = jobs(worlds, folder / "others", layouts, [family])
            results |= run_jobs(ours, folder / f"others-{family}-{processes}", processes)
    return results


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("layout", "family", "algorithm"), cases(TWO, list(itertools.product(FAMILIES[1:] + OTHERS + EXPERTS, ALGORITHMS)))
)
def test_the_other_architectures_do_too(layout, family, algorithm, others):
    assert_same(others[f"{layout}-{family}-{algorithm}"], others[f"one-{family}-{algorithm}"])


@pytest.mark.slow
def test_rows_of_32_thousand_tokens_are_learned_as_in_a_single_process(tiny_world, tmp_path):
    """Two processes hold half of a row each. Weights are compared less strictly than those of short rows: Adam's first
    step is as long where a gradient is the rounding of a sum over the row."""
    world, draw = make_family("llama", tiny_world, tmp_path), random.Random(0)
    shape = Path(world["policy"]) / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"max_position_embeddings": 2**16}))
    rows = [{"prompt": "one", "completion": " ".join(draw.choices("0123456789", k=2**14))} for _ in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(train_data=[str(tmp_path / "rows.jsonl")], eval_data=[], max_length=2**16)
    few = data | dict(steps=1, batch_size=1, micro_batch_size=1, gradient_checkpointing=True)
    jobs = [family_job(name, "sft", world, tmp_path, **few, **LAYOUTS.get(name, {})) for name in ("one", "sp2")]
    expected = run_jobs(jobs[:1], tmp_path / "alone", 1)["one"]
    found = run_jobs(jobs[1:], tmp_path / "together", 2)["sp2"]
    [mine], [theirs] = found["steps"], expected["steps"]
    assert theirs["tokens"] > 2**15 and theirs["loss"] > 1
    assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    for name, numbers in expected["weights"].items():
        assert found["weights"][name] == pytest.approx(numbers, rel=1e-3, abs=1e-3), name


@pytest.fixture(scope="module")
def every_adapted(worlds, folder):
    results = {}
    for processes, layouts in ((1, ("one",)), (2, TWO), (4, FOUR)):
        ours = adapted_jobs(cases(layouts, EVERY_ADAPTED), worlds, folder / "every")
        results |= run_jobs(ours, folder / f"every-{processes}", processes)
    return results


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("layout", "family", "algorithm"), cases((*TWO, *FOUR), EVERY_ADAPTED))
def test_adapters_do_for_every_architecture(layout, family, algorithm, every_adapted):
    assert_same(every_adapted[f"{layout}-{family}-lora {algorithm}"], every_adapted[f"one-{family}-lora {algorithm}"])


@pytest.fixture(scope="module")
def every_quantized(worlds, folder):
    ours = {
        n: adapted_jobs(some, worlds, folder / "every", "qlora")
        for n, some in ((1, alone(EVERY_QUANTIZED)), (2, EVERY_QUANTIZED))
    }
    return run_jobs(ours[1], folder / "quantized-1", 1) | run_jobs(ours[2], folder / "quantized-2", 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("layout", "family", "algorithm"), EVERY_QUANTIZED)
def test_those_on_a_base_in_4_bits_do_for_every_architecture(layout, family, algorithm, every_quantized):
    names = (f"{where}-{family}-qlora {algorithm}" for where in (layout, "one"))
    assert_same(*(every_quantized[name] for name in names))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", FOUR)
def test_four_processes_give_the_single_process_run(layout, algorithm, one_process_each, four_processes):
    assert_same(four_processes[f"{layout}-llama-{algorithm}"], one_process_each[f"one-llama-{algorithm}"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_replayed_experts_are_those_of_a_single_process(family, worlds, folder):
    found = []
    for processes, layouts in ((1, ("one",)), (2, ("tp2", "zero2"))):
        ours = []
        for layout in layouts:
            changes = dict(router_replay=True) | LAYOUTS.get(layout, {})
            ours.append(family_job(f"{layout}-{family}-replay", "ppo", worlds[family], folder, **changes))
        found += run_jobs(ours, folder / f"replay-{family}-{processes}", processes).values()
    for result in found[1:]:
        assert_same(result, found[0])


@pytest.fixture(scope="module")
def four_processes_of_gpt2(worlds, folder):
    return run_jobs(jobs(worlds, folder, FOUR, ["gpt2"]), folder / "four-gpt2", 4)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", FOUR)
def test_four_processes_do_for_another_shape_of_layers(layout, algorithm, one_process_each, four_processes_of_gpt2):
    assert_same(four_processes_of_gpt2[f"{layout}-gpt2-{algorithm}"], one_process_each[f"one-gpt2-{algorithm}"])


@pytest.mark.parametrize(("layout", "family", "algorithm"), [case for case in QUICK if case[2] != "reward"])
def test_greedy_responses_are_the_single_process_ones(layout, family, algorithm, folder, one_process, two_processes):
    """PITFALL: tensor-parallel logits are a range of the vocabulary, and a token sampled from it is silently wrong."""
    expected, found = (
        [
            json.loads(line)
            for path in sorted((folder / f"{name}-{family}-{algorithm}").glob("samples*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        for name in ("one", layout)
    )
    first = expected[0]["step"]
    expected, found = ([row for row in rows if row["step"] == first] for rows in (expected, found))
    assert len(expected) > 2
    assert [row["response"] for row in found] == [row["response"] for row in expected]


@pytest.fixture(scope="module")
def saved(worlds, folder):
    """A run under each layout, with a checkpoint in the middle."""
    settings = dict(steps=2 * BEFORE, save_every=BEFORE, keep_checkpoints=9)
    ours = [family_job(f"{name}-saved", "sft", worlds["gpt2"], folder, **settings, **c) for name, c in SAVED.items()]
    return run_jobs(ours, folder / "saved", 2)


@pytest.fixture(scope="module")
def resumed(worlds, folder, saved):
    """Those checkpoints, gone on from under other layouts."""
    return gone_on(CROSSINGS, worlds, folder, "resumed")


def gone_on(crossings, worlds, folder, name: str) -> dict:
    settings = dict(steps=2 * BEFORE, save_every=BEFORE, keep_checkpoints=9)
    ours = []
    for source, target in crossings:
        checkpoint = str(folder / f"{source}-saved" / "checkpoints" / f"step-{BEFORE:08d}")
        changes = settings | SAVED[target] | dict(resume=checkpoint)
        ours.append(family_job(f"{source}-to-{target}", "sft", worlds["gpt2"], folder, **changes))
    return run_jobs(ours, folder / name, 2)


@pytest.mark.parametrize(("source", "target"), CROSSINGS)
def test_a_checkpoint_goes_on_under_any_layout(source, target, saved, resumed):
    """Weights, optimizer states, data order. Gemini computes in bf16: its curve is within its rounding."""
    expected = [step["loss"] for step in saved["ddp-saved"]["steps"][BEFORE:]]
    found = [step["loss"] for step in resumed[f"{source}-to-{target}"]["steps"]]
    tolerance = 1e-2 if "gemini" in (source, target) else 1e-5
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_under_its_own_layout_to_the_last_bit(worlds, folder, saved):
    resumed = gone_on([(layout, layout) for layout in SAVED], worlds, folder, "to-themselves")
    for layout in SAVED:
        expected = [step["loss"] for step in saved[f"{layout}-saved"]["steps"][BEFORE:]]
        assert [step["loss"] for step in resumed[f"{layout}-to-{layout}"]["steps"]] == expected


SAVED_ADAPTED = {name: SAVED[name] for name in ("ddp", "tp2", "pp2")}
NEXT = {"ddp": "tp2", "tp2": "pp2", "pp2": "ddp"}


@pytest.fixture(scope="module")
def adapted(worlds, folder):
    """As `saved` and `resumed`, with LoRA."""
    settings = dict(steps=2 * BEFORE, save_every=BEFORE, keep_checkpoints=9, lora_rank=4, merge_lora=False)
    first, then = [], []
    for source, layout in SAVED_ADAPTED.items():
        first.append(family_job(f"lora {source}", "sft", worlds["qwen3"], folder, **settings, **layout))
        checkpoint = str(folder / f"lora {source}" / "checkpoints" / f"step-{BEFORE:08d}")
        for target in (source, NEXT[source]):
            changes = settings | SAVED_ADAPTED[target] | dict(resume=checkpoint)
            then.append(family_job(f"lora {source}-to-{target}", "sft", worlds["qwen3"], folder, **changes))
    return run_jobs(first + then, folder / "adapted", 2)


@pytest.mark.parametrize(("source", "target"), [*NEXT.items(), *((name, name) for name in NEXT)])
def test_adapters_go_on_under_any_layout(source, target, adapted, folder):
    expected = [step["loss"] for step in adapted["lora ddp"]["steps"][BEFORE:]]
    found = [step["loss"] for step in adapted[f"lora {source}-to-{target}"]["steps"]]
    assert found == pytest.approx(expected, rel=1e-5)
    if source == target:
        assert found == [step["loss"] for step in adapted[f"lora {source}"]["steps"][BEFORE:]]
    plain = load_file(folder / "lora ddp" / "model" / "adapter_model.safetensors")
    stored = load_file(folder / f"lora {source}-to-{target}" / "model" / "adapter_model.safetensors")
    assert stored.keys() == plain.keys()
    assert all(torch.allclose(stored[name], plain[name], rtol=1e-4, atol=1e-5) for name in plain)


@pytest.mark.parametrize("source", SAVED)
def test_any_layout_leaves_a_model_that_plain_transformers_opens(source, saved, folder):
    from transformers import AutoModelForCausalLM

    path = folder / f"{source}-saved" / "model"
    model = AutoModelForCausalLM.from_pretrained(path)
    stored = load_file(path / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    if source not in ("ddp", "gemini"):
        plain = load_file(folder / "ddp-saved" / "model" / "model.safetensors")
        assert stored.keys() == plain.keys()
        assert all(torch.allclose(stored[name], plain[name], rtol=1e-4, atol=1e-4) for name in plain)
