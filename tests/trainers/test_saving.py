"""What would fail in a save fails before the first step, and what is saved is what was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor, RewardModel
from coati.trainers import first_save
from tests.conftest import reward_model, settings_for, trainer_classes


def make(algorithm: str, world, runtime, output: Path, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    return trainer_class(
        configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes)), runtime
    )


def copied(world, folder: Path, **changes) -> str:
    """The tiny policy's folder, with other values in its JSON files: `config=...`, `generation_config=...`."""
    shutil.copytree(world["policy"], folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if name == "config" else {}) | values))
    return str(folder)


def said_by(runtime, monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(runtime, "say", lines.append)
    return lines


# --- before the first step

CONTRADICTIONS = {
    "sampling without do_sample": (dict(temperature=0.9, top_p=0.6), dict(do_sample=True, temperature=0.9, top_p=0.6)),
    "top-k and min-p": (dict(do_sample=False, top_k=20, min_p=0.1), dict(do_sample=True, top_k=20, min_p=0.1)),
    "beams' settings": (
        dict(length_penalty=0.8, early_stopping=True, repetition_penalty=1.1),
        dict(repetition_penalty=1.1),
    ),
    "outputs": (dict(output_scores=True, max_new_tokens=9), dict(max_new_tokens=9)),
    "padding": (dict(pad_token_id=-1), {}),
    "several": (
        dict(temperature=0.5, output_attentions=True, length_penalty=2.0),
        dict(do_sample=True, temperature=0.5),
    ),
    "nothing wrong": (dict(temperature=0.5, do_sample=True), dict(temperature=0.5, do_sample=True)),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_contradictory_generation_config_is_repaired_and_said(kind, tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 1: as Llama 2's, Vicuna's and many fine-tunes' are. What can be kept of it is in the export."""
    given, kept = CONTRADICTIONS[kind]
    policy, lines = copied(tiny_world, tmp_path / "policy", generation_config=given), said_by(runtime, monkeypatch)
    make("sft", tiny_world, runtime, tmp_path / "run", steps=1, model=policy, model_config=None).train()
    notes = [line for line in lines if "generation_config.json" in line]
    assert len(notes) == (kind != "nothing wrong")
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    names = saved.keys() - {"eos_token_id", "bos_token_id", "transformers_version", "output_attentions"}
    assert {name: saved[name] for name in names if saved[name] not in (None, False)} == kept
    for line in notes:
        assert all(f"{name} " in line for name in given if name not in kept)


@pytest.mark.parametrize("algorithm", ["sft", "reward", "ppo"])
def test_what_would_fail_in_a_save_fails_at_the_start(algorithm, tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 1: whichever part of it raises, in one line, before a step; nothing of the try is left."""
    trainer = make(algorithm, tiny_world, runtime, tmp_path / "run", steps=1)
    engine = next(iter(trainer.engines.values()))
    engine.module.config.something = object()  # no JSON
    monkeypatch.setattr(trainer, "step", lambda k: pytest.fail("a step was done"))
    with pytest.raises(UserError, match="could not be saved at the end of this run: "):
        trainer.train()
    assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} <= {".lock"}


def test_a_tokenizer_that_can_not_be_saved_is_noticed_at_the_start(tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 1."""
    trainer = make("sft", tiny_world, runtime, tmp_path, steps=1)
    trainer.tokenizer.init_kwargs["something"] = object()
    monkeypatch.setattr(trainer, "step", lambda k: pytest.fail("a step was done"))
    with pytest.raises(UserError, match="could not be saved"):
        trainer.train()


def test_trained_weights_that_an_adapter_does_not_hold_are_noticed_at_the_start(tiny_world, runtime, tmp_path):
    """REPORTS 1 and 3."""
    changes = dict(model=tiny_world["policy"], model_config=None, lora_rank=2)
    trainer = make("sft", tiny_world, runtime, tmp_path, steps=1, **changes)
    norm = trainer.engines["model"].module.transformer.model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"1 trained weights would not be saved .* folder: .*norm\.weight"):
        trainer.train()
    assert norm.grad is None


def test_an_adapter_that_can_not_be_merged_is_noticed_at_the_start(tiny_world, runtime, tmp_path, monkeypatch):
    """REPORT 1: the merge is tried on tensors without data."""
    from peft.tuners.lora import LoraModel

    def refuse(self):
        raise ValueError("replicated layers")

    monkeypatch.setattr(LoraModel, "_check_merge_allowed", refuse)
    changes = dict(model=tiny_world["policy"], model_config=None, lora_rank=2, steps=1)
    with pytest.raises(UserError, match="could not be saved at the end of this run: replicated layers"):
        make("sft", tiny_world, runtime, tmp_path / "run", **changes).train()
    make("sft", tiny_world, runtime, tmp_path / "unmerged", **changes, merge_lora=False).train()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("sft", {}),
        ("sft", dict(lora_rank=128)),
        ("sft", dict(lora_rank=128, merge_lora=False)),
        ("ppo", {}),
        ("reward", dict(export_dtype="bf16", plugin="zero2")),
        ("sft", dict(precision="bf16", plugin="zero1")),
    ],
    ids=str,
)
def test_free_space_is_compared_with_what_will_be_written(
    algorithm, changes, tiny_world, runtime, tmp_path, monkeypatch
):
    """REPORT 1: the two numbers of the error are those of the files that a run with room leaves."""
    settings = dict(steps=1, model=tiny_world["policy"], model_config=None) | changes
    trainer = make(algorithm, tiny_world, runtime, tmp_path / "run", **settings)
    found = {}
    monkeypatch.setattr("coati.trainers.folder.check_room", lambda output, *sizes: found.update(sizes=sizes))
    trainer.train()
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    written = size_of(checkpoint), sum(size_of(tmp_path / "run" / name) for name in ("model", "critic"))
    assert found["sizes"] == pytest.approx(written, rel=0.2)

    usage = lambda free: lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage(sum(found["sizes"]) - 1))
    with pytest.raises(UserError, match=r"has .* GB free, and this run needs .* GB \(a checkpoint .*, the final model"):
        first_save.check_room(tmp_path, *found["sizes"])
    monkeypatch.setattr(shutil, "disk_usage", usage(sum(found["sizes"])))
    first_save.check_room(tmp_path, *found["sizes"])


