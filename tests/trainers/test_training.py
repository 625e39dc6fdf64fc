"""Whole tiny runs of SFT, reward model and PPO in this process."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics, read_samples
from coati.trainers import ppo
from tests.conftest import ROOT, functions, reward_model, settings_for, trainer_classes, write_rows
from tests.trainers.steps import iterate

ALGORITHMS = ("sft", "reward", "ppo")


def make(algorithm: str, world, runtime, output: Path, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    return trainer_class(
        configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes)), runtime
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{p.parent.name}/{k}": v for p in sorted(folder.rglob("*.safetensors")) for k, v in load_file(p).items()}


def losses(output: Path) -> list[float]:
    return [row[name] for row in read_metrics(output) for name in ("loss", "policy_loss") if name in row]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_learns_and_leaves_a_model_logs_and_samples(algorithm, tiny_world, runtime, tmp_path):
    """PITFALL 33: the samples are there to be read."""
    make(algorithm, tiny_world, runtime, tmp_path / "run", steps=8).train()
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(9))
    best = {"sft": "eval/loss", "reward": "eval/loss", "ppo": "eval/reward"}[algorithm]
    first, last = (row[best] for row in rows if best in row)
    assert last > first if algorithm == "ppo" else last < first
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert read_samples(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_reward_model_learns_of_ties_and_dpo_refuses_them(tiny_world, runtime, tmp_path):
    """Before the first step rewards are nearly equal: a win has the probability 1 / (1 + theta), a tie
    (theta - 1) / (theta + 1)."""
    rows = [json.loads(line) for line in Path(tiny_world["pairs"]).read_text().splitlines()]
    ties = write_rows(
        tmp_path / "ties.jsonl", [row | ({"preference": "tie"} if i % 4 else {}) for i, row in enumerate(rows)]
    )
    data = dict(train_data=[ties], eval_data=[ties], steps=8)
    make("reward", tiny_world, runtime, tmp_path / "run", tie_theta=3.0, **data).train()
    first, *_, last = [row["eval/loss"] for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    assert first == pytest.approx(math.log(4) / 4 + 3 * math.log(2) / 4, abs=0.1) and last < first
    for algorithm in ("reward", "preference"):
        with pytest.raises(UserError, match=r"ties\.jsonl.*2.*the row is a tie"):
            make(algorithm, tiny_world, runtime, tmp_path / algorithm, **data).train()


def test_the_final_model_opens_in_plain_transformers(tiny_world, runtime, tmp_path):
    """PITFALL 23: config and tokenizer lie beside the weights."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    trainer = make("sft", tiny_world, runtime, tmp_path / "sft", steps=2)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "sft" / "model").eos_token == "<eos>"
    trained = trainer.engines["model"].module.model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    make("reward", tiny_world, runtime, tmp_path / "rm", steps=2).train()
    AutoModel.from_pretrained(tmp_path / "rm" / "model")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resuming_is_bitwise_the_same_as_never_stopping(algorithm, tiny_world, runtime, tmp_path):
    """PITFALL 25 and 13: sampler, random states, optimizers and KL state all go on; each model gets its own weights."""
    changes = {}
    if algorithm == "ppo":  # sampling, so that the random state counts; adaptive KL and running statistics too
        changes = dict(temperature=1.0, kl_target=0.5, kl_horizon=50, normalize_reward=True)
    changes |= dict(steps=12, save_every=5, keep_checkpoints=9)  # several epochs of 5 batches
    whole = make(algorithm, tiny_world, runtime, tmp_path / "whole", **changes)
    whole.train()
    resumed = make(
        algorithm,
        tiny_world,
        runtime,
        tmp_path / "resumed",
        resume=str(tmp_path / "whole" / "checkpoints" / "step-00000005"),
        **changes,
    )
    assert resumed.steps_done == 5
    resumed.train()
    expected, found = weights(tmp_path / "whole" / "model"), weights(tmp_path / "resumed" / "model")
    assert expected.keys() == found.keys() and expected
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "whole")[5:] == losses(tmp_path / "resumed")
    assert whole.state() == resumed.state()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_do_not_change_the_result(algorithm, tiny_world, runtime, tmp_path):
    """PITFALL 9: the denominators are global. PITFALL 15: padding to the batch, not to max_length."""
    curves = []
    for size in (8, 3, 1):
        make(algorithm, tiny_world, runtime, tmp_path / str(size), micro_batch_size=size).train()
        curves.append(losses(tmp_path / str(size)))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4) and curves[0] == pytest.approx(curves[2], rel=1e-4)


