"""Stages of continued pre-training in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from coati.config import configure
from coati.config.parse import nested
from coati.errors import UserError
from coati.tracking import read_metrics
from colossal_llama.pretraining.pretrain_trainer import PretrainConfig, PretrainTrainer, StagedPretraining
from colossal_llama.pretraining.stage_plan import parse_stages
from tests.applications.colossal_llama.world import documents, packed_world, row, settings, write_packed


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_world(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def make(tiny_world, packed, runtime, tmp_path):
    def make(name: str = "run", /, **changes) -> PretrainTrainer:
        chosen = settings(tiny_world, packed, output_dir=str(tmp_path / name), **changes)
        return PretrainTrainer(configure(PretrainConfig, **chosen), runtime)

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_packed_documents_have_the_losses_that_they_have_alone(micro_batch_size, make, tmp_path):
    """Each document's name is its category here, so that the evaluation tells their losses."""
    texts = {f"{i:02d}": text for i, text in enumerate(documents(3, 9))}
    names = sorted(texts)
    alone = write_packed(tmp_path / "alone", [[row([texts[name]], name) for name in names]])
    trainer = make("alone", eval_data=[alone], micro_batch_size=micro_batch_size)
    expected = trainer.evaluate()[0]
    # document i stands between others here, which are not looked at
    rows = [row([texts[names[i - 2]], texts[names[i]], texts[names[i - 1]]], names[i]) for i in range(len(names))]
    for packed_row, i in zip(rows, range(len(names)), strict=True):
        start, length = len(texts[names[i - 2]]), len(texts[names[i]])
        labels = packed_row["labels"]
        packed_row["labels"] = [x if start <= t < start + length else -100 for t, x in enumerate(labels)]
    together = write_packed(tmp_path / "together", [rows])
    found = make("together", eval_data=[together], micro_batch_size=micro_batch_size).evaluate()[0]
    assert len(expected) == 2 * (1 + len(names))
    assert found == pytest.approx(expected, rel=1e-5)
    seen = make("seen", eval_data=[together], micro_batch_size=micro_batch_size, document_mask=False).evaluate()[0]
    assert seen["loss"] != pytest.approx(expected["loss"], rel=1e-5)


