"""Prompts that are read once for both responses of a pair."""

import json
from pathlib import Path

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import settings_for, trainer_classes
from tests.trainers.test_training import make


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("preference", {}),
        ("preference", dict(lora_rank=2)),
        ("preference", dict(algorithm="orpo")),
        ("preference", dict(cache_reference=True)),
        ("reward", dict(steps=2, use_margin=True)),
        ("reward", dict(steps=2, lora_rank=2, model="policy", model_config=None)),
        ("reward", dict(steps=2, max_tokens_per_batch=256)),
    ],
)
def test_a_prompt_that_is_read_once_for_both_answers_changes_nothing(algorithm, changes, tiny_world, runtime, tmp_path):
    if "model" in changes:
        changes = changes | dict(model=tiny_world[changes["model"]])
    runs = {}
    for share in (False, True):
        output, cache = tmp_path / str(share), str(tmp_path / f"cache-{share}")
        how = dict(share_prompts=share, cache_dir=cache, micro_batch_size=4) | changes
        make(algorithm, tiny_world, runtime, output, **how).train()
        runs[share] = [
            {k: v for k, v in row.items() if "time" not in k and "second" not in k} for row in read_metrics(output)
        ]
    for shared, separate in zip(runs[True], runs[False], strict=True):
        for prefix in ("", "eval/"):
            if abs(separate.get(f"{prefix}margin", 1)) < 1e-6:  # rounding says which answer is the better one
                del shared[f"{prefix}accuracy"], separate[f"{prefix}accuracy"]
        assert shared == pytest.approx(separate, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("algorithm", "changes"), [("preference", dict(algorithm="orpo")), ("reward", {})])
def test_models_that_take_no_mask_or_position_read_each_row_alone(algorithm, changes, tiny_world, runtime, tmp_path):
    config = json.loads(Path(tiny_world["model_config"]).read_text())
    bloom = dict(model_type="bloom", architectures=["BloomForCausalLM"], hidden_size=32, n_layer=1, n_head=2)
    windowed = config | dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4)
    for name, settings in (("bloom", bloom | dict(vocab_size=config["vocab_size"])), ("mistral", windowed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        how = dict(model=None, model_config=str(tmp_path / name / "config.json"), share_prompts=True)
        how |= dict(attn_implementation="eager") | changes
        with pytest.raises(UserError, match="can't read a prompt once for all: leave share_prompts out"):
            make(algorithm, tiny_world, runtime, tmp_path / f"{name}-run", **how)


@pytest.mark.parametrize("algorithm", ["preference", "reward"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(padding_free=True), "leave out padding_free"),
        (dict(tensor_parallel=2, plugin="zero1"), "leave it out with tensor, pipeline or sequence parallelism"),
    ],
)
def test_what_lays_rows_out_in_its_own_way_is_refused(algorithm, changes, says, tiny_world):
    settings = settings_for(algorithm, tiny_world, share_prompts=True)
    with pytest.raises(UserError, match=says):
        configure(trainer_classes(algorithm)[0], **settings | changes).check(2)