def test_checkpoints_come_at_their_interval_and_the_newest_and_best_stay(tiny_world, runtime, tmp_path):
    """PITFALL 24: an interval of 5 in 12 steps saves at 5, 10 and 12."""
    trainer = make("sft", tiny_world, runtime, tmp_path, steps=12, save_every=5, eval_every=5, keep_checkpoints=2)
    trainer.train()
    names = [folder.name for folder in sorted((tmp_path / "checkpoints").iterdir())]
    assert names[-2:] == ["step-00000010", "step-00000012"] and len(names) <= 3
    assert trainer.folder.checkpoints.best().name in names


def test_evaluation_reads_the_evaluation_data_and_leaves_training_alone(tiny_world, runtime, tmp_path):
    """PITFALL 28: it counts the pairs of the evaluation file, and evaluating more often changes nothing."""
    often = make("reward", tiny_world, runtime, tmp_path / "often", eval_every=1)
    often.train()
    make("reward", tiny_world, runtime, tmp_path / "rarely").train()
    assert {row["eval/pairs"] for row in read_metrics(tmp_path / "often") if "eval/pairs" in row} == {11.0}
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")


@pytest.mark.parametrize("algorithm", ["sft", "reward", "preference"])
def test_each_of_several_evaluation_files_is_measured_as_if_it_were_alone(algorithm, tiny_world, runtime, tmp_path):
    """Its rows sit in micro-batches with other files' rows and still have the metrics that they have alone."""
    name = {"sft": "sft_eval", "reward": "pairs_eval", "preference": "pairs_eval"}[algorithm]
    rows = Path(tiny_world[name]).read_text().splitlines(keepends=True)
    files = [tmp_path / "short.jsonl", tmp_path / "long.jsonl"]
    for path, part in zip(files, (rows[:4], rows[4:]), strict=True):
        path.write_text("".join(part))
    config_class, factory = trainer_classes(algorithm)

    def evaluated(label: str, *paths: Path):
        changes = dict(output_dir=str(tmp_path / label), eval_data=[str(path) for path in paths])
        changes |= (
            dict(algorithm="simpo") if algorithm == "preference" else {}
        )  # not the same for all pairs at the start
        return factory(configure(config_class, **settings_for(algorithm, tiny_world, **changes)), runtime).evaluate()

    (together, samples), alone = evaluated("both", *files), [evaluated(path.stem, path)[0] for path in files]
    assert together == pytest.approx(
        {name: value for name, value in together.items() if "/" not in name}
        | {f"{metric}/{path.stem}": v for path, found in zip(files, alone, strict=True) for metric, v in found.items()},
        rel=1e-5,
        abs=1e-6,
    )
    assert together["loss"] not in (found["loss"] for found in alone)
    assert len(samples) == (4 if algorithm == "sft" else 8)  # of the first rows, both answers of a pair


