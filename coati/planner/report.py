"""From a configuration to a table: what fills a GPU, whether it fits, and the change that helps most."""

import argparse
import dataclasses
from pathlib import Path

from coati.commands import COMMANDS
from coati.config import parse_config, reconfigure
from coati.config.plugin import PLUGINS
from coati.errors import UserError
from coati.planner import generators
from coati.trainers.algorithms import ALGORITHMS
from coati.trainers.config import SELF, RolloutConfig
from coati.trainers.paths import named_paths

KINDS = ("parameters", "gradients", "optimizer states", "activations", "logits", "KV cache", "communication")
# settings that name a model, beside the trained one
MODELS = ("critic_model", ".teacher", ".teachers", ".path", ".paths")
USABLE = 0.9  # of a GPU's memory: the rest is the CUDA context, the libraries' workspaces, and gaps between tensors
MIB, GIB = 2**20, 2**30


def main(argv: list[str]) -> int:
    """Prints the plan; returns 0 if the run fits, else 1.

    Raises:
        UserError: settings that contradict each other, or a model whose config.json is not on this machine.
    """
    if argv[:1] == ["generators"]:
        return generators.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="coati plan",
        description="Memory of one rank of a run, without loading weights or starting anything. Takes every flag of "
        "the method besides these, and `--config FILE.yaml`. `coati plan generators RUN` splits devices between "
        "training and sampling.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes of the run, one per GPU (default: 1)")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of one GPU (default: 80)")
    parser.add_argument("method", choices=list(COMMANDS), metavar="METHOD", help="what will run, such as ppo")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the run will use")
    known, rest = parser.parse_known_args(argv)
    if known.gpus < 1:
        raise UserError(f"--gpus is {known.gpus}: give at least 1")
    workload = read_workload(known.method, rest, known.gpus, known.device == "cuda")
    from coati.planner.dry_run import plan  # loads torch, so not before the settings are read

    estimate = plan(workload)
    print(table(workload, estimate))
    fits = estimate.peak.total() <= USABLE * known.memory * GIB
    print(conclusion(estimate, known.memory, fits) + advice(workload, estimate))
    return 0 if fits else 1


def read_workload(method: str, argv: list[str], gpus: int, on_gpu: bool):
    """The settings of a method as something to plan.

    Raises:
        UserError: as `main`.
    """
    command = COMMANDS[method]
    config = parse_config(ALGORITHMS[command.algorithm].config, argv, defaults=command.defaults)
    on_gpu = on_gpu and config.parallel.device != "cpu"
    precision, attention = config.parallel.precision, config.model.attn_implementation
    if precision == "auto":
        precision = "fp32" if PLUGINS[config.parallel.plugin].computes_in_fp32 and not on_gpu else "bf16"
    if on_gpu:  # as large, and this machine need not have a GPU
        precision = precision.replace("fp16", "bf16")
        from coati.models.base import NEED_CUDA

        attention = "auto" if attention in NEED_CUDA else attention
    config = reconfigure(config, precision=precision, attn_implementation=attention)
    from coati.planner.dry_run import Workload

    own_model, others = _model_configs(config)
    return Workload(command.algorithm, config, own_model, gpus, on_gpu, others)


def table(workload, estimate) -> str:
    """GiB of every model and kind of memory at the peak, the largest one marked, and the phases' peaks."""
    c, peak = workload.config, estimate.peak
    models = [m for m in dict.fromkeys(model for model, _ in peak) if sum(peak[m, kind] for kind in KINDS) > MIB]
    kinds = [kind for kind in KINDS if sum(peak[m, kind] for m in models) >= 0.005 * GIB]
    largest = max(peak, key=peak.__getitem__)
    device = "GPU" if workload.on_gpu else "CPU process"
    rows = [["GiB per rank", *kinds, "sum"]]
    for model in models:
        cells = [f"{peak[model, kind] / GIB:.2f}" + ("*" if (model, kind) == largest else " ") for kind in kinds]
        rows.append([model, *cells, f"{sum(peak[model, kind] for kind in KINDS) / GIB:.2f} "])
    sums = [sum(peak[m, kind] for m in models) for kind in kinds]
    rows.append(["sum", *(f"{n / GIB:.2f} " for n in (*sums, peak.total()))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    head = [workload.algorithm, f"{c.parallel.plugin} {c.parallel.precision}", f"{workload.gpus} x {device}"]
    lines = [" · ".join([*head, f"micro-batch {c.rows_per_pass}"])]
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *padded]))
    peaks = " · ".join(f"{name} {items.total() / GIB:.2f}" for name, items in estimate.phases.items())
    return "\n".join([*lines, f"* the largest item. Peaks of the phases: {peaks}"])


