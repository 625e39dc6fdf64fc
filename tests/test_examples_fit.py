"""Examples for GPUs fit the GPUs that they name, by coati's own planner."""

import pytest

from coati.planner.report import GIB, USABLE, read_workload
from tests.conftest import ROOT

MEMORY = 80  # GiB of one GPU, as their comments and `coati plan` have it
METHODS = {"sft": "sft", "reward": "reward", "preference": "dpo", "ppo": "ppo"}
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples" / "configs").glob("*gpu*.yaml"))}
QUICK = ("reward_8gpu_gemini",)
QWEN = dict(num_key_value_heads=4, num_hidden_layers=28, max_position_embeddings=32768)
# Qwen2.5's, which they name or whose place runs/7b takes
SIZES = {
    "7b": QWEN | dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, vocab_size=152064),
    "1.5b": QWEN
    | dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2)
    | dict(vocab_size=151936, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in EXAMPLES])
def test_an_example_fits_the_gpus_that_it_names(name, tmp_path):
    from transformers import Qwen2Config

    from coati.planner.dry_run import plan

    text = EXAMPLES[name].read_text().lower()
    [size] = [size for size in SIZES if f"-{size}" in text or f"/{size}/" in text]
    Qwen2Config(**SIZES[size]).save_pretrained(tmp_path)
    algorithm, gpus = name.split("_")[0], int(name.split("_")[1].removesuffix("gpu"))
    shape = ["--model_config", str(tmp_path / "config.json")]
    found = plan(read_workload(METHODS[algorithm], ["--config", str(EXAMPLES[name]), *shape], gpus, on_gpu=True))
    assert found.peak.total() <= USABLE * MEMORY * GIB


def test_there_are_examples_for_gpus():
    assert len(EXAMPLES) >= 6
