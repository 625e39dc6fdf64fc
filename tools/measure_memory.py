"""Writes the tables of docs/memory.md: plans beside measured peaks, and what fits where.

    python tools/measure_memory.py            # all tables, three quarters of an hour on two cores
    python tools/measure_memory.py measure    # or one of them
    python tools/measure_memory.py fit
    python tools/measure_memory.py long
    python tools/measure_memory.py small

Each case is a real run of two steps. Its peak is that of torch's own allocator, which reports
every block it hands out and takes back to the profiler: exact, unlike the resident memory of a process.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MIB = 2**20
STEPS = 2  # from the second one on there are optimizer states
SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, vocab_size=4000)
LARGE = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=9, num_attention_heads=8, vocab_size=8000)
LENGTHS = dict(max_length=256, max_prompt_length=128, max_new_tokens=64)


SHAPES = {  # Llama 2 7B and 13B, Llama 3 70B
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    | dict(num_key_value_heads=8, vocab_size=128256),
}
LLAMA_3_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
LLAMA_3_8B |= dict(num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072)
LEAN = dict(gradient_checkpointing=True)
RUNGS = [  # from the fastest to the leanest; LoRA last, since it trains something else
    ("zero2", dict(plugin="zero2")),
    ("zero2, checkpointing", dict(plugin="zero2", **LEAN)),
    ("gemini, checkpointing", dict(plugin="gemini", **LEAN)),
    ("zero1, tensor_parallel 8, checkpointing", dict(plugin="zero1", tensor_parallel=8, **LEAN)),
    ("zero2, checkpointing, micro-batch 1", dict(plugin="zero2", micro_batch_size=1, **LEAN)),
    ("zero2-offload, checkpointing, micro-batch 1", dict(plugin="zero2-offload", micro_batch_size=1, **LEAN)),
    (
        "gemini, optimizer on the host, checkpointing, micro-batch 1",
        dict(plugin="gemini", offload_optimizer_fraction=1.0, micro_batch_size=1, **LEAN),
    ),
    (
        "zero1, tensor_parallel 8, pipeline_parallel 4, checkpointing, micro-batch 1",
        dict(plugin="zero1", tensor_parallel=8, pipeline_parallel=4, micro_batch_size=1, **LEAN),
    ),
    ("zero2, LoRA, checkpointing, micro-batch 1", dict(plugin="zero2", lora_rank=32, micro_batch_size=1, **LEAN)),
    (
        "zero2, LoRA on 4 bits, checkpointing, micro-batch 1",
        dict(plugin="zero2", lora_rank=32, quantize_base="nf4", micro_batch_size=1, **LEAN),
    ),
]


ON_HOST = dict(offload_activations=True, **LEAN)
SPARING = dict(feed_forward_tokens=2048, **ON_HOST)
LONG = {  # ways to train on long rows
    "zero2": dict(plugin="zero2"),
    "zero2, checkpointing": dict(plugin="zero2", **LEAN),
    "zero2, checkpointing on the host": dict(plugin="zero2", **ON_HOST),
    "zero2, checkpointing on the host, feed_forward_tokens 2048": dict(plugin="zero2", **SPARING),
    "gemini, checkpointing": dict(plugin="gemini", **LEAN),
    "gemini, checkpointing on the host, feed_forward_tokens 2048": dict(plugin="gemini", **SPARING),
    "zero1, tensor_parallel 8, checkpointing": dict(plugin="zero1", tensor_parallel=8, **LEAN),
    "zero1, sequence_parallel 8": dict(plugin="zero1", sequence_parallel=8),
    "zero1, sequence_parallel 8, checkpointing": dict(plugin="zero1", sequence_parallel=8, **LEAN),
    "zero1, sequence_parallel 8, checkpointing on the host, feed_forward_tokens 2048": dict(
        plugin="zero1", sequence_parallel=8, **SPARING
    ),
    "zero1, sequence_parallel 8, LoRA, checkpointing": dict(plugin="zero1", sequence_parallel=8, lora_rank=32, **LEAN),
}
LONG_ROWS = (8192, 32768, 131072)  # tokens
SMALL_GPU = 24  # GiB


@dataclass(frozen=True)
class Case:
    """One run: `settings` are flags of the training script."""

    algorithm: str
    processes: int = 1
    size: dict = field(default_factory=lambda: SMALL)
    settings: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [f"{name} {str(value).lower()}" for name, value in self.settings.items() if name != "plugin"]
        return ", ".join(parts) or "-"


def _cases() -> list[Case]:
    lean, many = {"gradient_checkpointing": True}, {"batch_size": 32}  # many: several micro-batches a step
    half = {"precision": "bf16"}
    cases = []
    for algorithm in ("sft", "reward", "ppo"):
        for plugin in ("ddp", "zero2", "gemini"):
            cases.append(Case(algorithm, 1, SMALL, {"plugin": plugin}))
            cases.append(Case(algorithm, 2, SMALL, {"plugin": plugin, **lean}))
    cases.append(Case("sft", 1, SMALL, {"plugin": "zero2", **lean}))
    cases.append(Case("sft", 1, SMALL, {"plugin": "ddp", **half}))
    cases.append(Case("sft", 2, SMALL, {"plugin": "zero1", **half}))
    cases.append(Case("sft", 2, SMALL, {"plugin": "zero2", **half, **many}))
    cases.append(Case("ppo", 2, SMALL, {"plugin": "zero2", **half, **many}))
    cases.append(Case("sft", 2, LARGE, {"plugin": "gemini", **lean}))
    cases.append(Case("sft", 2, LARGE, {"plugin": "gemini", **many, **lean}))
    cases.append(Case("ppo", 2, LARGE, {"plugin": "gemini", **lean}))
    cases.append(Case("ppo", 1, SMALL, {"plugin": "ddp", "shared_trunk": True}))
    for settings in ({}, {"algorithm": "orpo"}, {"share_prompts": True}, {"cache_reference": True}):
        cases.append(Case("preference", 1, SMALL, {"plugin": "zero2", **settings}))
    cases.append(Case("preference", 2, SMALL, {"plugin": "ddp", "algorithm": "kto", **half}))
    for settings in ({}, {"kl_coefficient": 0.1}, {"share_prompts": True, "batch_size": 8}):
        cases.append(Case("grpo", 1, SMALL, {"plugin": "zero2", **settings}))
    cases.append(Case("grpo", 2, SMALL, {"plugin": "ddp", "lora_rank": 8, "kl_coefficient": 0.1, **half}))
    for kind in ("tensor", "pipeline", "sequence"):
        for algorithm in ("sft", "ppo"):
            cases.append(Case(algorithm, 2, SMALL, {"plugin": "zero1", f"{kind}_parallel": 2, **many}))
    return cases


def write_world(folder: Path, size: dict):
    """Models, and rows of nearly the maximum length, those of SFT nearly all response."""
    from benchmarks.world import words, write_models, write_rows

    write_models(folder, size)
    rows = {"sft": [], "preference": [], "prompts": []}
    for i in range(96):
        prompt, answer = words(i, 140 if i % 2 else 110), words(i + 1, 120)
        rows["sft"].append({"prompt": words(i, 8), "completion": words(i + 1, 250 if i % 2 else 220)})
        rows["preference"].append({"prompt": prompt, "chosen": answer, "rejected": words(i + 2, 119)})
        rows["prompts"].append({"prompt": prompt})
    for kind, kept in rows.items():
        write_rows(folder / f"{kind}.jsonl", kept)


def world(folder: Path, size: dict) -> dict[str, str]:
    """Paths of what `write_world` made for a size of model."""
    root = folder / str(size["hidden_size"])
    names = ("policy", "scorer", "cache", "sft.jsonl", "preference.jsonl", "prompts.jsonl")
    return {name.split(".")[0]: str(root / name) for name in names}


METHODS = {"sft": "sft", "reward": "reward", "preference": "dpo", "ppo": "ppo", "grpo": "grpo"}


def flags(case: Case, world: dict[str, str], output: str) -> list[str]:
    """The command line of the case's training script."""
    from coati.config import as_flags

    data = {"sft": "sft", "reward": "preference", "preference": "preference"}.get(case.algorithm, "prompts")
    settings = dict(train_data=world[data], model=world["policy"], output_dir=output, cache_dir=world["cache"])
    settings |= dict(
        batch_size=8 * case.processes, micro_batch_size=8, steps=STEPS, progress="off", too_long="truncate_prompt"
    )
    if data == "preference":
        settings |= dict(batch_size=4 * case.processes, micro_batch_size=4)
    if data == "prompts":
        settings |= dict(
            rewards=[dict(type="model", path=world["scorer"])], ppo_epochs=1, min_new_tokens=64, max_rollout_kl=10.0
        )
    if case.algorithm == "grpo":
        settings |= dict(batch_size=2 * case.processes, group_size=4)
    names = LENGTHS if data == "prompts" else {"max_length": LENGTHS["max_length"]}
    settings |= names | case.settings
    return as_flags(settings)