def test_every_epoch_sees_every_row_in_another_order(tiny_world, runtime, tmp_path):
    """PITFALL 25: the shuffle changes from epoch to epoch and no epoch is short."""
    trainer = make("sft", tiny_world, runtime, tmp_path)
    epochs = [[row for k in range(e * 5, e * 5 + 5) for row in trainer.order.batch(k)] for e in range(3)]
    assert all(sorted(rows) == list(range(40)) for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_learning_rate_moves_with_the_steps(tiny_world, runtime, tmp_path):
    """PITFALL 27: warm-up, then cosine, and the optimizer really gets it."""
    trainer = make("sft", tiny_world, runtime, tmp_path, steps=10, warmup=0.2, final_rate=0.0)
    trainer.train()
    rates = [row["learning_rate"] for row in read_metrics(tmp_path) if "learning_rate" in row]
    assert rates[0] == pytest.approx(5e-3) and max(rates) == pytest.approx(1e-2) and rates[-1] < 1e-3
    assert trainer.engines["model"].optimizer.param_groups[0]["lr"] == rates[-1]


def test_rollouts_draw_new_noise_in_every_iteration(tiny_world, runtime, tmp_path):
    """PITFALL 4: the same prompts, asked twice, get different answers."""
    trainer = make("ppo", tiny_world, runtime, tmp_path, temperature=1.0)
    first, again = (trainer.rollouts.next(0)[0].samples for _ in range(2))
    trainer.order.start = (1, 0)  # iteration 1 begins with the data's first rows too
    second = trainer.rollouts.next(1)[0].samples
    assert [s.tokens for s in first] == [s.tokens for s in again]
    assert [s.row for s in first] == [s.row for s in second]
    assert [s.tokens for s in first] != [s.tokens for s in second]


def test_forward_passes_that_are_not_needed_are_left_out(tiny_world, runtime, tmp_path):
    """In fp32 the policy's log-probs are those at sampling, but for one micro-batch an iteration, which is checked; a
    micro-batch is as wide as its longest row; without a KL there is no reference."""
    options = dict(temperature=1.0, micro_batch_size=2, min_new_tokens=1, max_new_tokens=9)
    trainer = make("ppo", tiny_world, runtime, tmp_path, **options, kl_coefficient=0.0)
    assert trainer.reference is None
    calls = {"actor": [], "critic": []}
    for name, shapes in calls.items():
        engine = trainer.engines[name]
        forward = engine.forward_all
        engine.forward_all = lambda inputs, f=forward, s=shapes: (
            s.extend(x["input_ids"].shape for x in inputs) or f(inputs)
        )
    found = iterate(trainer)
    batch, experience = found.batch, found.experience
    assert len(calls["actor"]) == 1 and len(calls["critic"]) == len(batch) // 2
    lengths = sorted(batch.attention_mask.sum(1).tolist(), reverse=True)
    assert [shape[1] for shape in calls["critic"]] == lengths[::2] and len(set(lengths[::2])) > 1
    expected = trainer.actor.module(batch.input_ids, batch.attention_mask).detach()
    mask = batch.response_mask
    torch.testing.assert_close(experience.log_probs[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_rewards_stand_on_the_last_response_token_and_kl_on_all(tiny_world, runtime, tmp_path, monkeypatch):
    """PITFALL 1, 2, 3 and 5: score on the last response token; values and KL of response tokens only; KL >= 0 here."""
    trainer = make("ppo", tiny_world, runtime, tmp_path, temperature=1.0, kl_estimator="k3", whiten_advantages=False)
    trainer.reference.engine.module.model.lm_head.weight.data.mul_(0.5)  # now the reference differs from the policy
    shaped = []
    monkeypatch.setattr(ppo, "shape_rewards", functools.partial(spied, ppo.shape_rewards, shaped))
    found = iterate(trainer)
    [rewards], batch, experience = shaped, found.batch, found.experience
    mask = experience.response_mask
    assert found.metrics["kl"] > 0
    assert (rewards[~mask] == 0).all() and (experience.returns[~mask] == 0).all()
    for row in range(len(mask)):
        last = int(mask[row].nonzero()[-1])
        x = (experience.reference_log_probs - experience.log_probs)[row][mask[row]].double()
        expected = -trainer.kl_coefficient * (x.exp() - 1 - x)
        expected[-1] += batch.scores[row]
        assert torch.allclose(rewards[row][mask[row]].double(), expected, atol=1e-5)
        alone = trainer.engines["critic"].module(batch.input_ids[row : row + 1, : last + 1])[0, :-1]
        assert torch.allclose(experience.values[row, 1 : last + 1], alone, atol=1e-5)


def spied(function, results: list, *arguments):
    results.append(function(*arguments))
    return results[-1]


def test_the_reference_stays_the_first_policy_after_a_resume(tiny_world, runtime, tmp_path):
    """PITFALL 13: the trained actor is not taken for the reference."""
    make("ppo", tiny_world, runtime, tmp_path, steps=3, save_every=3).train()
    resumed = make("ppo", tiny_world, runtime, tmp_path, steps=4, resume="auto")
    first = load_file(Path(tiny_world["policy"]) / "model.safetensors")
    state = resumed.reference.engine.module.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.items())
    actor = resumed.actor.module.model.state_dict()
    assert not all(torch.equal(actor[name], tensor) for name, tensor in first.items())


def test_sampling_and_training_that_disagree_stop_the_run(tiny_world, runtime, tmp_path):
    """PITFALL 32: a planted mismatch is noticed."""
    trainer = make("ppo", tiny_world, runtime, tmp_path, temperature=1.0)

    def spoil(batch):
        trainer.actor.module.model.lm_head.weight.data.mul_(30)
        return batch

    with pytest.raises(UserError, match="log-prob mismatch"):
        iterate(trainer, change=spoil)


def test_options_of_ppo_work_together(tiny_world, runtime, tmp_path):
    changes = dict(
        temperature=0.8, reward_clip=0.5, missing_eos_penalty=0.3, kl_stop=1e-6, dual_clip=3.0, critic_warmup=1
    )
    changes |= dict(ptx_data=[tiny_world["sft"]], ptx_coefficient=0.5, normalize_reward=True, kl_estimator="k2")
    make("ppo", tiny_world, runtime, tmp_path, **changes).train()
    rows = [row for row in read_metrics(tmp_path) if "updates" in row]
    assert "policy_loss" not in rows[0] and "ptx_loss" in rows[-1]
    assert rows[-1]["updates"] == 2  # kl_stop ended the iteration after its first pass


@pytest.mark.parametrize(("algorithm", "variant"), [*((name, "lora") for name in ALGORITHMS), ("ppo", "dora")])
def test_lora_trains_adapters_resumes_and_merges(algorithm, variant, tiny_world, runtime, tmp_path):
    """PITFALL 21: the value head trains beside the adapters and is saved."""
    changes = dict(model=tiny_world["policy"], model_config=None, lora_rank=2, lora_variant=variant)
    changes |= dict(steps=4, save_every=2)
    make(algorithm, tiny_world, runtime, tmp_path / "whole", **changes).train()
    resume = str(tmp_path / "whole" / "checkpoints" / "step-00000002")
    make(algorithm, tiny_world, runtime, tmp_path / "resumed", **changes | dict(resume=resume)).train()
    expected, found = weights(tmp_path / "whole" / "model"), weights(tmp_path / "resumed" / "model")
    assert not any("lora" in name for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if algorithm == "reward":
        heads = [load_file(p)["weight"] for p in sorted((tmp_path / "whole").rglob("value_head.safetensors"))]
        assert len(heads) == 3 and not torch.equal(heads[0], heads[1])


# --- bad input: one clear error each, nothing half-written


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ("sft", dict(train_data=["missing.jsonl"]), "missing.jsonl"),
        ("sft", dict(plugin="zero9"), "plugin is 'zero9'; it takes one of ddp"),
        ("sft", dict(plugin="gemini", precision="fp32"), "bf16"),
        ("sft", dict(plugin="gemini", lora_rank=4, model="MODEL", model_config=None), "LoRA"),
        ("sft", dict(precision="fp16"), "bf16 or fp32"),
        ("sft", dict(lora_rank=4), "--model"),
        ("sft", dict(tokenizer="nowhere"), "tokenizer"),
        ("sft", dict(model_config="nowhere.json"), "nowhere.json"),
        ("sft", dict(model="nowhere", model_config=None), "nowhere"),
        ("sft", dict(resume="nowhere"), "not a complete checkpoint"),
        ("sft", dict(output_dir="/proc/run"), "/proc/run"),
        ("sft", dict(batch_size=0), "batch_size"),
        ("ppo", dict(batch_size=7), "minibatches"),
        ("ppo", dict(rewards=[]), "no reward"),
        ("ppo", dict(rewards=functions("nowhere.py:f")), "nowhere.py"),
        ("ppo", dict(rewards=[reward_model("nowhere")]), "nowhere"),
        ("ppo", dict(model=None), "--model"),
        ("ppo", dict(ptx_coefficient=1.0), "ptx_data"),
    ],
)
def test_bad_settings_are_refused_in_one_line(algorithm, changes, message, tiny_world, runtime, tmp_path):
    """PITFALL 20 and 34: at the start, with the remedy, and without leaving anything behind."""
    changes = {k: tiny_world["policy"] if v == "MODEL" else v for k, v in changes.items()}
    output = Path(changes.pop("output_dir", tmp_path / "run"))
    with pytest.raises(UserError) as error:
        make(algorithm, tiny_world, runtime, output, **changes).train()
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not output.exists() or not any(output.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n', "2"),
        ('{"question": "a"}\n', "no known fields"),
        ("", "No usable rows"),
    ],
)
def test_bad_data_is_refused_with_its_line(text, message, tiny_world, runtime, tmp_path):
    """PITFALL 20."""
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        make("sft", tiny_world, runtime, tmp_path / "run", train_data=[str(tmp_path / "rows.jsonl")])
    assert message in str(error.value) and "rows.jsonl" in str(error.value)


