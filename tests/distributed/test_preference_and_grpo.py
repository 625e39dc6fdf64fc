"""DPO (with its reference cached, too), KTO, GRPO (over several turns, too) and distillation on two processes: each
plugin and layout gives the run of one process, and a resumed run is the uninterrupted one to the last bit.

Figures of every layout are in docs/plugins.md: `python tools/layout_table.py` writes them.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.config.plugin import PluginConfig
from tests.conftest import ROOT, functions
from tests.distributed import test_model_parallel
from tests.distributed.forks import run_jobs
from tests.distributed.world import LAYOUTS, family_job, make_family, without_ties
from tests.trainers.steps import with_teachers

pytestmark = pytest.mark.distributed
KINDS = {"dpo": {}, "cached": dict(cache_reference=True), "kto": dict(algorithm="kto")}
# a reward that is often the same for a whole group, and a reference
KINDS["grpo"] = dict(group_size=2, dynamic_sampling=True, kl_coefficient=0.05)
# an environment, whose episodes have more turns on one rank than on the other
TALK = dict(environment=f"{ROOT / 'tests' / 'talk.py'}:Talk", max_turns=3, max_tokens=100, stop=["e", "o"])
KINDS["episodes"] = dict(group_size=2, kl_coefficient=0.05) | TALK
KINDS["distill"] = dict(distill_temperature=0.7)
# a teacher that reads another prompt, and one that is an average of the student
KINDS["taught"] = dict(on_policy_share=1.0, teacher_prompt="{response} thank {prompt}", skip_tokens=1)
KINDS["averaged"] = KINDS["taught"] | dict(teacher="self", teacher_ema=0.2)
# two teachers of rows that are not the same share on both ranks
KINDS["routed"] = dict(teacher=None, teacher_column="domain", micro_batch_size=4)
ALGORITHMS = {"grpo": "grpo", "episodes": "grpo"} | dict.fromkeys(
    ("distill", "taught", "averaged", "routed"), "distill"
)
QUICK = {"dpo": ("tp2", "sp2"), "cached": ("zero2",), "kto": ("zero2", "pp2")}
QUICK["grpo"] = ("tp2", "pp2")  # test_plugins.py has the plugins that keep models whole
QUICK["episodes"] = ("zero2", "tp2")
QUICK["distill"] = ("sp2",)
QUICK |= {"taught": ("pp2",), "averaged": ("zero2",), "routed": ("zero2",)}
CASES = [(kind, layout) for kind, layouts in QUICK.items() for layout in layouts]
TWO = tuple(name for name in LAYOUTS if " x " not in name and name != "gemini, bf16")
BF16 = {"gemini": dict(plugin="gemini", precision="bf16"), "zero2, bf16": dict(plugin="zero2", precision="bf16")}
RESUMED = (("cached", "zero2"), ("episodes", "zero2"))
RESUMED_SLOW = (("kto", "pp2"), ("grpo", "tp2"))
FOUR = tuple(name for name in LAYOUTS if " x " in name)
BEFORE = 2  # steps before the checkpoint
SAVED = dict(save_every=BEFORE, keep_checkpoints=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("preference")


@pytest.fixture(scope="module")
def world(tiny_world, folder) -> dict[str, str]:
    """With a teacher of another architecture, whose output layer has as many rows."""
    return several_teachers(tiny_world, folder)


def several_teachers(world, folder: Path) -> dict[str, str]:
    rows = with_teachers(world["sft"], folder)
    first, second = (make_family(family, world, folder)["policy"] for family in ("qwen3", "gpt2"))
    return make_family("llama", world, folder) | {"teacher": first, "second teacher": second, "taught": rows}


def job(name: str, kind: str, world, folder: Path, **changes) -> dict:
    """Every run caches for itself: the log-probs of one layout are not those of another to the last bit."""
    changes = dict(cache_dir=str(folder / "cache" / name.removesuffix("-resumed"))) | KINDS[kind] | changes
    if kind == "grpo":
        changes["rewards"] = functions(world["rewards"] + ":odd")
    if kind == "episodes":
        # beside the environment's, so that no group ties: while the policy is its reference, a tie's gradients are
        # rounding errors, which Adam's first step makes as large as any
        changes["rewards"] = functions(world["rewards"] + ":length")
    if kind == "routed":
        changes |= dict(teachers={"a": world["teacher"], "b": world["second teacher"]}, eval_data=[])
        changes["train_data"] = [world["taught"]]
    algorithm = ALGORITHMS.get(kind, "preference")
    ours = family_job(name, algorithm, world, folder, **changes)
    return ours | {"few_logits": algorithm == "distill" and not name.startswith("one")}


def jobs(world, folder, cases) -> list[dict]:
    return [job(f"{layout}-{kind}", kind, world, folder, **LAYOUTS.get(layout, {})) for kind, layout in cases]


def is_supported(kind: str, layout: dict) -> bool:
    """Whether a kind runs under a layout: another prompt for the teacher needs whole rows, an average whole models; one
    of two teachers is a gpt2, which can't split the sequence between its layers."""
    config = configure(PluginConfig, **{name: value for name, value in layout.items() if "batch" not in name})
    if kind == "averaged":
        return config.holds_whole_models
    if kind == "routed":
        return not config.split_sequence
    return kind != "taught" or not config.splits_sequences


