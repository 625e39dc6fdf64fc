"""Writes the last table of docs/memory.md: PPO with four adapters on one base, beside four models and a base in 4 bits.

    python tools/measure_one_base.py    # ten minutes on one core

Each row is a run of its own process: two steps with a policy, a reference, a critic and a reward model of 134M
parameters, each of which is a LoRA adapter on the same base. For "four models" `SharedWeights` does nothing, neither in
the run nor in its plan; for "one base in 4 bits" the run has `quantize_base: nf4`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZE = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000)
PARALLEL = [("ddp", "fp32"), ("ddp", "bf16"), ("zero2", "bf16")]
IN_4_BITS = "one base in 4 bits"
KINDS = ("one base", "four models", IN_4_BITS)
STEPS, RANK = 2, 16
MIB = 2**20


def write_world(folder: Path):
    """A base in bf16, as most are published, and adapters on it: `policy` and `reward`."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.world import words, write_models, write_rows
    from coati.models import Actor, LoraSettings, RewardModel

    write_models(folder / "written", SIZE)
    tokenizer = AutoTokenizer.from_pretrained(folder / "written" / "policy")
    Actor(folder / "written" / "policy", dtype=torch.bfloat16).save_pretrained(folder / "base")
    for name, model_class in (("policy", Actor), ("reward", RewardModel)):
        model = model_class(folder / "base", lora=LoraSettings(RANK))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zeros of new adapters would be shared as well
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "prompts.jsonl", [{"prompt": words(i, 48)} for i in range(32)])


def settings(folder: Path, output: Path, plugin: str, precision: str, kind: str):
    """Those of the run. The critic begins as the reward model; the reference is a frozen copy of the policy."""
    from coati.config import configure
    from coati.trainers.config import PPOConfig

    return configure(
        PPOConfig,
        model=str(folder / "policy"),
        rewards=[dict(type="model", path=str(folder / "reward"))],
        train_data=[str(folder / "prompts.jsonl")],
        output_dir=str(output),
        cache_dir=str(folder / "cache"),
        plugin=plugin,
        precision=precision,
        quantize_base="nf4" if kind == IN_4_BITS else None,
        steps=STEPS,
        batch_size=4,
        micro_batch_size=2,
        ppo_epochs=1,
        max_prompt_length=64,
        max_new_tokens=32,
        min_new_tokens=32,
        max_rollout_kl=10.0,  # random weights tell little from rounding
        progress="off",
    )


def share_nothing():
    from coati.models.shared_weights import SharedWeights

    SharedWeights.share = lambda self, model: 0


def planned(folder: Path, output: Path, *how: str) -> tuple[int, int]:
    """Bytes of weights, and of the peak."""
    from transformers import AutoConfig

    from coati.planner.dry_run import Workload, plan

    shape = AutoConfig.from_pretrained(folder / "base")
    peak = plan(Workload("ppo", settings(folder, output, *how), shape, 1, on_gpu=False)).peak
    return sum(n for (_, kind), n in peak.items() if kind == "parameters"), peak.total()


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


def measured(folder: Path, output: Path, *how: str) -> dict[str, int]:
    """Bytes of all weights that the run's models hold, each storage once, and of this process."""
    import coati.trainers.factory as factory
    from coati.parallel import launch, make_engine
    from coati.parallel.runtime import shutdown
    from coati.trainers.ppo import PPOTrainer

    modules = []

    def making(*arguments, **how):
        engine = make_engine(*arguments, **how)
        modules.append(engine.module)
        return engine

    factory.make_engine = making
    runtime = launch()
    before = resident("VmRSS")
    trainer = PPOTrainer(settings(folder, output, *how), runtime)
    parameters = [p for module in modules for p in module.parameters()]
    states = [p.quant_state for p in parameters if getattr(p, "quant_state", None) is not None]
    scales = [scale for state in states for scale in (state.absmax, state.state2.absmax)]
    storages = [tensor.untyped_storage() for tensor in parameters + scales]
    weights = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    built, while_loading = resident("VmRSS"), resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    for step in range(STEPS):
        trainer.step(step)
        trainer.steps_done += 1
    found = dict(models=len(modules), weights=weights, before=before, built=built, while_loading=while_loading)
    found["in_steps"] = resident("VmHWM")
    shutdown()
    return found


def row(folder: Path, plugin: str, precision: str, kind: str) -> list[str]:
    """A row of the table; the plan and the run are of one process, in which sharing is on or off."""
    command = [sys.executable, __file__, "worker", str(folder), plugin, precision, kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'applications'}"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # else glibc learns to keep large blocks that are given back
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, flush=True)
    names = ("planned_weights", "weights", "planned_peak", "in_steps", "while_loading")
    figures = [f"{found[name] / MIB:.0f}" for name in names]
    return [plugin, precision, kind, *figures]


def work(folder: Path, plugin: str, precision: str, kind: str):
    """One run, and its plan, which comes last as it takes memory of this process too."""
    if kind == "four models":
        share_nothing()
    with tempfile.TemporaryDirectory(dir=folder) as output:
        how = (plugin, precision, kind)
        found = measured(folder, Path(output) / "run", *how)
        found["planned_weights"], found["planned_peak"] = planned(folder, Path(output) / "plan", *how)
    print(json.dumps(found))


def main():
    from examples.stages import table_of
    from tools.measure_memory import write

    heads = ["plugin", "precision", "in memory", "weights planned", "weights measured", "peak planned"]
    heads += ["peak of the process", "peak while loading"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_world(Path(name))
        for plugin, precision in PARALLEL:
            rows += [row(Path(name), plugin, precision, kind) for kind in KINDS]
    table = table_of(heads, rows)
    print(table)
    write(table, 4)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main()
