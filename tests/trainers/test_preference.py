"""Preference runs in this process: what is learned, from which reference, and what is kept of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.config.schema import leaves
from coati.errors import UserError
from coati.files import partial_path
from coati.losses import response_targets
from coati.tracking import read_metrics, read_samples
from coati.trainers.config import PreferenceConfig
from coati.trainers.preference import PreferenceTrainer
from coati.trainers.reference import response_sums
from tests.conftest import ROOT, sentence, settings_for, trainer_classes, write_rows
from tests.oracles import preference as oracle
from tests.trainers.steps import nudge
from tests.trainers.test_training import losses, weights

LOSSES = ("dpo", "robust-dpo", "hinge", "ipo", "simpo", "orpo", "cpo", "kto")


def make(world, runtime, output: Path, /, **changes):
    config_class, factory = trainer_classes("preference")
    return factory(
        configure(config_class, **settings_for("preference", world, output_dir=str(output), **changes)), runtime
    )


def moved(world, runtime, output: Path, /, **changes):
    """A trainer whose policy is away from its reference."""
    trainer = make(world, runtime, output, **changes)
    nudge(p for p in trainer.engines["model"].module.parameters() if p.requires_grad)
    return trainer


def plain_sums(model: str | Path, sequences) -> list[float]:
    """Log-probs of answers by plain transformers, one row at a time, without padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, (str, Path)) else model
    sums = []
    for sequence in sequences:
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(log_probs[torch.tensor(sequence.loss_mask[1:])].double().sum().item())
    return sums


def answers_of(trainer, sequences) -> list[tuple[float, int, float]]:
    """What the oracle reads: policy, length, reference."""
    policy = plain_sums(trainer.engines["model"].module.model, sequences)
    reference = plain_sums(trainer.config.model.path, sequences)
    return list(zip(policy, (sum(s.loss_mask) for s in sequences), reference, strict=True))


# --- what is learned


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_each_loss_learns_and_leaves_a_model_logs_and_samples(loss, tiny_world, runtime, tmp_path):
    """PITFALL 33: both answers of a pair are there to be read, with their rewards."""
    make(tiny_world, runtime, tmp_path, algorithm=loss, steps=8).train()
    rows = read_metrics(tmp_path)
    page = (ROOT / "docs" / "preference.md").read_text()
    logged = {name for row in rows for name in row} - {"step", "time"}
    assert sorted(n for n in logged if f"`{n}`" not in page and f"`{n.removeprefix('eval/')}`" not in page) == []
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    first, *_, last = (row for row in rows if "eval/loss" in row)
    assert last["eval/loss"] < first["eval/loss"] and last["eval/margin"] > first["eval/margin"]
    if loss != "kto":
        assert last["eval/accuracy_low"] < last["eval/accuracy"] + 1e-9 and last["eval/pairs"] == 11
        assert last["eval/accuracy_high"] > last["eval/accuracy"] - 1e-9
    names = {"label", "reward"} if loss == "kto" else {"side", "reward"}
    assert all(names <= row.keys() and row["response"] for row in read_samples(tmp_path))
    assert (tmp_path / "model" / "config.json").is_file()


