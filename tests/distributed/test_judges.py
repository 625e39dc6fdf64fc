"""A judge of a run's own that two processes share: its verdicts are those of the judge that one process has whole."""

import pytest

from coati.errors import UserError
from tests.conftest import settings_for, trainer_classes
from tests.distributed import worker
from tests.distributed.forks import run_jobs
from tests.distributed.world import LAYOUTS
from tests.rewards.test_local_judge import RESPONSES, make_judge

pytestmark = pytest.mark.distributed
QUICK = ("tp2",)
SLOW = ("zero2", "tp2, split_sequence", "pp2", "sp2", "gemini, bf16")
BATCH = 2  # questions of a forward pass


def judged(job: dict, runtime) -> dict:
    """Rewards of both ranks' samples by the run's judge, and by one that is whole here; or why there is no such run.

    Ranks of different data have different numbers of questions, and so of forward passes."""
    from coati.config import configure
    from tests.rewards.samples import samples

    config_class, trainer_class = trainer_classes("grpo")
    try:
        trainer = trainer_class(configure(config_class, **job["settings"]), runtime)
    except UserError as error:
        return {"error": str(error)}
    responses = RESPONSES[: len(RESPONSES) - 3 * trainer.ranks.rank]
    mine = samples(["which?"] * len(responses), responses)
    trainer.generation.scorer.score(mine)
    expected = whole_judge(job["settings"], trainer.ranks).answer(
        [question for sample in mine for question in reward_of(trainer).questions(sample)]
    )
    found = [(sample.rewards["judge"], sample.details["judge/choice_mass"]) for sample in mine]
    return {
        "found": trainer.ranks.gather(found),
        "expected": trainer.ranks.gather([((verdict.value - 1) / 8, verdict.mass) for verdict in expected]),
    }


def reward_of(trainer):
    [(reward, _)] = trainer.generation.scorer.rewards.values()
    return reward


def whole_judge(settings: dict, ranks):
    """The judge in one process; for gemini in bf16, with the same forward passes, since rounding depends on them."""
    import torch

    from coati.judges.local import LocalJudge, SharedModel, load_judge
    from coati.models.opened import open_model
    from coati.run_layout import model_folder

    [entry] = settings["rewards"]
    if settings.get("precision") != "bf16":
        return load_judge(entry["path"], "cpu", BATCH)
    opened = open_model(model_folder(entry["path"], "judge"), torch.bfloat16, "cpu")
    read = SharedModel(lambda batches: [opened.actor(**one) for one in batches], ranks, torch.device("cpu"))
    return LocalJudge(entry["path"], opened, read, "cpu", BATCH)


def work(jobs: str, file: str):
    worker.work(jobs, file, judged)


def job(layout: str, judge: str, world, folder, name: str = "") -> dict:
    name = name or layout
    rewards = [dict(type="judge", path=judge, batch_size=BATCH)]
    settings = settings_for("grpo", world, output_dir=str(folder / name), rewards=rewards, **LAYOUTS[layout])
    return {"name": name, "settings": settings}


def assert_judged_alike(result: dict):
    found = [pair for of_rank in result["found"] for pair in of_rank]
    expected = [pair for of_rank in result["expected"] for pair in of_rank]
    assert len({round(score, 4) for score, _ in expected}) > 3
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_judge_that_two_processes_share_gives_the_verdicts_of_a_whole_one(tiny_world, tmp_path):
    """And one that can't be split is refused with the way out."""
    judge, odd = (make_judge(tmp_path / name, heads=heads) for name, heads in (("judge", 4), ("odd", 1)))
    jobs = [job(layout, judge, tiny_world, tmp_path) for layout in QUICK]
    found = run_jobs([*jobs, job("tp2", odd, tiny_world, tmp_path, "odd")], tmp_path, 2, work)
    for layout in QUICK:
        assert_judged_alike(found[layout])
    for words in (f"the judge in {odd}", "1 attention heads", "tensor_parallel 2", "or put it behind an endpoint"):
        assert words in found["odd"]["error"]


@pytest.mark.slow
def test_so_does_one_of_any_layout(tiny_world, tmp_path):
    """Of sequence and pipeline parallelism, of ZeRO and Gemini, where ranks have unlike numbers of questions."""
    judge = make_judge(tmp_path / "judge")
    found = run_jobs([job(layout, judge, tiny_world, tmp_path) for layout in SLOW], tmp_path, 2, work)
    for layout in SLOW:
        assert_judged_alike(found[layout])
