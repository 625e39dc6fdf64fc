"""A run that goes on from a checkpoint is the run that never stopped: in fp32 on a CPU (Gemini: bf16) to the last bit.

Responses are sampled, SFT and reward models train with dropout, rewards are normalized and the KL coefficient adapts,
so every state there is has a say in every step. `test_kills.py` puts real kills in between.
"""

import json
from pathlib import Path

import pytest

from tests.conftest import functions, settings_for
from tests.distributed.forks import run_jobs
from tests.distributed.runs import assert_same_end, log_of
from tests.distributed.world import LAYOUTS

pytestmark = pytest.mark.distributed
BEFORE = 3  # steps before the checkpoint
PLUGINS = {name: dict(plugin=name) for name in ("ddp", "zero1", "zero2", "zero2-offload")}
PLUGINS["gemini"] = dict(plugin="gemini", precision="bf16")
SPLIT = {name: LAYOUTS[name] for name in ("tp2", "pp2", "sp2", "tp2 x zero1", "pp2 x zero1", "sp2 x zero1")}
STATES = dict(temperature=1.0, kl_target=0.5, kl_horizon=50, normalize_reward=True)
# two rewards a response may earn, so that many groups are replaced
REFILLED = dict(dynamic_sampling=True, group_size=2, final_temperature=0.5, kl_coefficient=0.05, rewards="odd")
ALGORITHMS = {"sft": {}, "reward": {}, "ppo": STATES, "ppo, shared trunk": STATES | dict(shared_trunk=True)}
ALGORITHMS |= {"grpo": REFILLED, "grpo, reference refreshed": REFILLED | dict(refresh_reference=2)}
AVERAGED = dict(teacher="self", teacher_ema=0.3, teacher_prompt="{response} thank {prompt}", on_policy_share=1.0)
ALGORITHMS |= {"distill": {}, "distill, teacher averaged": AVERAGED, "sdpo": dict(teacher_ema=0.3, temperature=0.5)}
WHOLE = ("refreshed", "averaged", "sdpo")  # what needs whole models
CASES = [(a, name) for a in ALGORITHMS for name in PLUGINS | SPLIT if not ("shared" in a and name in SPLIT)]
CASES = [(a, name) for a, name in CASES if not a.endswith(WHOLE) or name in ("ddp", "zero1", "zero2")]
# test_plugins.py has SFT and a shared trunk
QUICK = [
    ("ppo", "zero2"),
    ("reward", "tp2"),
    ("ppo", "pp2"),
    ("grpo", "gemini"),
    ("grpo, reference refreshed", "zero2"),
]
QUICK += [("distill, teacher averaged", "zero2"), ("sdpo", "zero2")]


def job(name: str, algorithm: str, world, folder: Path, **changes) -> dict:
    changes = dict(steps=2 * BEFORE, save_every=BEFORE, keep_checkpoints=9) | changes
    algorithm, extra = algorithm.partition(",")[0], ALGORITHMS[algorithm]
    if "rewards" in extra:
        extra = extra | dict(rewards=functions(f"{world['rewards']}:{extra['rewards']}"))
    settings = settings_for(algorithm, world, output_dir=str(folder / name), **extra | changes)
    return {"name": name, "algorithm": algorithm, "settings": settings}


def checkpoint(folder: Path, name: str) -> str:
    return str(folder / name / "checkpoints" / f"step-{BEFORE:08d}")


@pytest.fixture(scope="module")
def with_dropout(tiny_world, tmp_path_factory) -> dict[str, str]:
    config = json.loads(Path(tiny_world["model_config"]).read_text()) | {"attention_dropout": 0.2}
    path = tmp_path_factory.mktemp("dropout") / "config.json"
    path.write_text(json.dumps(config))
    return tiny_world | {"model_config": str(path)}


