"""Run by test_trl.py under a python that has TRL: opens our checkpoints, writes TRL's own, and what both compute.

ROOT/NAME is one case: case.json, base/ (plain transformers), ours/ (our checkpoint), batch.safetensors. Written:
theirs/ (TRL's checkpoint), theirs.safetensors (what it computes), ours_in_trl.safetensors (what ours computes there).
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

try:
    from trl.experimental.ppo import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
except ImportError:
    from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead


def outputs(model, batch: dict, reward: bool) -> dict:
    with torch.no_grad():
        logits, _, values = model.eval()(**batch)
        result = {"logits": logits.contiguous(), "values": values.contiguous()}
        return result | ({"scores": model.compute_reward_score(**batch)} if reward else {})


def forget_new_fields(adapter: Path):
    """peft before 0.15 stops at fields of adapter_config.json that it does not know."""
    file = adapter / "adapter_config.json"
    if file.exists():
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        settings = {name: value for name, value in json.loads(file.read_text()).items() if name in known}
        file.write_text(json.dumps(settings))


def exchange(folder: Path):
    case = json.loads((folder / "case.json").read_text())
    auto = AutoModelForSeq2SeqLMWithValueHead if case["seq2seq"] else AutoModelForCausalLMWithValueHead
    batch = load_file(folder / "batch.safetensors")
    torch.manual_seed(11)
    # other attention kernels round otherwise
    loading, options = {"attn_implementation": "eager"}, {"v_head_init_strategy": "normal"}
    if case["lora"] is not None:
        options["peft_config"] = LoraConfig(**case["lora"])
        for adapter in (folder / "ours", folder / "reward"):
            forget_new_fields(adapter)
        if (folder / "reward").exists():
            loading["reward_adapter"] = str(folder / "reward")
    model = auto.from_pretrained(str(folder / "base"), **options, **loading)
    with_scores = "reward_adapter" in loading
    (folder / "theirs").mkdir()  # TRL's save_pretrained of a model with adapters expects the folder
    model.save_pretrained(str(folder / "theirs"))
    save_file(outputs(model, batch, with_scores), folder / "theirs.safetensors")
    ours = auto.from_pretrained(str(folder / "ours"), **loading)
    save_file(outputs(ours, batch, with_scores), folder / "ours_in_trl.safetensors")


if __name__ == "__main__":
    for place in sorted(Path(sys.argv[1]).iterdir()):
        exchange(place)