def test_kto_measures_each_file_and_takes_the_kl_from_all(tiny_world, runtime, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    pairs = [json.loads(line) for line in Path(tiny_world["pairs_eval"]).read_text().splitlines()]
    for path, side in ((good, "chosen"), (bad, "rejected")):
        rows = [{"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"} for p in pairs]
        write_rows(path, rows)
    trainer = moved(tiny_world, runtime, tmp_path / "run", algorithm="kto", eval_data=[str(good), str(bad)])
    metrics, _ = trainer.evaluate()
    assert metrics["responses/good"] == metrics["responses/bad"] == len(pairs)
    assert metrics["kl/good"] == pytest.approx(metrics["kl"]) == pytest.approx(metrics["kl/bad"])
    assert metrics["loss"] == pytest.approx((metrics["loss/good"] + metrics["loss/bad"]) / 2)
    assert metrics["reward_desirable/good"] == pytest.approx(metrics["reward_desirable"])
    assert "reward_desirable/bad" not in metrics and "margin/good" not in metrics


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo"])
def test_the_steps_loss_is_the_oracles_on_log_probs_of_plain_transformers(loss, tiny_world, runtime, tmp_path):
    """The policy and, as the reference, the model in the folder that the run started from; the answers' tokens only."""
    trainer = moved(tiny_world, runtime, tmp_path, algorithm=loss, nll_coefficient=0.3, beta=0.4, learning_rate=0.0)
    pairs = [trainer.data[row] for row in trainer.order.batch(0)]
    chosen, rejected = (answers_of(trainer, [getattr(p, side) for p in pairs]) for side in ("chosen", "rejected"))
    found = trainer.step(0)
    _, expected = oracle.preference_loss(loss, chosen, rejected, len(pairs), 0.4, 0.0, 0.5, 0.3)
    assert abs(expected["margin"]) > 0.001
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_kto_loss_is_the_oracles_with_the_kl_of_exchanged_answers(tiny_world, runtime, tmp_path):
    from transformers import AutoModelForCausalLM

    bad = AutoModelForCausalLM.from_pretrained(tiny_world["policy"])
    first = {name: tensor.clone() for name, tensor in bad.state_dict().items()}
    nudge(bad.parameters(), 0.2)  # a reference that gives any answer less than the policy does
    bad.save_pretrained(tmp_path / "bad")
    settings = dict(algorithm="kto", beta=0.4, undesirable_weight=1.5, model=str(tmp_path / "bad"))
    trainer = make(tiny_world, runtime, tmp_path / "run", **settings)
    trainer.engines["model"].module.model.load_state_dict(first)
    rows = sorted(trainer.order.batch(0))
    samples = [trainer.data[row] for row in rows]
    mixed = []
    for i, asked in enumerate(samples):
        answer = samples[(i + len(samples) // 2) % len(samples)].sequence
        prompt, start = asked.sequence.loss_mask.index(True), answer.loss_mask.index(True)
        ids = asked.sequence.input_ids[:prompt] + answer.input_ids[start:]
        mixed.append(replace(answer, input_ids=ids, loss_mask=[False] * prompt + answer.loss_mask[start:]))
    kl = sum(p - q for p, _, q in answers_of(trainer, mixed)) / len(mixed)
    good = [sample.desirable for sample in samples]
    assert kl > 0 and 0 < sum(good) < len(good)
    answers = answers_of(trainer, [sample.sequence for sample in samples])
    _, expected = oracle.kto_loss(answers, good, kl, len(good), 0.4, 1.0, 1.5)
    found = trainer.step(0)
    for sort, count in (("desirable", sum(good)), ("undesirable", len(good) - sum(good))):
        for name in (f"reward_{sort}", f"log_probs_{sort}"):
            expected[name] *= len(good) / count
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_evaluation_gives_the_oracles_numbers(tiny_world, runtime, tmp_path):
    trainer = moved(tiny_world, runtime, tmp_path, algorithm="dpo", micro_batch_size=3)
    pairs = list(trainer.eval_data)
    chosen, rejected = (answers_of(trainer, [getattr(p, side) for p in pairs]) for side in ("chosen", "rejected"))
    _, expected = oracle.preference_loss("dpo", chosen, rejected, len(pairs), 0.1, 0.0, 0.5)
    found, samples = trainer.evaluate()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert [s["side"] for s in samples] == ["chosen", "rejected"] * 4
    assert samples[2]["reward"] == pytest.approx(0.1 * (chosen[1][0] - chosen[1][2]), rel=1e-3, abs=1e-4)


# --- the reference


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_losses_without_a_reference_have_none(loss, tiny_world, runtime, tmp_path):
    """PITFALL 29: nothing is made of, or asked of, a reference that isn't there, even from random weights."""
    changes = dict(model=None, model_config=tiny_world["model_config"])
    trainer = make(tiny_world, runtime, tmp_path, algorithm=loss, steps=2, **changes)
    assert trainer.reference is None
    trainer.train()
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_reference_stays_the_first_policy_after_a_resume(loss, tiny_world, runtime, tmp_path):
    """PITFALL 13: the trained policy is not taken for the reference."""
    make(tiny_world, runtime, tmp_path, algorithm=loss, steps=3, save_every=3).train()
    resumed = make(tiny_world, runtime, tmp_path, algorithm=loss, steps=4, resume="auto")
    first = load_file(Path(tiny_world["policy"]) / "model.safetensors")
    state, policy = (e.module.model.state_dict() for e in (resumed.reference.engine, resumed.engines["model"]))
    assert all(torch.equal(state[name], tensor) for name, tensor in first.items())
    assert not all(torch.equal(policy[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_with_lora_the_reference_is_the_policy_without_its_adapter(loss, tiny_world, runtime, tmp_path):
    """No copy of the model: the same log-probs as a copy gives, and dropout of the adapter is off too."""
    trainer = moved(tiny_world, runtime, tmp_path / "lora", algorithm=loss, lora_rank=2, lora_dropout=0.5)
    other = make(tiny_world, runtime, tmp_path / "whole", algorithm=loss)
    assert trainer.reference.engine is trainer.model and other.reference.engine is not other.model
    batch = trainer.load(trainer.data, [0, 5, 9])
    [theirs], [same] = other.reference.sums_of([batch]), trainer.reference.sums_of([batch])
    torch.testing.assert_close(same, theirs, rtol=1e-6, atol=1e-5)
    [policy] = response_sums(trainer.model, [batch], trainer.inputs)
    assert (policy - same).abs().max() > 1e-3
    assert torch.equal(policy, response_sums(trainer.model, [batch], trainer.inputs)[0])
    trainer.step(0)
    assert torch.equal(trainer.reference.sums_of([batch])[0], same)


def test_an_adapter_that_goes_on_training_is_compared_with_itself(tiny_world, runtime, tmp_path):
    changes = dict(lora_rank=2, steps=2, merge_lora=False)
    make(tiny_world, runtime, tmp_path / "first", **changes).train()
    trainer = make(tiny_world, runtime, tmp_path / "second", **changes | dict(model=str(tmp_path / "first" / "model")))
    assert trainer.reference.engine is not trainer.model
    metrics = trainer.step(0)
    assert metrics["margin"] == pytest.approx(0, abs=1e-6)


# --- the cache


def cache_files(folder: Path) -> set[Path]:
    return set(folder.glob("reference-*.safetensors"))


def no_model(self):
    raise AssertionError("the reference model was loaded")


@pytest.mark.parametrize("changes", [{}, dict(lora_rank=2)], ids=["copy", "adapter off"])
def test_a_cached_reference_gives_the_curve_of_a_loaded_one(changes, tiny_world, runtime, tmp_path):
    settings = dict(cache_dir=str(tmp_path / "cache"), steps=7, micro_batch_size=3, eval_every=3, **changes)
    make(tiny_world, runtime, tmp_path / "loaded", **settings).train()
    trainer = make(tiny_world, runtime, tmp_path / "cached", **settings, cache_reference=True)
    assert {len(x) for x in trainer.reference.of_sets.values()} == {40, 11}
    trainer.train()
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "loaded"), rel=1e-5)
    evaluations = [
        [row["eval/margin"] for row in read_metrics(tmp_path / name) if "eval/margin" in row]
        for name in ("cached", "loaded")
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4, abs=1e-5)


def test_a_cache_is_read_by_later_runs_until_model_or_data_change(tiny_world, runtime, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    settings = dict(cache_dir=str(tmp_path / "cache"), cache_reference=True)
    first = make(tiny_world, runtime, tmp_path / "first", **settings)
    files = cache_files(tmp_path / "cache")
    assert len(files) == 2 and not [f for f in files if f.suffix != ".safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "make_reference", no_model)
        again = make(
            tiny_world, runtime, tmp_path / "again", **settings, beta=0.7, algorithm="ipo", seed=3, batch_size=4
        )
    read, computed = again.reference.of_sets, first.reference.of_sets
    assert read.keys() == computed.keys() and all(torch.equal(read[key], computed[key]) for key in computed)
    # other rows, another template, other weights in a folder of the same name
    rows = Path(tiny_world["pairs"]).read_text().splitlines()[:12]
    pairs = write_rows(tmp_path / "few.jsonl", [json.loads(row) for row in rows])
    (tmp_path / "template").write_text(
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    )
    make(tiny_world, runtime, tmp_path / "rows", **settings, train_data=[pairs], eval_data=[])
    assert len(cache_files(tmp_path / "cache")) == 3
    changes = dict(chat_template=str(tmp_path / "template"), eval_data=[])
    make(tiny_world, runtime, tmp_path / "template-run", **settings, **changes)
    assert len(cache_files(tmp_path / "cache")) == 4
    model = AutoModelForCausalLM.from_pretrained(tiny_world["policy"])
    model.save_pretrained(tmp_path / "policy")
    changes = dict(model=str(tmp_path / "policy"), eval_data=[])
    before = make(tiny_world, runtime, tmp_path / "before", **settings, **changes)
    nudge(model.parameters())
    model.save_pretrained(tmp_path / "policy")
    after = make(tiny_world, runtime, tmp_path / "after", **settings, **changes)
    [key] = before.reference.of_sets
    assert (before.reference.of_sets[key] - after.reference.of_sets[key]).abs().max() > 1e-3
    expected = plain_sums(tmp_path / "policy", [after.data[3].chosen, after.data[3].rejected])
    assert after.reference.of_sets[key][3].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_cache_that_was_not_finished_is_not_read(tiny_world, runtime, tmp_path):
    """PITFALL 26: it is written aside and renamed."""
    settings = dict(cache_dir=str(tmp_path / "cache"), cache_reference=True, eval_data=[])
    make(tiny_world, runtime, tmp_path / "first", **settings)
    [file] = cache_files(tmp_path / "cache")
    whole = file.read_bytes()
    file.rename(partial_path(file))
    partial_path(file).write_bytes(whole[:-8])
    make(tiny_world, runtime, tmp_path / "second", **settings)
    assert file.read_bytes() == whole


# --- resuming


@pytest.mark.parametrize(
    "changes",
    [
        dict(algorithm="dpo"),
        dict(algorithm="kto"),
        pytest.param(dict(cache_reference=True), marks=pytest.mark.slow),
        pytest.param(dict(lora_rank=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resuming_is_bitwise_the_same_as_never_stopping(changes, tiny_world, runtime, tmp_path):
    """PITFALL 25 and 13."""
    changes = changes | dict(steps=8, save_every=3, keep_checkpoints=9, cache_dir=str(tmp_path / "cache"))
    make(tiny_world, runtime, tmp_path / "whole", **changes).train()
    resume = str(tmp_path / "whole" / "checkpoints" / "step-00000003")
    resumed = make(tiny_world, runtime, tmp_path / "resumed", **changes, resume=resume)
    assert resumed.steps_done == 3
    resumed.train()
    expected, found = weights(tmp_path / "whole" / "model"), weights(tmp_path / "resumed" / "model")
    assert expected and all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "whole")[3:] == losses(tmp_path / "resumed")


# --- KTO's exchanged answers


def test_exchanged_answers_belong_to_other_prompts_and_keep_to_the_length(tiny_world, runtime, tmp_path, monkeypatch):
    """Long prompts get the long answers of short ones, and lose what is too much from their left."""
    import coati.trainers.kto as module

    pairs = [
        {"prompt": sentence(i, 14 if i < 2 else 2), "chosen": sentence(i, 1 if i < 2 else 12), "rejected": f"no {i}"}
        for i in range(4)
    ]
    path = write_rows(tmp_path / "rows.jsonl", pairs)
    settings = dict(algorithm="kto", train_data=[path], eval_data=[], max_length=48)
    trainer = make(tiny_world, runtime, tmp_path / "run", **settings)
    seen, collate = [], module.collate_sft
    monkeypatch.setattr(module, "collate_sft", lambda rows, pad: seen.extend(rows) or collate(rows, pad))
    rows = [trainer.data[row].sequence for row in range(8)]  # both answers to each prompt
    trainer.mismatched_kl(trainer.data, list(range(8)))
    prompts = [row.input_ids[: row.loss_mask.index(True)] for row in rows]
    answers = [row.input_ids[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    expected = []
    for prompt, answer in zip(prompts, answers[4:] + answers[:4], strict=True):
        surplus = max(len(prompt) + len(answer) - 48, 0)
        expected.append(prompt[:1] + prompt[1 + surplus :] + answer)
    assert sorted(row.input_ids for row in seen) == sorted(expected)
    assert max(map(len, expected)) == 48 and len({len(x) for x in expected}) > 2  # some were cut, some not
    assert all(row.input_ids[0] == trainer.tokenizer.bos_token_id and row.loss_mask[-1] for row in seen)


def test_kto_batches_are_not_sorted_into_one_sort(tiny_world, runtime, tmp_path):
    """The chosen answers here are the longer ones."""
    trainer = make(tiny_world, runtime, tmp_path, algorithm="kto")
    shares = [sum(trainer.data[row].desirable for row in trainer.order.batch(k)) / 8 for k in range(10)]
    assert sum(shares) == 5.0 and all(0 < share < 1 for share in shares)


def test_kto_reads_labels_and_reports_what_is_there(tiny_world, runtime, tmp_path):
    rows = [{"prompt": f"ask {i}", "completion": f"answer {i}", "label": True} for i in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    trainer = make(tiny_world, runtime, tmp_path / "run", algorithm="kto", train_data=[path], eval_data=[path])
    metrics = trainer.step(0)
    assert metrics["desirable"] == 1.0
    assert "reward_desirable" in metrics and not {"reward_undesirable", "margin"} & metrics.keys()
    assert {row["label"] for row in trainer.evaluate()[1]} == {True}


def test_every_setting_is_explained():
    page = (ROOT / "docs" / "preference.md").read_text()
    names = {path.rpartition(".")[2] for path in leaves(PreferenceConfig) if path.startswith("algorithm.")} - {"type"}
    assert len(names) == 9 and sorted(name for name in names if f"`{name}`" not in page) == []


# --- batches and bad input


def test_padding_may_hold_anything(tiny_world, runtime, tmp_path):
    """PITFALL 7: log-probs of NaN outside the answers reach neither loss nor gradient."""
    trainer = make(tiny_world, runtime, tmp_path)
    [batch] = trainer.load_all(trainer.data, [[0, 1, 2]], [0, 1, 2])
    log_probs = -torch.rand(batch.input_ids.shape)
    bad = log_probs.masked_fill(~response_targets(batch.loss_mask), torch.nan).requires_grad_()
    loss, metrics = trainer.loss(bad, batch, 3.0)
    assert (loss, metrics) == trainer.loss(log_probs, batch, 3.0)
    loss.backward()
    assert bad.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=None, model_config="CONFIG"), "--model FOLDER"),
        (dict(beta=0.0), "beta is 0.0: it must be above 0"),
        (dict(algorithm="robust-dpo", label_smoothing=0.5), "must be below 0.5"),
        (dict(algorithm="ipo", label_smoothing=0.1), "no label_smoothing"),
        (dict(algorithm="simpo", length_normalized=True), "simpo has no length_normalized"),
        (dict(algorithm="kto", nll_coefficient=1.0), "nll_coefficient"),
        (dict(algorithm="kto", batch_size=1), "at least 2"),
        (dict(algorithm="kto", cache_reference=True), "cache_reference"),
        (dict(algorithm="orpo", cache_reference=True), "cache_reference"),
        (dict(max_tokens_per_batch=100), "a pair"),
        (dict(algorithm="kto", train_data="SFT"), "`label`"),
        (dict(train_data="SFT"), "`chosen` and `rejected`"),
    ],
)
def test_bad_settings_are_refused_in_one_line(changes, message, tiny_world, runtime, tmp_path):
    """PITFALL 20."""
    changes = {k: tiny_world["model_config"] if v == "CONFIG" else v for k, v in changes.items()}
    changes = {k: [tiny_world["sft"]] if v == "SFT" else v for k, v in changes.items()}
    with pytest.raises(UserError) as error:
        make(tiny_world, runtime, tmp_path / "run", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)