def whole_and_resumed(cases, world, folder: Path) -> dict:
    jobs = []
    for algorithm, layout in cases:
        name, changes = f"{algorithm} {layout}", (PLUGINS | SPLIT)[layout]
        jobs.append(job(name, algorithm, world, folder, **changes))
        jobs.append(job(f"{name} resumed", algorithm, world, folder, **changes, resume=checkpoint(folder, name)))
    return {"folder": folder} | run_jobs(jobs, folder / "jobs", 2)


@pytest.fixture(scope="module")
def quick(with_dropout, tmp_path_factory):
    return whole_and_resumed(QUICK, with_dropout, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def table(with_dropout, tmp_path_factory):
    others = [case for case in CASES if case not in QUICK]
    return whole_and_resumed(others, with_dropout, tmp_path_factory.mktemp("table"))


def check(runs: dict, algorithm: str, layout: str):
    name = f"{algorithm} {layout}"
    whole, resumed = runs["folder"] / name, runs["folder"] / f"{name} resumed"
    assert_same_end(whole, resumed)
    assert log_of(whole, after=BEFORE) == log_of(resumed) and {row["step"] for row in log_of(resumed)} == {4, 5, 6}
    if algorithm.startswith(("ppo", "grpo", "distill", "sdpo")):
        expected, found = runs[name]["rollouts"], runs[f"{name} resumed"]["rollouts"]
        assert found == [seen[BEFORE:] for seen in expected]
        assert len(found) == 2 and all(len(set(seen)) == BEFORE for seen in found)
    if algorithm.startswith("grpo"):
        assert any(row.get("refills") for row in log_of(resumed))
    if algorithm.startswith("ppo"):
        rows = [row for row in log_of(whole) if "kl_coefficient" in row]
        assert len({row["kl_coefficient"] for row in rows}) > 1  # it adapts, or its state would prove nothing


@pytest.mark.parametrize(("algorithm", "layout"), QUICK)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(algorithm, layout, quick):
    """PITFALL 13, 25: weights, optimizer, log, sampled responses, KL coefficient, statistics, every random state."""
    check(quick, algorithm, layout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("algorithm", "layout"), [case for case in CASES if case not in QUICK])
def test_so_is_one_of_any_algorithm_under_any_plugin_or_layout(algorithm, layout, table):
    check(table, algorithm, layout)


@pytest.mark.parametrize(("algorithm", "layout"), [("ppo", "zero2"), ("ppo", "pp2")])
def test_ranks_have_random_states_of_their_own_unless_they_share_a_models_work(algorithm, layout, quick):
    """PITFALL 4: so one rank's state restored on all of them would be seen above."""
    folder = Path(checkpoint(quick["folder"], f"{algorithm} {layout}"))
    first, second = (folder / f"random-{rank}-of-2.safetensors" for rank in (0, 1))
    assert (first.read_bytes() == second.read_bytes()) == (layout == "pp2")


@pytest.fixture(scope="module")
def other_numbers(tiny_world, tmp_path_factory) -> dict:
    """Runs on one and on two processes, and the second half of each on the other number."""
    folder = tmp_path_factory.mktemp("numbers")
    results = {}
    for processes, source in ((1, None), (2, 1), (1, 2)):
        jobs = []
        for algorithm in ("sft", "reward"):
            if source != 2:
                jobs.append(job(f"{algorithm} {processes}", algorithm, tiny_world, folder, plugin="zero1"))
            if source:
                changes = dict(plugin="zero1", resume=checkpoint(folder, f"{algorithm} {source}"))
                jobs.append(job(f"{algorithm} {source} to {processes}", algorithm, tiny_world, folder, **changes))
        results |= run_jobs(jobs, folder / f"jobs-{source}-{processes}", processes)
    return results


@pytest.mark.parametrize("algorithm", ["sft", "reward"])
@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_on_another_number_of_processes_the_curve_is_the_same(algorithm, numbers, other_numbers):
    """Sums are taken in another order, so only within fp32's rounding."""
    source, target = numbers
    expected = [step["loss"] for step in other_numbers[f"{algorithm} {source}"]["steps"][BEFORE:]]
    found = [step["loss"] for step in other_numbers[f"{algorithm} {source} to {target}"]["steps"]]
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == BEFORE