def measure(cases: list[Case], folder: Path) -> list[float]:
    """Peak bytes of real runs on their fullest rank. All cases have the same number of processes and share them."""
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={cases[0].processes}", __file__, "worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-4000:]}")
    ranks = [json.loads(path.read_text()) for path in folder.glob("peaks-*.json")]
    return [max(peaks) for peaks in zip(*ranks, strict=True)]


def planned(case: Case, folder: Path, on_gpu: bool = False) -> float:
    """Peak bytes by the planner."""
    from coati.planner.dry_run import plan
    from coati.planner.report import read_workload

    argv = flags(case, world(folder, case.size), "unused")
    return plan(read_workload(METHODS[case.algorithm], argv, case.processes, on_gpu=on_gpu)).peak.total()


def work(folder: Path):
    """One rank of real runs, under the profiler; writes this rank's peaks."""

    import coati.models.base as base
    from coati.parallel import launch
    from coati.parallel.runtime import shutdown

    load = base.load_transformer

    def load_into_memory(*arguments):  # weights of a file are mapped, which the allocator does not see
        model = load(*arguments)
        for p in model.parameters():
            p.data = p.data.clone()
        return model

    base.load_transformer = load_into_memory
    runtime = launch()
    cases = [Case(**case) for case in json.loads((folder / "cases.json").read_text())]
    peaks = [_peak_of_run(case, folder, runtime, f"{folder}/run-{i}") for i, case in enumerate(cases)]
    (folder / f"peaks-{runtime.rank}.json").write_text(json.dumps(peaks))
    shutdown()