def test_a_reward_that_gives_nan_is_named_with_the_answer(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="reward 'broken' gave nan"):
        make("ppo", tiny_world, runtime, tmp_path, rewards=functions(tiny_world["rewards"] + ":broken")).train()
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_run_is_not_overwritten_by_accident(tiny_world, runtime, tmp_path):
    make("sft", tiny_world, runtime, tmp_path, steps=1).train()
    with pytest.raises(UserError, match="--resume auto"):
        make("sft", tiny_world, runtime, tmp_path, steps=1)


def test_an_incomplete_checkpoint_is_not_resumed(tiny_world, runtime, tmp_path):
    """PITFALL 26."""
    make("sft", tiny_world, runtime, tmp_path, steps=4, save_every=2, keep_checkpoints=9).train()
    newest = tmp_path / "checkpoints" / "step-00000004"
    weights_file = next((newest / "model" / "model").glob("*.safetensors"))
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        make("sft", tiny_world, runtime, tmp_path, resume=str(newest))
    assert make("sft", tiny_world, runtime, tmp_path, resume="auto").steps_done == 2


def test_a_checkpoint_of_another_algorithm_is_refused(tiny_world, runtime, tmp_path):
    make("sft", tiny_world, runtime, tmp_path / "sft", steps=1).train()
    resume = str(tmp_path / "sft" / "checkpoints" / "step-00000001")
    with pytest.raises(UserError, match="checkpoint of sft"):
        make("reward", tiny_world, runtime, tmp_path / "rm", resume=resume)


