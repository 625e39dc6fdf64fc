"""A run that goes on under other settings says what has changed, and goes on with the data where it stopped."""

import json
from pathlib import Path

import pytest

from coati.config import configure
from coati.data import BatchSampler
from coati.errors import UserError
from coati.files import write_json
from tests.conftest import functions, settings_for, trainer_classes

STEPS = 2  # before the checkpoint


def make(algorithm: str, world, runtime, output: Path, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    return trainer_class(
        configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes)), runtime
    )


@pytest.fixture(scope="module")
def checkpoint(tiny_world, runtime, tmp_path_factory):
    """The checkpoint of a run of `STEPS` steps, made once for the same settings."""
    root, made = tmp_path_factory.mktemp("first"), {}

    def checkpoint(algorithm: str, **changes) -> Path:
        name = f"{algorithm} {json.dumps(changes)}"
        if name not in made:
            changes = {"steps": STEPS, "eval_data": [], **changes}
            made[name] = root / str(len(made))
            make(algorithm, tiny_world, runtime, made[name], **changes).train()
        return made[name] / "checkpoints" / f"step-{STEPS:08d}"

    return checkpoint


def rows_of(trainer, steps) -> list[int]:
    return [row for step in steps for row in trainer.order.batch(step)]


@pytest.mark.parametrize("algorithm", ["sft", "reward", "preference", "ppo", "grpo", "distill"])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_batches_of_another_size_go_on_where_the_data_stopped(
    algorithm, batch_size, checkpoint, tiny_world, runtime, tmp_path, capsys
):
    """REPORT 20: every row of an epoch of 40 is seen once, and the run ends with the epochs that were asked for."""
    length = dict(steps=0, epochs=1.0, eval_data=[])
    changes = dict(resume=str(checkpoint(algorithm)), batch_size=batch_size, **length)
    resumed = make(algorithm, tiny_world, runtime, tmp_path / "run", **changes)
    assert "batch_size 8 in the checkpoint" in capsys.readouterr().out
    first = BatchSampler(40, 8, resumed.config.seed)
    seen = [row for step in range(STEPS) for row in first.batch(step)]
    seen += rows_of(resumed, range(STEPS, resumed.total_steps))
    assert sorted(seen[:40]) == list(range(40)) and 40 <= len(seen) < 40 + batch_size
    assert resumed.order.epoch(resumed.total_steps) == len(seen) / 40


def test_so_do_batches_of_a_third_size_and_those_of_the_first_again(checkpoint, tiny_world, runtime, tmp_path):
    """REPORT 20: rows are counted, whatever sizes the batches had."""
    place = checkpoint("sft")
    for batch_size in (4, 2, 8):
        step = int(place.name.removeprefix("step-")) + 1
        changes = dict(batch_size=batch_size, micro_batch_size=2, steps=step, eval_data=[], resume=str(place))
        trainer = make("sft", tiny_world, runtime, tmp_path / str(batch_size), **changes)
        trainer.train()
        place = tmp_path / str(batch_size) / "checkpoints" / f"step-{step:08d}"
    assert json.loads((place / "trainer.json").read_text())["rows"] == 16 + 4 + 2 + 8
    whole = BatchSampler(40, 30, trainer.config.seed).batch(0)
    assert rows_of(trainer, [STEPS + 2]) == whole[22:]


def prompts_drawn(trainer) -> list[int]:
    """The rows that the next iteration of GRPO draws."""
    prompts = trainer.rollouts.prompts_of(trainer.steps_done)
    return [prompt.row for prompt in prompts[:: trainer.config.algorithm.group_size]]


def test_prompts_that_dynamic_sampling_has_drawn_are_not_drawn_again_without_it(
    checkpoint, tiny_world, runtime, tmp_path
):
    """REPORT 20: it draws more than a batch in an iteration."""
    place = checkpoint("grpo", dynamic_sampling=True, group_size=2, rewards=functions(f"{tiny_world['rewards']}:odd"))
    stored = json.loads((place / "trainer.json").read_text())
    drawn = stored["state"]["position"]
    assert drawn > stored["rows"] == STEPS * 8
    resumed = make(
        "grpo", tiny_world, runtime, tmp_path / "run", resume=str(place), batch_size=4, minibatches=1, eval_data=[]
    )
    stream = BatchSampler(40, 1, resumed.config.seed)
    assert prompts_drawn(resumed) == [stream.batch(k)[0] for k in range(drawn, drawn + 4)]