def assert_same(found: dict, expected: dict):
    test_model_parallel.assert_same(*(run | {"steps": without_ties(run["steps"])} for run in (found, expected)))


@pytest.fixture(scope="module")
def one_process(world, folder):
    return run_jobs(jobs(world, folder, [(kind, "one") for kind in KINDS]), folder / "one", 1)


@pytest.fixture(scope="module")
def two_processes(world, folder):
    """The quick layouts, with checkpoints, and some of them again from the checkpoint."""
    ours = [j | {"settings": j["settings"] | SAVED} for j in jobs(world, folder, CASES)]
    ours += [resumed_job(kind, layout, world, folder) for kind, layout in RESUMED]
    ours += [job(f"{name}-kto", "kto", world, folder, **c) for name, c in BF16.items()]
    return run_jobs(ours, folder / "two", 2)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_two_processes_give_the_single_process_run(kind, layout, one_process, two_processes):
    """PITFALL 9: the losses' denominators and KTO's KL are the global batch's. Log-ratios grow from 0 on."""
    last = one_process[f"one-{kind}"]["steps"][-1]
    assert abs(last.get("margin", 1.0)) > 1e-3 and (kind != "kto" or last["kl"] > 0)
    assert_same(two_processes[f"{layout}-{kind}"], one_process[f"one-{kind}"])


def test_gemini_gives_the_curve_of_zero2_in_bf16(two_processes):
    """Both round to 8 bits of mantissa, at different places."""
    found, expected = ([step["loss"] for step in two_processes[f"{name}-kto"]["steps"]] for name in BF16)
    assert found == pytest.approx(expected, rel=2e-2, abs=2e-2)


def resumed_job(kind: str, layout: str, world, folder: Path) -> dict:
    name = f"{layout}-{kind}"
    resume = str(folder / name / "checkpoints" / f"step-{BEFORE:08d}")
    return job(f"{name}-resumed", kind, world, folder, **LAYOUTS[layout], **SAVED, resume=resume)


@pytest.mark.parametrize(("kind", "layout"), RESUMED)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind, layout, two_processes, folder):
    """PITFALL 13, 25."""
    check_resumed(kind, layout, two_processes, folder)


@pytest.mark.slow
def test_so_is_one_of_other_kinds_and_layouts(world, two_processes, folder):
    ours = [resumed_job(kind, layout, world, folder) for kind, layout in RESUMED_SLOW]
    results = two_processes | run_jobs(ours, folder / "slow-resumed", 2)
    for kind, layout in RESUMED_SLOW:
        check_resumed(kind, layout, results, folder)


def check_resumed(kind: str, layout: str, results: dict, folder: Path):
    whole, resumed = (results[f"{layout}-{kind}{end}"]["steps"] for end in ("", "-resumed"))
    assert len(resumed) == len(whole) - BEFORE and whole[BEFORE:] == resumed
    paths = [folder / f"{layout}-{kind}{end}" / "model" / "model.safetensors" for end in ("", "-resumed")]
    expected, found = (load_file(path) for path in paths)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_so_do_all_other_layouts(world, folder, one_process):
    for layouts, processes in ((TWO, 2), (FOUR, 4)):
        cases = [(kind, layout) for kind in KINDS for layout in layouts if is_supported(kind, LAYOUTS[layout])]
        cases = [case for case in cases if processes == 4 or case not in CASES]
        found = run_jobs(jobs(world, folder / str(processes), cases), folder / f"slow-{processes}", processes)
        for kind, layout in cases:
            assert_same(found[f"{layout}-{kind}"], one_process[f"one-{kind}"])