def conclusion(estimate, memory: float, fits: bool) -> str:
    """One sentence."""
    need = estimate.peak.total() / GIB
    share = f"{need:.1f} GiB at the peak ({estimate.worst}) of {memory:g} GiB, of which {USABLE:.0%} can be used"
    return ("fits: " if fits else "does not fit: ") + share


def advice(workload, estimate) -> str:
    """The one change that saves most, as the end of a sentence; empty if none saves a hundredth."""
    from coati.planner.dry_run import Plan, plan

    best: tuple[int, str, Plan | None] = (estimate.peak.total() // 100, "", None)
    for change in _changes(workload):
        try:
            other = plan(dataclasses.replace(workload, config=reconfigure(workload.config, **change)))
        except UserError:  # a change that can't be made is no advice
            continue
        saved = estimate.peak.total() - other.peak.total()
        words = ", ".join(f"{name} {str(value).lower()}" for name, value in change.items())
        best = max(best, (saved, words, other), key=lambda entry: entry[0])
    return f"; {best[1]} saves {best[0] / GIB:.1f} GiB" if best[1] else ""


def _changes(workload) -> list[dict]:
    c, p = workload.config, workload.config.parallel
    changes = []
    if not p.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    elif workload.on_gpu and not p.offload_activations:
        changes.append({"offload_activations": True})
    if c.micro_batch_size > 1:
        changes.append({"micro_batch_size": c.micro_batch_size // 2})
    if isinstance(c, RolloutConfig) and c.generation.generation_batch_size > 1:
        changes.append({"generation_batch_size": c.generation.generation_batch_size // 2})
    if p.precision == "fp32":
        changes.append({"precision": "bf16"})
    if c.model.lora_rank > 0 and c.model.quantize_base is None and p.holds_whole_models:
        changes.append({"quantize_base": "nf4"})
    plugin = PLUGINS[p.plugin]
    if workload.gpus > 1 and not plugin.shards_gradients:
        changes.append({"plugin": "zero2"})
    if not plugin.offloads and not plugin.shards_weights:
        changes.append({"plugin": "zero2-offload"})
    if workload.gpus > 1 and not plugin.shards_weights and c.model.lora_rank == 0 and not p.splits_models:
        changes.append({"plugin": "gemini", "precision": "bf16" if p.precision == "fp32" else p.precision})
    if plugin.shards_weights and p.offload_optimizer_fraction < 1:
        changes.append({"offload_optimizer_fraction": 1.0})
    if "tensor_parallel" in plugin.splits and workload.gpus % (2 * p.model_parallel_size) == 0:
        changes.append({"tensor_parallel": 2 * p.tensor_parallel})
    return changes


def _model_configs(config) -> tuple[object, dict[str, object]]:
    """The transformers config of the model that is trained, and those of further models by what the settings name.
    Models that don't exist yet are of the shape of `--model_config`, if that is given."""
    start = config.model.model_config or config.model.path
    if start is None:
        raise UserError("give --model FOLDER, or --model_config FILE with the config.json of its shape")
    others = {}
    for name, kind, source in named_paths(config):
        is_other = kind == "model" and name.startswith(("algorithm.", "rewards.")) and name.endswith(MODELS)
        if is_other and source != SELF and (not config.model.model_config or Path(source).exists()):
            others[source] = _model_config_of(source, name)
    return _model_config_of(start, "--model_config" if config.model.model_config else "--model"), others


def _model_config_of(source: str, flag: str):
    from transformers import AutoConfig

    from coati.models.lora import base_of_adapter, is_adapter

    try:
        folder = base_of_adapter(source) if is_adapter(source) else source
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{flag} {source}: no config.json of this model on this machine; name a file of that kind by --model_config"
        ) from error
