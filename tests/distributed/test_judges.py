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
ADAPTED = ("tp2", "pp2", "gemini, bf16")
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
        "held": held_by(reward_of(trainer).judge.read),
        "found": trainer.ranks.gather(found),
        "expected": trainer.ranks.gather([((verdict.value - 1) / 8, verdict.mass) for verdict in expected]),
    }


def reward_of(trainer):
    [(reward, _)] = trainer.generation.scorer.rewards.values()
    return reward


def held_by(read) -> float:
    """The share of a model's weights that this process has."""
    from coati.judges.local import WholeModel

    if isinstance(read, WholeModel):
        return 1.0
    engine = read.forward_all.__self__
    return sum(p.numel() for p in engine.module.parameters()) / sum(p.numel() for p in engine.whole.parameters())


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
    for parameter in opened.actor.parameters():
        parameter.data = parameter.data.bfloat16()  # an adapter's were in float32; rotary buffers stay so
    read = SharedModel(lambda batches: [opened.actor(**one) for one in batches], ranks, torch.device("cpu"))
    return LocalJudge(entry["path"], opened, read, "cpu", BATCH)


def make_adapter(judge: str, folder) -> str:
    """The folder of a LoRA adapter on it that says something."""
    import torch

    from coati.models import Actor, LoraSettings

    actor = Actor(judge, lora=LoraSettings(rank=2, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    for name, parameter in actor.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    actor.save_pretrained(folder)
    return str(folder)


def work(jobs: str, file: str):
    worker.work(jobs, file, judged)


def job(layout: str, judge: str, world, folder, name: str = "") -> dict:
    name = name or layout
    rewards = [dict(type="judge", path=judge, batch_size=BATCH)]
    settings = settings_for("grpo", world, output_dir=str(folder / name), rewards=rewards, **LAYOUTS[layout])
    return {"name": name, "settings": settings}


def assert_judged_alike(result: dict, name: str):
    found = [pair for of_rank in result["found"] for pair in of_rank]
    expected = [pair for of_rank in result["expected"] for pair in of_rank]
    assert len({round(score, 4) for score, _ in expected}) > 3
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5), name


def test_a_judge_that_two_processes_share_gives_the_verdicts_of_a_whole_one(tiny_world, tmp_path):
    """And one that can't be split is refused with the way out."""
    judge, odd = (make_judge(tmp_path / name, heads=heads) for name, heads in (("judge", 4), ("odd", 1)))
    jobs = [job(layout, judge, tiny_world, tmp_path) for layout in QUICK]
    found = run_jobs([*jobs, job("tp2", odd, tiny_world, tmp_path, "odd")], tmp_path, 2, work)
    for layout in QUICK:
        assert_judged_alike(found[layout], layout)
        assert found[layout]["held"] < 0.6
    for words in (f"the judge in {odd}", "1 attention heads", "tensor_parallel 2", "or put it behind an endpoint"):
        assert words in found["odd"]["error"]


@pytest.mark.slow
def test_so_does_one_of_any_layout(tiny_world, tmp_path):
    """Of sequence and pipeline parallelism, of ZeRO and Gemini, where ranks have unlike numbers of questions; and one
    that is an adapter."""
    judge = make_judge(tmp_path / "judge")
    adapter = make_adapter(judge, tmp_path / "adapter")
    jobs = [job(layout, judge, tiny_world, tmp_path) for layout in SLOW]
    jobs += [job(layout, adapter, tiny_world, tmp_path, f"adapter, {layout}") for layout in ADAPTED]
    found = run_jobs(jobs, tmp_path, 2, work)
    for one in jobs:
        assert_judged_alike(found[one["name"]], one["name"])
    verdicts = [found[name]["expected"] for name in ("pp2", "adapter, pp2")]
    assert verdicts[0] != verdicts[1]
