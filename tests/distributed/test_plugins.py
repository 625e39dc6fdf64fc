"""Every plugin on two processes against one process: the same losses, the same weights, exact resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import functions, settings_for
from tests.distributed.forks import run_jobs

pytestmark = pytest.mark.distributed
FP32_PLUGINS = ("ddp", "zero1", "zero2", "zero2-offload")
PLUGINS = (*FP32_PLUGINS, "gemini")
ALGORITHMS = ("sft", "reward", "ppo", "ppo-shared", "grpo")
BF16 = dict(precision="bf16", learning_rate=1e-3)  # a small rate, or Adam makes much of rounding
IN_BF16 = ("sft", "reward")  # which gemini is compared with
STEPS = 4
BEFORE = 2  # steps before the checkpoint that is resumed
# zero2 with every algorithm, the others with those that are most unlike; the rest of the table is slow
QUICK = dict(ddp=("reward", "ppo"), zero1=("sft", "grpo"), zero2=ALGORITHMS)
QUICK |= {"zero2-offload": ("ppo",), "gemini": ("sft", "reward", "ppo-shared")}
CASES = [(plugin, algorithm) for plugin, algorithms in QUICK.items() for algorithm in algorithms]
REST = [(plugin, algorithm) for plugin in FP32_PLUGINS for algorithm in ALGORITHMS if (plugin, algorithm) not in CASES]
# each plugin and each algorithm once; test_resume.py has the others, as slow tests
RESUMED = tuple(zip(PLUGINS, ("reward", "grpo", "sft", "ppo", "ppo-shared"), strict=True))


def job(name: str, algorithm: str, world, folder: Path, **changes) -> dict:
    if algorithm == "ppo-shared":
        algorithm, changes = "ppo", changes | dict(shared_trunk=True)
    if algorithm == "grpo":  # a reward that is often the same for a whole group
        changes |= dict(
            dynamic_sampling=True, group_size=2, rewards=functions(world["rewards"] + ":odd"), kl_coefficient=0.05
        )
    settings = settings_for(algorithm, world, output_dir=str(folder / name), steps=STEPS, save_every=BEFORE, **changes)
    return {"name": name, "algorithm": algorithm, "settings": settings | {"keep_checkpoints": 9}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture(scope="module")
def one_process(tiny_world, folder):
    return run_jobs([job(f"one-{a}", a, tiny_world, folder) for a in ALGORITHMS], folder / "one", 1)


@pytest.fixture(scope="module")
def two_processes(tiny_world, folder):
    """The quick runs, and of some the second half again from the checkpoint in the middle."""
    jobs = []
    for plugin, algorithm in CASES:
        changes = dict(plugin=plugin) | (BF16 if plugin == "gemini" else {})
        whole = job(f"{plugin}-{algorithm}", algorithm, tiny_world, folder, **changes)
        jobs.append(whole)
        if (plugin, algorithm) in RESUMED:
            checkpoint = folder / whole["name"] / "checkpoints" / f"step-{BEFORE:08d}"
            changes |= dict(resume=str(checkpoint))
            jobs.append(job(f"{plugin}-{algorithm}-resumed", algorithm, tiny_world, folder, **changes))
    for algorithm in IN_BF16:
        bf16 = dict(plugin="zero2") | BF16
        jobs.append(job(f"zero2-bf16-{algorithm}", algorithm, tiny_world, folder, **bf16))
    warmup = dict(plugin="zero2", critic_warmup=BEFORE + 1)
    jobs.append(job("warmup", "ppo", tiny_world, folder, **warmup))
    checkpoint = folder / "warmup" / "checkpoints" / f"step-{BEFORE:08d}"
    jobs.append(job("warmup-resumed", "ppo", tiny_world, folder, **warmup, resume=str(checkpoint)))
    jobs.append(job("lora", "sft", tiny_world, folder, plugin="zero2", lora_rank=2, model=tiny_world["policy"]))
    return run_jobs(jobs, folder / "two", 2)


def curve(result: dict) -> list[float]:
    return [
        step[name] for step in result["steps"] for name in ("loss", "policy_loss", "value_loss", "kl") if name in step
    ]


@pytest.mark.parametrize(("plugin", "algorithm"), [case for case in CASES if case[0] in FP32_PLUGINS])
def test_a_plugin_on_two_processes_gives_the_single_process_curve(plugin, algorithm, one_process, two_processes):
    """PITFALL 9, 12, 28, 35: global denominators, common decisions, and all of it on a CPU."""
    assert_same(two_processes[f"{plugin}-{algorithm}"], one_process[f"one-{algorithm}"])


@pytest.mark.slow
def test_so_does_every_plugin_with_every_algorithm(tiny_world, folder, one_process):
    jobs = [job(f"{plugin}-{algorithm}", algorithm, tiny_world, folder, plugin=plugin) for plugin, algorithm in REST]
    found = run_jobs(jobs, folder / "rest", 2)
    for plugin, algorithm in REST:
        assert_same(found[f"{plugin}-{algorithm}"], one_process[f"one-{algorithm}"])


def assert_same(found: dict, expected: dict):
    """The curve, and the final weights by two projections of each."""
    assert curve(found) == pytest.approx(curve(expected), rel=1e-4, abs=1e-5)
    for name, numbers in expected["weights"].items():
        assert found["weights"][name] == pytest.approx(numbers, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("algorithm", IN_BF16)
def test_gemini_gives_the_curve_of_zero2_in_bf16(algorithm, two_processes):
    """Both round to 8 bits of mantissa, at different places: 1 % apart. (Greedy responses of PPO would differ.)"""
    expected, found = two_processes[f"zero2-bf16-{algorithm}"], two_processes[f"gemini-{algorithm}"]
    assert curve(found) == pytest.approx(curve(expected), rel=1e-2, abs=1e-2)
    norms = [[step["grad_norm"] for step in result["steps"]] for result in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=5e-2)


@pytest.mark.parametrize(("plugin", "algorithm"), RESUMED)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(plugin, algorithm, two_processes, folder):
    """PITFALL 13, 25: under every plugin; for gemini in bf16 too, thanks to the stored master weights."""
    whole, resumed = two_processes[f"{plugin}-{algorithm}"], two_processes[f"{plugin}-{algorithm}-resumed"]
    assert curve(whole)[-len(curve(resumed)) :] == curve(resumed)
    for model in ("model", "critic") if algorithm == "ppo" else ("model",):
        paths = [folder / f"{plugin}-{algorithm}{end}" / model / "model.safetensors" for end in ("", "-resumed")]
        expected, found = (load_file(path) for path in paths)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_stopped_in_the_critics_warm_up_resumes(two_processes):
    """Its actor's optimizer has no state yet."""
    assert curve(two_processes["warmup"])[-len(curve(two_processes["warmup-resumed"])) :] == curve(
        two_processes["warmup-resumed"]
    )


def test_lora_trains_under_zero(two_processes, folder):
    assert two_processes["lora"]["steps"][-1]["loss"] < two_processes["lora"]["steps"][0]["loss"]
    assert (folder / "lora" / "checkpoints" / f"step-{STEPS:08d}" / "model" / "model" / "adapter_config.json").is_file()


def test_sharding_really_happens(tiny_world, folder, two_processes):
    """Each rank stores half of the master weights under gemini."""
    checkpoint = folder / "gemini-sft" / "checkpoints" / f"step-{BEFORE:08d}" / "model"
    assert len(list(checkpoint.glob("master-*-of-2.safetensors"))) == 2