def test_text_that_ppo_mixes_in_goes_on_too(checkpoint, tiny_world, runtime, tmp_path):
    """REPORT 20: it has batches of its own, of as many rows as a minibatch."""
    mixed = dict(ptx_data=[tiny_world["sft"]], ptx_coefficient=0.5)
    place = checkpoint("ppo", **mixed)
    changes = dict(resume=str(place), minibatches=4, eval_data=[], **mixed)
    resumed = make("ppo", tiny_world, runtime, tmp_path / "run", **changes)
    stream = BatchSampler(40, 1, resumed.config.seed)
    assert resumed.text_order.batch(STEPS) == [stream.batch(k)[0] for k in (8, 9)]  # of 4 rows before, of 2 now


SAID = {
    "seed": (1, "rows come in another order from here on"),
    "optimizer.learning_rate": (1e-3, "the learning rate follows the new schedule"),
    "steps": (3, "the learning rate follows the new schedule"),
    "parallel.plugin": ("zero2", "weights and optimizer states are carried over"),
    "optimizer.weight_decay": (0.1, "from here on"),
    "optimizer.adam_beta2": (0.95, "from here on"),
    "parallel.max_grad_norm": (0.5, "from here on"),
}


@pytest.mark.parametrize("name", [*SAID])
def test_each_setting_that_changed_is_one_line(name, checkpoint, tiny_world, runtime, tmp_path, capsys):
    """REPORT 20: what it was, what it is, and what that means; what has not changed is not said."""
    value, meaning = SAID[name]
    place = checkpoint("sft")
    changes = dict(steps=STEPS, eval_data=[], resume=str(place)) | {name: value}
    trainer = make("sft", tiny_world, runtime, tmp_path / "run", **changes)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed")]
    before = json.loads((place / "trainer.json").read_text())["settings"][name]
    assert line.startswith(f"resumed: {name} {before} in the checkpoint, {value} now: {meaning}")
    trainer.train()


def test_what_a_run_writes_and_how_often_is_not_worth_a_line(checkpoint, tiny_world, runtime, tmp_path, capsys):
    changes = dict(save_every=1, log_every=2, progress="plain", run_name="again", samples=1)
    resumed = dict(steps=STEPS, eval_data=[], resume=str(checkpoint("sft")))
    make("sft", tiny_world, runtime, tmp_path / "run", **resumed, **changes)
    assert "resumed" not in capsys.readouterr().out


@pytest.mark.parametrize("change", ["another file", "another row in the file", "another length limit"])
def test_other_training_data_is_said(change, checkpoint, tiny_world, runtime, tmp_path, capsys):
    """REPORT 20: also where no setting has changed, but what is in the file."""
    rows = Path(tiny_world["sft"]).read_text().splitlines(keepends=True)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(rows))
    settings = dict(train_data=[str(file)], eval_data=[], steps=STEPS)
    make("sft", tiny_world, runtime, tmp_path / "first", **settings).train()
    settings["resume"] = str(tmp_path / "first" / "checkpoints" / f"step-{STEPS:08d}")
    capsys.readouterr()
    make("sft", tiny_world, runtime, tmp_path / "same", **settings)
    assert "resumed" not in capsys.readouterr().out
    if change == "another file":
        settings["train_data"] = [tiny_world["sft_eval"]]
    elif change == "another row in the file":
        file.write_text("".join([*rows[1:], rows[1]]))
    else:
        settings["max_length"] = 90
    make("sft", tiny_world, runtime, tmp_path / "other", **settings).train()
    said = capsys.readouterr().out
    assert "the training data is not the checkpoint's" in said
    assert ("train_data" in said) == (change == "another file")