def test_a_stage_learns_counts_its_tokens_and_leaves_a_plain_model(make, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make(tokens=3000, steps=0, mix={"zh": 1, "en": 3}, buckets=[1, 0])
    trainer.train()
    rows = read_metrics(tmp_path / "run")
    first, last = (row for row in (rows[0], rows[-1]))
    assert last["eval/loss"] < first["eval/loss"] - 0.1
    assert last["eval/loss/zh"] < first["eval/loss/zh"]
    assert last["seen/zh"] + last["seen/en"] == sum(row.get("tokens", 0) for row in rows) == trainer.order.tokens
    assert last["seen/en"] / last["seen/zh"] == pytest.approx(3, rel=0.05)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_resuming_inside_a_stage_is_bitwise_the_same(make, tmp_path):
    changes = dict(neftune_noise_alpha=5.0, z_loss=1e-2, steps=5)
    make("whole", **changes).train()
    resumed = make("resumed", **changes, resume=str(tmp_path / "whole" / "checkpoints" / "step-00000002"))
    assert resumed.steps_done == 2
    resumed.train()
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last = [read_metrics(tmp_path / name)[-1] for name in ("whole", "resumed")]
    assert {k: v for k, v in last[0].items() if k.startswith("seen/")}.items() <= last[1].items()


def test_a_stage_that_trains_other_weights_cannot_go_on(make, tmp_path):
    """REPORT 20: the optimizer has no states for them."""
    make("first", steps=1).train()
    place = str(tmp_path / "first" / "checkpoints" / "step-00000001")
    with pytest.raises(UserError, match="freeze none in the checkpoint, all-but-embeddings now"):
        make("other", resume=place, freeze="all-but-embeddings")


def test_all_but_the_embeddings_can_be_frozen(make, tmp_path):
    trainer = make(freeze="all-but-embeddings")
    before = {name: tensor.clone() for name, tensor in trainer.engines["model"].module.state_dict().items()}
    trainer.train()
    after = trainer.engines["model"].module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.model.embed_tokens.weight", "model.lm_head.weight"}


def test_z_loss_pulls_the_log_partition_to_zero(make):
    def after(**changes):
        trainer = make(f"run-{changes}", steps=20, **changes)
        trainer.train()
        batch = trainer.load(trainer.data, [0, 1, 2])
        engine = trainer.engines["model"]
        inputs = trainer.inputs(batch) | {"with_log_partition": True}
        return engine(**inputs)[1][trainer.targets(batch)].square().mean().item()

    assert after(z_loss=1.0) < after() / 2


def test_neftune_adds_noise_in_training_only(make):
    trainer = make(neftune_noise_alpha=5.0)
    model, ids = trainer.engines["model"].module, torch.arange(3, 9)[None]
    embed = model.transformer.get_input_embeddings()
    model.eval()
    assert torch.equal(embed(ids), embed(ids))
    model.train()
    noise = embed(ids) - embed.weight[ids]
    assert 0 < noise.abs().max() <= 5.0 / (6 * 32) ** 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(max_length=10), "set max_length to that, not 10"),
        (dict(mix=["zh"]), "mix is a list; it takes a mapping"),
        (dict(freeze="all-but-embeddings", plugin="gemini"), "plugin zero2"),
        (dict(train_data=["nowhere"]), "run prepare_pretrain"),
        (dict(eval_column="subset"), "told apart by their category: leave out eval_column"),
    ],
)
def test_what_cannot_be_is_one_error(changes, words, make):
    with pytest.raises(UserError) as error:
        make(**changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(sequence_parallel=2), "--document_mask False, or sequence_parallel 1"),
        (dict(tensor_parallel=2, split_sequence=True), "--document_mask False, or sequence_parallel 1"),
        (dict(padding_free=True), "leave out padding_free"),
        (dict(neftune_noise_alpha=1.0, tensor_parallel=2), "neftune_noise_alpha 0"),
        (dict(attn_implementation="flash_attention_2"), "micro_batch_size 1, or sdpa"),
        (dict(freeze="all-but-embeddings", lora_rank=2), "freeze none, or lora_rank 0"),
    ],
)
def test_what_a_split_or_adapted_model_cannot_do_is_one_error(changes, words):
    with pytest.raises(UserError) as error:
        configure(PretrainConfig, **changes).check(2)
    assert words in str(error.value)


def test_a_model_that_cannot_keep_documents_apart_is_refused(make, tiny_world, tmp_path):
    from transformers import OPTConfig

    sizes = dict(vocab_size=320, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64).save_pretrained(tmp_path / "opt")
    config = str(tmp_path / "opt" / "config.json")
    with pytest.raises(UserError, match="OPTForCausalLM can't keep documents apart: --document_mask False"):
        make(model_config=config)
    make(model_config=config, document_mask=False, steps=1).train()


# --- stages


@pytest.fixture
def plan_file(tiny_world, packed, tmp_path):
    """Three stages; the path of the YAML."""
    shared = settings(tiny_world, packed, output_dir=str(tmp_path / "out")) | dict(resume="auto")
    stages = [
        dict(name="warm-up", freeze="all-but-embeddings", buckets=[0], steps=2),
        dict(name="knowledge", tokens=900, steps=0),
        dict(name="replay", mix={"zh": 0.5, "en": 0.5}, learning_rate=1e-3, steps=3),
    ]
    path = tmp_path / "plan.yaml"
    in_file = [nested(PretrainConfig, {k: v for k, v in stage.items() if k != "name"}) for stage in stages]
    named = [{"name": stage["name"]} | values for stage, values in zip(stages, in_file, strict=True)]
    path.write_text(yaml.safe_dump(nested(PretrainConfig, shared) | {"stages": named}))
    return path


def parse(path, *flags: str):
    return parse_stages(PretrainConfig, "", ["--config", str(path), *flags])