def _peak_of_run(case: Case, folder: Path, runtime, output: str) -> float:
    import torch

    from coati.config import parse_config
    from coati.trainers.algorithms import ALGORITHMS

    algorithm = ALGORITHMS[case.algorithm]
    trainer_class = algorithm.trainer()
    config = parse_config(algorithm.config, flags(case, world(folder, case.size), output))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = trainer_class(config, runtime)
        with torch.profiler.record_function("models are built"):
            gc.collect()
        for step in range(STEPS):
            trainer.step(step)
            trainer.steps_done += 1
        del trainer
        gc.collect()
    return _peak_of_events(profiler)


def _peak_of_events(profiler) -> float:
    """Most bytes in live blocks since the models were built.

    Threads of gloo give blocks back unseen; so a block whose address is handed out again has been given back.
    """
    from torch._C._profiler import _EventType

    events, waiting = [], profiler.profiler.kineto_results.experimental_event_tree()
    while waiting:
        events.append(waiting.pop())
        waiting += events[-1].children
    events.sort(key=lambda event: event.start_time_ns)
    began = next(event.start_time_ns for event in events if event.name == "models are built")
    blocks: dict[int, int] = {}
    now = peak = 0
    for event in events:
        if event.tag != _EventType.Allocation:
            continue
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        now -= blocks.pop(address, 0)
        if size > 0:
            blocks[address] = size
            now += size
        peak = max(peak, now) if event.start_time_ns > began else peak
    return peak


