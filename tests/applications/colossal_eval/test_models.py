"""Models by folder, and answers on disk."""

import math

import pytest
import torch

from coati.errors import UserError
from coati.run_layout import ACTOR, checkpoint_of_step, checkpoints_of, model_in, write_manifest
from colossal_eval.run import log_probs
from colossal_eval.run.model_loading import column_names, load_model, model_folder
from colossal_eval.run.response_store import ResponseStore
from tests.applications.colossal_eval.conftest import make_model
from tests.applications.colossal_eval.test_harness import run


def test_the_store_survives_a_torn_line_and_reads_all_ranks(tmp_path):
    first, second = ResponseStore(tmp_path, 0), ResponseStore(tmp_path, 1)
    first.append([{"key": "a", "answer": [[-0.1, True]]}, {"key": "b", "answer": "text\n"}])
    second.append([{"key": "c", "answer": -math.inf}])
    path = tmp_path / "answers-0.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key": "d", "ans')
    again = ResponseStore(tmp_path, 0)
    assert (again["a"], again["b"], again["c"], "d" in again) == ([[-0.1, True]], "text\n", -math.inf, False)
    again.append([{"key": "d", "answer": "whole"}, {"key": "a", "answer": "not taken"}])
    assert ResponseStore(tmp_path, 0)["d"] == "whole"
    assert again["a"] == [[-0.1, True]]
    assert again.added == 1


def test_models_are_found_in_runs_and_checkpoints(tiny, tmp_path):
    assert model_folder(str(tiny["first"])) == tiny["first"]
    for step in (10, 20, 30):
        checkpoint = checkpoint_of_step(checkpoints_of(tmp_path / "run"), step)
        folder = model_in(checkpoint, ACTOR)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if step < 30:  # the last one was interrupted
            write_manifest(checkpoint, step, None)
    assert model_folder(str(tmp_path / "run")).parts[-3:] == ("step-00000020", "actor", "model")
    assert model_folder(str(checkpoint)) == folder
    with pytest.raises(UserError, match="is no folder"):
        model_folder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="nor coati checkpoints"):
        model_folder(str(tmp_path))
    assert column_names(["a/model", "b/other"]) == ["model", "other"]
    assert column_names(["a/model", "b/model"]) == ["a/model", "b/model"]
    with pytest.raises(UserError, match="twice"):
        column_names(["a", "a"])


def test_an_adapter_answers_as_its_merged_model(tiny, harness, prepared, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny["first"])
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny["first"]).save_pretrained(tmp_path / "merged")
    found = [run(harness(name, tmp_path / name), "mmlu", prepared, tmp_path)[0] for name in ("adapter", "merged")]
    plain, _ = run(harness(), "mmlu", prepared, tmp_path)
    for id, record in found[0].items():
        assert record["log_probs"] == pytest.approx(found[1][id]["log_probs"], abs=1e-4)
        assert record["log_probs"] != pytest.approx(plain[id]["log_probs"], abs=1e-2)


def test_a_model_that_cannot_be_used_is_refused_in_a_sentence(tiny, tmp_path, runtime):
    with pytest.raises(UserError, match="more than the 256 tokens"):
        load_model("short", tiny["short"], "float32", runtime.device, 512)
    folder = make_model(tmp_path / "model", 0)
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(UserError, match="holds no tokenizer that can be loaded"):
        load_model("model", folder, "float32", runtime.device)


def test_changed_weights_are_another_model(tiny, tmp_path, runtime):
    from transformers import AutoModelForCausalLM

    before = load_model("m", tiny["first"], "float32", runtime.device).fingerprint
    model = AutoModelForCausalLM.from_pretrained(tiny["first"])
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(tmp_path)
    for path in tiny["first"].glob("token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load_model("m", tmp_path, "float32", runtime.device).fingerprint != before
    assert log_probs.token_budget(load_model("m", tmp_path, "float32", runtime.device).actor) == log_probs.CPU_TOKENS
