"""A run says what it is about to do where that may take minutes."""

import pytest

from coati.config import configure
from tests.conftest import settings_for, trainer_classes


def said(algorithm, world, runtime, output, capsys, **changes) -> list[str]:
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), **{"steps": 1, **changes})
    capsys.readouterr()
    trainer_class(configure(config_class, **settings), runtime).train()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("algorithm", ["sft", "reward", "grpo"])
def test_the_evaluation_before_the_first_step_is_announced(algorithm, tiny_world, runtime, tmp_path, capsys):
    lines = said(algorithm, tiny_world, runtime, tmp_path, capsys)
    [place] = [i for i, line in enumerate(lines) if line.endswith("evaluating before the first step ...")]
    [result] = [i for i, line in enumerate(lines) if " step 0: " in line]
    assert place < result


def test_nothing_is_announced_where_nothing_is_evaluated(tiny_world, runtime, tmp_path, capsys):
    lines = said("sft", tiny_world, runtime, tmp_path, capsys, eval_data=[])
    assert lines and not any("evaluating" in line for line in lines)


def test_the_reference_s_pass_over_the_data_is_announced_unless_its_results_are_there(
    tiny_world, runtime, tmp_path, capsys
):
    changes = dict(cache_reference=True, cache_dir=str(tmp_path / "cache"))
    first = said("preference", tiny_world, runtime, tmp_path / "a", capsys, **changes)
    announced = [i for i, line in enumerate(first) if line.startswith("computing the reference's log-probs of ")]
    done = [i for i, line in enumerate(first) if line.startswith("reference log-probs of ")]
    assert len(announced) == len(done) == 2 and all(i < j for i, j in zip(announced, done, strict=True))
    again = said("preference", tiny_world, runtime, tmp_path / "b", capsys, **changes)
    assert not any(line.startswith("computing") for line in again)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("emulates", [True, False])
def test_a_cpu_that_emulates_bf16_is_named_with_what_is_faster(
    precision, emulates, tiny_world, runtime, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("coati.trainers.loop.cpu_emulates_bf16", lambda: emulates)
    lines = said("sft", tiny_world, runtime, tmp_path, capsys, precision=precision)
    assert any("--precision fp32" in line for line in lines) == (precision == "bf16" and emulates)