def compare(cases: list[Case]) -> Iterator[tuple[Case, float, float]]:
    """Every case with its planned and its measured peak in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for width, size in {case.size["hidden_size"]: case.size for case in cases}.items():
            write_world(folder / str(width), size)
        for processes in sorted({case.processes for case in cases}):
            group = [case for case in cases if case.processes == processes]
            for case, measured in zip(group, measure(group, folder), strict=True):
                yield case, planned(case, folder), measured


def figures(rows: list[tuple[Case, float, float]]) -> str:
    """The table of plans beside measurements."""
    lines = ["| run | plugin | processes | other settings | planned, MiB | measured, MiB | ratio |", "|---" * 7 + "|"]
    for case, plan, measured in rows:
        size = " (37M)" if case.size == LARGE else ""
        cells = [case.algorithm + size, case.settings["plugin"], case.processes, case.name]
        lines.append(
            "| "
            + " | ".join(map(str, [*cells, f"{plan / MIB:.0f}", f"{measured / MIB:.0f}", f"{plan / measured:.2f}"]))
            + " |"
        )
    return "\n".join(lines)


def fitting(algorithm: str, shape, gpus: int) -> str:
    """The first of `RUNGS` that fits."""

    from coati.config import configure
    from coati.errors import UserError
    from coati.planner.dry_run import Workload, plan
    from coati.planner.report import USABLE
    from coati.trainers.algorithms import ALGORITHMS

    shared = dict(precision="bf16", batch_size=256, max_length=2048, max_prompt_length=1024, max_new_tokens=512)
    for words, settings in RUNGS:
        of_ppo = (
            dict(generation_batch_size=16, rewards=[dict(type="model", path="scorer")]) if algorithm == "ppo" else {}
        )
        config = configure(ALGORITHMS[algorithm].config, **{**shared, "micro_batch_size": 4, **settings, **of_ppo})
        try:
            peak = plan(Workload(algorithm, config, shape, gpus)).peak.total() / 2**30
        except UserError:  # this rung takes more processes
            continue
        if peak <= USABLE * 80:
            return f"{words}: {peak:.0f} GiB"
    return "does not fit"


def fit_table() -> str:
    from transformers import LlamaConfig

    lines = ["| model | run | 1 GPU | 8 GPUs | 64 GPUs |", "|---" * 5 + "|"]
    for name, sizes in SHAPES.items():
        for algorithm in ("sft", "ppo"):
            cells = [fitting(algorithm, LlamaConfig(**sizes), gpus) for gpus in (1, 8, 64)]
            lines.append("| " + " | ".join([name, algorithm, *cells]) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def long_table() -> str:
    """The peak of SFT on 8 GPUs by the length of its rows."""
    from transformers import LlamaConfig

    from coati.config import configure
    from coati.planner.dry_run import Workload, plan
    from coati.trainers.config import SFTConfig
    from examples.stages import table_of

    rows = []
    for words, settings in LONG.items():
        cells = [words]
        for tokens in LONG_ROWS:
            config = configure(
                SFTConfig, precision="bf16", batch_size=8, micro_batch_size=1, max_length=tokens, **settings
            )
            peak = plan(Workload("sft", config, LlamaConfig(**LLAMA_3_8B), 8)).peak.total() / 2**30
            cells.append(f"{peak:.0f} GiB")
        print(*cells, flush=True)
        rows.append(cells)
    return table_of(["", *(f"{tokens:,} tokens" for tokens in LONG_ROWS)], rows)


def small_table() -> str:
    """The peaks of adapters on a model of 7B on one GPU, in bf16 and on a base in 4 bits."""
    from transformers import LlamaConfig

    from coati.config import configure
    from coati.planner.dry_run import Workload, plan
    from coati.planner.report import USABLE
    from coati.trainers.algorithms import ALGORITHMS
    from examples.stages import table_of

    shape, rows = LlamaConfig(**SHAPES["7B"]), []
    how = dict(precision="bf16", plugin="zero2", lora_rank=32, batch_size=32, micro_batch_size=1, **LEAN)
    lengths = dict(max_prompt_length=1024, max_new_tokens=512)
    with tempfile.TemporaryDirectory() as folder:
        base, reward = f"{folder}/base", f"{folder}/reward"
        rollouts = lengths | dict(generation_batch_size=4, rewards=[dict(type="model", path=reward)])
        rows_alone = dict(max_length=1536)
        kinds = {"sft": rows_alone, "reward": rows_alone, "preference": rows_alone, "grpo": rollouts, "ppo": rollouts}
        for algorithm, own in kinds.items():
            cells = [METHODS[algorithm]]
            for bits in (None, "nf4"):
                write_adapter(Path(reward), base, bits)
                config = configure(ALGORITHMS[algorithm].config, model=base, quantize_base=bits, **how, **own)
                others = {reward: shape} if "rewards" in own else {}
                peak = plan(Workload(algorithm, config, shape, 1, other_configs=others)).peak.total() / 2**30
                cells.append(f"{peak:.1f} GiB" + ("" if peak <= USABLE * SMALL_GPU else ", does not fit"))
            print(*cells, flush=True)
            rows.append(cells)
    return table_of(["", "base in bf16", "base in 4 bits"], rows)


def write_adapter(folder: Path, base: str, bits: str | None):
    """The settings of a reward model that is an adapter, and how its base was quantized."""
    from peft import LoraConfig

    from coati.models.quantized import nf4

    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=32, target_modules=layers, base_model_name_or_path=base).save_pretrained(str(folder))
    (folder / "config.json").write_text(json.dumps({"quantization_config": nf4().to_dict()} if bits else {}))


def write(table: str, number: int):
    """Puts a table into its place in docs/memory.md."""
    page = ROOT / "docs" / "memory.md"
    mark, end = f"<!-- table {number} -->", f"<!-- end of table {number} -->"
    before, _, rest = page.read_text().partition(mark)
    _, _, after = rest.partition(end)
    partial = page.with_suffix(".partial")
    partial.write_text(f"{before}{mark}\n\n{table}\n\n{end}{after}")
    partial.replace(page)


def main(which: list[str]):
    if "measure" in which:
        rows = list(compare(_cases()))
        print(figures(rows), flush=True)
        write(figures(rows), 1)
        if far := [case for case, plan, measured in rows if abs(plan / measured - 1) > 0.15]:
            sys.exit(f"more than 15 % off: {far}")
    if "fit" in which:
        write(fit_table(), 2)
    if "long" in which:
        write(long_table(), 3)
    if "small" in which:
        write(small_table(), 5)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(Path(sys.argv[2]))
    else:
        main(sys.argv[1:] or ["measure", "fit", "long", "small"])