LORA = dict(lora_rank=2, lora_target_modules=["q_proj"])
OTHER_MODELS = [
    ("sft", {}, LORA, "lora_rank 0 in the checkpoint, 2 now"),
    ("reward", {}, LORA, "lora_rank 0 in the checkpoint, 2 now"),
    ("sft", LORA, dict(lora_rank=0), "lora_rank 2 in the checkpoint, 0 now"),
    ("sft", LORA, dict(lora_rank=4), "lora_rank 2 in the checkpoint, 4 now"),
    ("sft", LORA, dict(lora_alpha=32.0), "lora_alpha 16.0 in the checkpoint, 32.0 now"),
    ("sft", LORA, dict(lora_dropout=0.1), "lora_dropout 0.0 in the checkpoint, 0.1 now"),
    ("sft", LORA, dict(lora_variant="dora"), "lora_variant lora in the checkpoint, dora now"),
    ("sft", LORA, dict(lora_target_modules=["v_proj"]), "lora_target_modules q_proj in the checkpoint, v_proj now"),
    ("ppo", {}, dict(shared_trunk=True), "shared_trunk False in the checkpoint, True now"),
    ("ppo", dict(shared_trunk=True), dict(shared_trunk=False), "shared_trunk True in the checkpoint, False now"),
]


@pytest.mark.parametrize(("algorithm", "before", "now", "message"), OTHER_MODELS)
def test_what_cannot_go_on_is_one_line(algorithm, before, now, message, checkpoint, tiny_world, runtime, tmp_path):
    """REPORT 20: before any model is loaded, with the checkpoint and the remedy."""
    start = dict(model=tiny_world["policy"], model_config=None, eval_data=[])
    place = checkpoint(algorithm, **start, **before)
    with pytest.raises(UserError) as error:
        make(algorithm, tiny_world, runtime, tmp_path / "run", **start | before | now, resume=str(place))
    text = str(error.value)
    assert message in text and str(place) in text and "--resume never" in text and "\n" not in text
    assert not any((tmp_path / "run").iterdir())


def test_another_coefficient_is_not_overruled_by_the_checkpoint(checkpoint, tiny_world, runtime, tmp_path):
    """REPORT 20: the checkpoint's goes on where it adapts itself only."""
    place = str(checkpoint("ppo"))
    changes = dict(resume=place, kl_coefficient=0.5, eval_data=[])
    assert make("ppo", tiny_world, runtime, tmp_path / "fixed", **changes).kl_coefficient == 0.5
    adaptive = make("ppo", tiny_world, runtime, tmp_path / "adaptive", kl_target=1.0, **changes)
    assert adaptive.kl_coefficient == adaptive.folder.stored["state"]["kl_coefficient"] != 0.5


def test_a_reference_that_was_not_kept_is_that_of_the_start(checkpoint, tiny_world, runtime, tmp_path):
    """REPORT 20: --refresh_reference given to a run that had none."""
    changes = dict(resume=str(checkpoint("grpo")), kl_coefficient=0.1, refresh_reference=1, steps=STEPS + 1)
    make("grpo", tiny_world, runtime, tmp_path / "run", eval_data=[], **changes).train()
    place = tmp_path / "run" / "checkpoints" / f"step-{STEPS + 1:08d}"
    assert (place / "reference" / "model").is_dir()


def test_a_checkpoint_without_settings_goes_on_as_before(checkpoint, tiny_world, runtime, tmp_path):
    """Those of earlier versions hold neither settings nor a count of rows."""
    changes = dict(steps=STEPS + 1, eval_data=[])
    whole = make("sft", tiny_world, runtime, tmp_path / "whole", resume=str(checkpoint("sft")), **changes)
    place = make_old(checkpoint("sft", max_grad_norm=1.0))
    resumed = make("sft", tiny_world, runtime, tmp_path / "run", resume=str(place), **changes)
    assert rows_of(whole, [STEPS]) == rows_of(resumed, [STEPS])
    resumed.train()


def make_old(place: Path) -> Path:
    stored = json.loads((place / "trainer.json").read_text())
    for name in ("settings", "rows", "data"):
        del stored[name]
    write_json(place / "trainer.json", stored)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"]["trainer.json"] = (place / "trainer.json").stat().st_size
    write_json(place / "manifest.json", manifest)
    return place
