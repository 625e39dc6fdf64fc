"""Checkpoints go to TRL and come from TRL unchanged, in releases that still had value heads."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.models.language_models import SEQ2SEQ, batch_of, language_model, value_head_class

RELEASES = {"1.12": ".venv-trl", "0.11": ".venv-trl-0.11"}
CASES = [f"{family}{adapter}" for family in ("gpt2", "opt", "llama", "t5") for adapter in ("", "-lora")]
LORA = dict(r=2, lora_alpha=8, init_lora_weights=False)
# names that both releases of peft understand, "all-linear" included, which TRL 0.11 applies to the model alone as well
TARGETS = {"gpt2": ["c_attn"], "opt": ["q_proj", "fc1"], "llama": "all-linear", "t5": ["q", "wi"]}


def write_case(folder: Path, family: str, lora: bool, release: str):
    """One case's folder, as trl_exchange.py describes it, and `ours.safetensors` with what ours computes."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    # TRL 0.11 reads OPT's hidden_size where 1.12 and ours read word_embed_proj_dim
    changes = {"word_embed_proj_dim": 32} if family == "opt" and release == "0.11" else {}
    language_model(family, **changes).save_pretrained(folder / "base")
    task = "SEQ_2_SEQ_LM" if family in SEQ2SEQ else "CAUSAL_LM"
    settings = dict(LORA, task_type=task, target_modules=TARGETS[family]) if lora else None
    (folder / "case.json").write_text(json.dumps({"seq2seq": family in SEQ2SEQ, "lora": settings}))
    save_file(batch_of(family), folder / "batch.safetensors")
    options = {"peft_config": LoraConfig(**settings)} if lora else {}
    if family == "llama" and lora:
        options["reward_adapter"] = write_reward_adapter(folder)
    options |= {"v_head_init_strategy": "normal", "attn_implementation": "eager"}
    model = value_head_class(family).from_pretrained(folder / "base", **options)
    model.save_pretrained(folder / "ours")
    save_file(outputs(model, batch_of(family)), folder / "ours.safetensors")


def write_reward_adapter(folder: Path) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    config = LoraConfig(**LORA, task_type="SEQ_CLS", target_modules=["q_proj", "up_proj"])
    get_peft_model(classifier, config).save_pretrained(folder / "reward")
    return str(folder / "reward")


@torch.no_grad()
def outputs(model, batch) -> dict[str, torch.Tensor]:
    logits, _, values = model(**batch)
    result = {"logits": logits.contiguous(), "values": values.contiguous()}
    return result | ({"scores": model.compute_reward_score(**batch)} if model.supports_rm_adapter else {})


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """release -> the folder of its cases, after TRL has been through them; TRL runs once per release."""
    done = {}

    def run(release: str) -> Path:
        venv = ROOT / RELEASES[release]
        if not (venv / ".ready").exists():
            pytest.skip(f"TRL {release} is not in {RELEASES[release]}: run `make trl`")
        if release not in done:
            root = done[release] = tmp_path_factory.mktemp(f"trl-{release}")
            for case in CASES:
                family, _, lora = case.partition("-")
                write_case(root / case, family, bool(lora), release)
            command = [str(venv / "bin" / "python"), str(ROOT / "tests/models/compat/trl_exchange.py"), str(root)]
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert ended.returncode == 0, ended.stderr[-4000:]
        return done[release]

    return run


def same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_trl_computes_the_same_from_our_checkpoint(release, case, exchanged):
    from safetensors.torch import load_file

    folder = exchanged(release) / case
    same(load_file(folder / "ours_in_trl.safetensors"), load_file(folder / "ours.safetensors"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_ours_computes_the_same_from_trls_checkpoint(release, case, exchanged, caplog):
    from safetensors.torch import load_file

    folder, family = exchanged(release) / case, case.partition("-")[0]
    reward = str(folder / "reward") if (folder / "reward").exists() else None
    model = value_head_class(family).from_pretrained(
        folder / "theirs", reward_adapter=reward, attn_implementation="eager"
    )
    theirs = load_file(folder / "theirs.safetensors")
    same(outputs(model, batch_of(family)), theirs)
    assert "no value head" not in caplog.text
    assert not torch.allclose(theirs["values"], load_file(folder / "ours.safetensors")["values"]), "one head for both"