# --- what is saved


def ids_of(value) -> list[int]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("published", [None, 1, [1, 5]], ids=["no generation config", "an EOS", "a list"])
@pytest.mark.parametrize(("algorithm", "changes"), [("sft", {}), ("sft", dict(lora_rank=2)), ("reward", {})], ids=str)
def test_an_export_ends_where_its_tokenizer_does(algorithm, changes, published, tiny_world, runtime, tmp_path):
    """REPORT 4: a base model that is taught another end of turn; its old EOS goes on to end responses as it did in
    training."""
    policy = copied(
        tiny_world, tmp_path / "policy", generation_config={} if published is None else {"eos_token_id": published}
    )
    if published is None:
        (tmp_path / "policy" / "generation_config.json").unlink()
    settings = dict(model=policy, model_config=None, eos_token="<pad>", steps=1) | changes
    trainer = make(algorithm, tiny_world, runtime, tmp_path / "run", **settings)
    end = trainer.tokenizer.eos_token_id
    assert end == 2
    trainer.train()
    for folder in (tmp_path / "run" / "model", *(tmp_path / "run" / "checkpoints").glob("*/model/model")):
        config = json.loads((folder / "config.json").read_text())
        assert ids_of(config["eos_token_id"])[0] == end
        path = folder / "generation_config.json"
        known = published if published and algorithm == "sft" else 1  # a model that can't generate has a config only
        assert set(ids_of(config["eos_token_id"])) == {end, *ids_of(known)}
        if path.exists():
            assert json.loads(path.read_text())["eos_token_id"] == config["eos_token_id"]
    if algorithm == "sft":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
        assert tokenizer.eos_token_id == ids_of(model.generation_config.eos_token_id)[0]
        model.lm_head.weight.data.zero_()
        model.lm_head.weight.data[end] = 1.0
        model.model.norm.weight.data.zero_()  # all logits are 0: the first id; then none but the end's is drawn
        bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        bias.data[end] = 9.0
        model.lm_head.bias = bias
        prompt = torch.tensor([[5, 6]])
        assert model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0).shape[1] == 3


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(
    ("own", "changes", "expected"),
    [
        ("bfloat16", dict(precision="bf16"), "bf16"),
        ("bfloat16", {}, "bf16"),
        ("float16", {}, "fp16"),
        ("float32", {}, "fp32"),
        ("bfloat16", dict(export_dtype="fp32"), "fp32"),
        ("float32", dict(export_dtype="bf16"), "bf16"),
        ("bfloat16", dict(lora_rank=2), "bf16"),
        ("float32", dict(plugin="zero2", precision="bf16"), "bf16"),
        ("bfloat16", dict(plugin="zero2", precision="bf16"), "bf16"),
    ],
    ids=str,
)
def test_an_export_has_the_dtype_of_its_model(own, changes, expected, tiny_world, runtime, tmp_path):
    """REPORT 28: ddp holds float32 weights, which are no reason to hand out a model twice as large. Checkpoints keep
    all digits."""
    policy = copied(tiny_world, tmp_path / "policy", config={"dtype": own})
    settings = dict(model=policy, model_config=None, steps=1) | changes
    make("sft", tiny_world, runtime, tmp_path / "run", **settings).train()
    model = tmp_path / "run" / "model"
    assert {tensor.dtype for tensor in load_file(model / "model.safetensors").values()} == {DTYPES[expected]}
    assert json.loads((model / "config.json").read_text())["dtype"] == str(DTYPES[expected]).removeprefix("torch.")
    if changes in ({}, dict(precision="bf16")):
        [checkpoint] = (tmp_path / "run" / "checkpoints").glob("*/model/model/model.safetensors")
        assert {tensor.dtype for tensor in load_file(checkpoint).values()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_tied_are_cast_and_stored_once(tied, tmp_path):
    """REPORT 28."""
    from tests.models.families import tiny_config

    torch.manual_seed(0)
    model = RewardModel(config=tiny_config("llama", tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "reward", dtype=torch.bfloat16)
    assert RewardModel(tmp_path / "reward").value_head.weight.dtype == torch.bfloat16
    assert load_file(tmp_path / "reward" / "value_head.safetensors")["weight"].dtype == torch.float32
    actor = Actor(config=tiny_config("llama", tie_word_embeddings=tied))
    actor.save_pretrained(tmp_path / "policy", dtype=torch.bfloat16)
    assert ("lm_head.weight" in load_file(tmp_path / "policy" / "model.safetensors")) == (not tied)
    assert {p.dtype for p in actor.parameters()} == {torch.float32}


# --- adapters and quantized models in a run


def adapter_in(folder: Path, world, tokens: int = 0, **settings) -> str:
    """An adapter as peft leaves it, on the tiny policy, with so many more tokens than that has."""
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, tokenizer = (a.from_pretrained(world["policy"]) for a in (AutoModelForCausalLM, AutoTokenizer))
    if tokens:
        tokenizer.add_tokens([f"<more{i}>" for i in range(tokens)])
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    kind = IA3Config if "feedforward_modules" in settings else LoraConfig
    get_peft_model(base, kind(**{"target_modules": ["q_proj"], **settings})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tiny_world, tmp_path) -> str:
    """With more in it than LoRA's matrices."""
    return adapter_in(tmp_path / "adapter", tiny_world, modules_to_save=["lm_head"], bias="all", task_type="CAUSAL_LM")


ADAPTERS = {
    "a head": dict(modules_to_save=["lm_head", "embed_tokens"], task_type="CAUSAL_LM"),
    "embeddings": dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "tokens": dict(trainable_token_indices=list(range(3, 150))),
    "ia3": dict(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "more tokens": dict(tokens=3),
    "more tokens, trained": dict(tokens=3, modules_to_save=["lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapters_folder_is_trained_on_saved_resumed_and_exported(kind, tiny_world, runtime, tmp_path):
    """REPORTS 3 and 28: --model ADAPTER, whatever trains in it. A resumed run's export is the whole run's."""
    folder = adapter_in(tmp_path / "adapter", tiny_world, **ADAPTERS[kind])
    changes = dict(model=folder, model_config=None, steps=2, save_every=1, keep_checkpoints=9)
    trainer = make("sft", tiny_world, runtime, tmp_path / "run", **changes)
    trained = {name: p for name, p in trainer.engines["model"].module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    assert not [name for name in trained if torch.equal(trained[name], before[name]) and "lora_A" not in name]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    make("sft", tiny_world, runtime, tmp_path / "resumed", resume=str(checkpoint), **changes).train()
    expected, found = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "resumed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_modules_that_a_run_trains_whole_are_resumed_and_exported(tiny_world, runtime, tmp_path):
    whole = ["embed_tokens", "lm_head"]
    changes = dict(model=tiny_world["policy"], model_config=None, lora_rank=2, lora_modules_to_save=whole)
    changes |= dict(steps=2, save_every=1, keep_checkpoints=9)
    make("sft", tiny_world, runtime, tmp_path / "run", **changes).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    make("sft", tiny_world, runtime, tmp_path / "resumed", resume=str(checkpoint), **changes).train()
    places = [Path(tiny_world["policy"]), tmp_path / "run" / "model", tmp_path / "resumed" / "model"]
    base, expected, found = (load_file(place / "model.safetensors") for place in places)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(expected["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(expected["lm_head.weight"], base.get("lm_head.weight", base["model.embed_tokens.weight"]))
    with pytest.raises(UserError, match="lora_modules_to_save is for adapters"):
        make("sft", tiny_world, runtime, tmp_path / "none", lora_modules_to_save=whole)


def test_rewards_and_critics_start_from_a_policys_adapter(adapter, tiny_world, runtime, tmp_path):
    """REPORT 2: train_rm on what SFT left, and PPO whose critic is not named."""
    make("reward", tiny_world, runtime, tmp_path / "rm", model=adapter, model_config=None, steps=1).train()
    make("ppo", tiny_world, runtime, tmp_path / "ppo", model=adapter, steps=1).train()


@pytest.mark.parametrize("setting", ["model", "critic_model", "reward_model"])
def test_adapters_folders_are_refused_where_adapters_are(setting, adapter, tiny_world, runtime, tmp_path):
    """REPORT 28: whichever setting names one."""
    named = {"rewards": [reward_model(adapter)]} if setting == "reward_model" else {setting: adapter}
    changes = {"plugin": "gemini"} | named
    with pytest.raises(UserError, match=r"LoRA adapters.*\(--lora_rank 0, adapters merged\)"):
        make("ppo", tiny_world, runtime, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