def test_each_stage_goes_on_from_the_one_before(plan_file, runtime, tmp_path):
    plan = parse(plan_file)
    assert [stage.model.path and Path(stage.model.path).parent.name for stage in plan.stages] == [
        None,
        "1-warm-up",
        "2-knowledge",
    ]
    StagedPretraining(plan, runtime).train()
    folders = [tmp_path / "out" / name for name in ("1-warm-up", "2-knowledge", "3-replay")]
    assert all((folder / "model" / "config.json").is_file() for folder in folders)
    first = [read_metrics(folder)[0]["eval/loss"] for folder in folders]
    last = [read_metrics(folder)[-1]["eval/loss"] for folder in folders]
    assert first[1:] == pytest.approx(last[:-1], rel=1e-5)
    assert json.loads((folders[2] / "run.json").read_text())["name"] == "replay"


def test_a_stopped_run_goes_on_in_the_stage_where_it_was(plan_file, runtime, tmp_path):
    """To the same weights; finished stages are not touched again."""
    StagedPretraining(parse(plan_file, "--output_dir", str(tmp_path / "whole")), runtime).train()
    plan = parse(plan_file)
    runtime.stop_requested = None

    class Stop(PretrainTrainer):
        def step(self, k):
            if self.config.tracking.run_name == "knowledge" and k == 1:
                self.runtime.stop_requested = "SIGTERM"
            return super().step(k)

    stopped = StagedPretraining(plan, runtime)
    stopped.trainer_class = Stop
    try:
        stopped.train()
    finally:
        runtime.stop_requested = None
    assert not (tmp_path / "out" / "2-knowledge" / "model").exists()
    left = (tmp_path / "out" / "1-warm-up" / "model" / "model.safetensors").stat().st_mtime_ns
    StagedPretraining(parse(plan_file), runtime).train()
    assert (tmp_path / "out" / "1-warm-up" / "model" / "model.safetensors").stat().st_mtime_ns == left
    expected, found = (weights(tmp_path / name / "3-replay") for name in ("whole", "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


UP_TO_TORCH = """
import os, sys
from coati.errors import UserError
from coati.trainers.main import main
from colossal_llama.pretraining.stage_plan import parse_stages
from colossal_llama.pretraining.stage_settings import PretrainConfig

def load_trainer():
    raise UserError(f"GPUs: {os.environ.get('CUDA_VISIBLE_DEVICES')!r}")

main(PretrainConfig, load_trainer, "continued pre-training", parse_stages)
"""


@pytest.mark.parametrize(("flags", "visible"), [([], "'3'"), (["--device", "cpu"], "''")])
def test_the_command_reads_the_plan_and_hides_gpus_from_a_run_on_cpu(plan_file, flags, visible):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "3"}
    command = [sys.executable, "-c", UP_TO_TORCH, "--config", str(plan_file), *flags]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"error: GPUs: {visible}" in ended.stderr, ended.stderr[-2000:]


def test_flags_win_in_every_stage(plan_file):
    assert {stage.optimizer.learning_rate for stage in parse(plan_file, "--learning_rate", "0.5").stages} == {0.5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.pop("stages"), "`stages` must be a list"),
        (lambda plan: plan.update(stages=[]), "`stages` must be a list"),
        (lambda plan: plan["stages"][1].pop("name"), "stage 2: give it a name"),
        (lambda plan: plan["stages"][1].update(name="../x"), "stage 2: give it a name"),
        (
            lambda plan: plan["stages"][2].update(learning_rat=1),
            "stage 3: unknown setting 'learning_rat'; did you mean",
        ),
        (lambda plan: plan["stages"][0].update(batch_size=0), "batch_size is '0'"),
    ],
)
def test_a_wrong_plan_is_one_error(change, words, plan_file):
    plan = yaml.safe_load(plan_file.read_text())
    change(plan)
    plan_file.write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError) as error:
        parse(plan_file)
    assert words in str(error.value)


def test_the_last_stages_data_is_looked_for_before_the_first_trains(plan_file, runtime, tmp_path):
    plan = parse(plan_file)
    plan.stages[2].data.train_data = [str(tmp_path / "nowhere")]
    with pytest.raises(UserError, match="nowhere is no folder of packed rows"):
        StagedPretraining(plan, runtime)
    assert not (tmp_path / "out").exists()