def test_a_diverging_run_stops_with_its_step(tiny_world, runtime, tmp_path):
    trainer = make("sft", tiny_world, runtime, tmp_path, max_skipped_steps=1)
    trainer.engines["model"].module.model.lm_head.weight.data.fill_(float("nan"))
    trainer.eval_data = None
    with pytest.raises(UserError, match="step 1: loss is nan"):
        trainer.train()


def test_memory_does_not_grow_with_the_iterations(tiny_world, runtime, tmp_path):
    """PITFALL 37: nothing of an iteration's experience is kept."""
    import gc

    from coati.rollout import Experience

    trainer = make("ppo", tiny_world, runtime, tmp_path)
    for step in range(3):
        trainer.step(step)
    gc.collect()
    assert not [x for x in gc.get_objects() if isinstance(x, Experience)]


def test_rewards_in_a_file_of_rows_are_handed_their_columns(tiny_world, runtime, tmp_path):
    rows = [{"prompt": f"ask {i}", "answer_length": i} for i in range(8)]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "seen.py").write_text(
        "def seen(prompts, responses, answer_length, **columns):\n    return [float(n) for n in answer_length]\n"
    )
    changes = dict(train_data=[path], eval_data=[], rewards=functions(f"{tmp_path}/seen.py:seen"))
    trainer = make("ppo", tiny_world, runtime, tmp_path / "run", **changes)
    metrics = trainer.step(0)
    assert metrics["reward"] == pytest.approx(3.5)


def test_examples_are_thin():
    for path in (ROOT / "examples").glob("train_*.py"):
        assert len(path.read_text().splitlines()) < 80


def test_a_run_without_a_kl_penalty_has_no_reference(tiny_world, runtime, tmp_path):
    """PITFALL 29: nothing is made of, or asked of, a reference that isn't there."""
    trainer = make("ppo", tiny_world, runtime, tmp_path, kl_coefficient=0.0, steps=2)
    assert trainer.reference is None
    trainer.train()
    assert all(row["kl"] == 0 for row in read_metrics(tmp_path) if "kl" in row)


@pytest.mark.parametrize(("algorithm", "plugin"), [("sft", "ddp"), ("sft", "zero2"), ("ppo", "ddp")])
def test_the_optimizers_means_decay_as_asked(algorithm, plugin, tiny_world, runtime, tmp_path):
    """After one step they are (1 - beta1) g and (1 - beta2) g^2, for the critic as well."""
    beta1, beta2 = 0.8, 0.95
    sizes = dict(steps=1, eval_data=[]) | (dict(ppo_epochs=1, minibatches=1) if algorithm == "ppo" else {})
    changes = dict(plugin=plugin, adam_beta1=beta1, adam_beta2=beta2)
    trainer = make(algorithm, tiny_world, runtime, tmp_path, **sizes, **changes)
    trainer.train()
    optimizers = [engine.optimizer.optim for engine in trainer.engines.values() if engine.optimizer is not None]
    assert len(optimizers) == (2 if algorithm == "ppo" else 1)
    for optimizer in optimizers:
        for state in optimizer.state.values():
            mean, squares = state["exp_avg"].double(), state["exp_avg_sq"].double()
            expected = mean.square() * (1 - beta2) / (1 - beta1) ** 2
            torch.testing.assert_close(squares, expected, rtol=1e-4, atol=1e-20)
