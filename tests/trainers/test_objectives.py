"""Reward models of several objectives: runs, what they measure, and what is refused."""

import math
import random
from statistics import correlation

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.config import configure
from coati.errors import UserError
from coati.models import ObjectiveRewardModel
from coati.models.objectives import stored_objectives
from coati.tracking import read_metrics, read_samples
from coati.trainers.config import RewardConfig
from coati.trainers.objectives import objective_metrics, objective_sums
from tests.conftest import WORDS, sentence, settings_for, write_rows
from tests.trainers.test_training import make

NAMES = ["verbosity", "helpfulness"]


def planted(seed: int) -> dict:
    """A response of 1 to 12 words whose scores are 2 and more: its length, and its share of one word."""
    draw = random.Random(seed)
    words = ["thank" if draw.random() < seed % 5 / 5 else draw.choice(WORDS) for _ in range(1 + seed % 12)]
    scores = {"length": 2 + len(words) / 4, "thanks": 2 + 2 * words.count("thank") / len(words)}
    if seed % 3 == 0:
        del scores[("length", "thanks")[seed % 2]]
    return {"prompt": sentence(seed, 2), "response": " ".join(words), "scores": scores}


def test_a_model_from_random_weights_learns_planted_objectives(tiny_world, runtime, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [planted(i) for i in range(600)])
    held_out = write_rows(tmp_path / "held_out.jsonl", [planted(i) for i in range(600, 660)])
    changes = dict(objectives=["length", "thanks"], train_data=[train], eval_data=[held_out])
    changes |= dict(steps=150, batch_size=16, micro_batch_size=16, learning_rate=5e-3)
    make("reward", tiny_world, runtime, tmp_path / "run", **changes).train()
    first, *_, last = [row for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    assert last["eval/correlation/length"] > 0.9 and last["eval/correlation/thanks"] > 0.9
    assert last["eval/loss"] < 0.1 < 5 < first["eval/loss"]


def test_a_run_tells_each_objective_and_its_folder_names_them(tiny_world, runtime, tmp_path):
    trainer = make("reward", tiny_world, runtime, tmp_path / "run", objectives=NAMES, steps=2)
    trainer.train()
    folder = tmp_path / "run" / "model"
    row = [row for row in read_metrics(tmp_path / "run") if "eval/loss" in row][-1]
    model = ObjectiveRewardModel(folder).eval()
    assert stored_objectives(folder) == model.objectives == NAMES
    assert "A reward model of several objectives" in (folder / "README.md").read_text()
    batch = trainer.load(trainer.eval_data, range(len(trainer.eval_data)))
    with torch.no_grad():
        predictions = model(batch.input_ids, batch.attention_mask)
    errors = (predictions - batch.scores).square()
    assert row["eval/loss"] == pytest.approx(errors[batch.given].mean().item(), rel=1e-5)
    for k, name in enumerate(NAMES):
        given = batch.given[:, k]
        assert row[f"eval/scores/{name}"] == given.sum() < len(given)
        assert row[f"eval/mse/{name}"] == pytest.approx(errors[given, k].mean().item(), rel=1e-5)
        pairs = [x[given, k].double().tolist() for x in (predictions, batch.scores)]
        assert row[f"eval/correlation/{name}"] == pytest.approx(correlation(*pairs), abs=1e-4)
    shown = read_samples(tmp_path / "run")[-1]
    assert shown["predicted"].startswith("verbosity ") and "helpfulness" in shown["predicted"]
    assert {part.split()[0] for part in shown["scores"].split(", ")} <= {*NAMES}


scores = st.lists(st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=2, max_size=2), min_size=1, max_size=6)


@given(scores, st.data())
def test_metrics_are_those_of_a_loop(rows, data):
    """Whatever is missing; added up over two parts of the rows."""
    said = [[data.draw(st.floats(-9, 9)) for _ in row] for row in rows]
    tensors = torch.tensor(said), torch.tensor([[math.nan if x is None else x for x in row] for row in rows])
    parts = [
        objective_sums(x, y, ~y.isnan(), NAMES) for x, y in zip(*(t.tensor_split(2) for t in tensors), strict=True)
    ]
    found = objective_metrics({name: sum(float(part[name]) for part in parts) for name in parts[0]}, NAMES)
    errors = []
    for k, name in enumerate(NAMES):
        pairs = [(float(x), float(y)) for x, y in zip(*(t[:, k] for t in tensors), strict=True) if not math.isnan(y)]
        squared = [(x - y) ** 2 for x, y in pairs]
        errors += squared
        assert (f"mse/{name}" in found) == bool(pairs)
        if pairs:
            assert found[f"mse/{name}"] == pytest.approx(sum(squared) / len(pairs), abs=1e-9)
            assert found[f"scores/{name}"] == len(pairs)
        if f"correlation/{name}" in found:
            assert found[f"correlation/{name}"] == pytest.approx(correlation(*zip(*pairs, strict=True)), abs=1e-3)
    assert found["loss"] == pytest.approx(sum(errors) / len(errors), abs=1e-9) if errors else math.isnan(found["loss"])


def test_what_does_not_vary_has_no_correlation():
    y = torch.tensor([[1.0, 2.0], [3.0, 2.0], [4.0, torch.nan]])
    sums = objective_sums(2 * y.nan_to_num(), y, ~y.isnan(), NAMES)
    found = objective_metrics({name: float(total) for name, total in sums.items()}, NAMES)
    assert found["correlation/verbosity"] == pytest.approx(1) and "correlation/helpfulness" not in found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(use_margin=True, tie_theta=3.0), "use_margin, tie_theta are for pairs.*leave them out"),
        (dict(label_smoothing=0.1), "label_smoothing are for pairs"),
        (dict(centering=0.1), "centering are for pairs"),
        (dict(objectives=["a", "b", "a"]), "objectives has a twice"),
    ],
)
def test_settings_of_pairs_are_refused(changes, says, tiny_world):
    settings = settings_for("reward", tiny_world, objectives=NAMES)
    with pytest.raises(UserError, match=says):
        configure(RewardConfig, **settings | changes)


def test_a_row_whose_score_is_no_number_is_named(tiny_world, runtime, tmp_path):
    good = {"prompt": "red", "response": "lamp", "verbosity": 1}
    data = write_rows(tmp_path / "mine.jsonl", [good, good | {"verbosity": "high"}])
    with pytest.raises(UserError, match=r"mine\.jsonl line 2: the score `verbosity` is no finite number"):
        make("reward", tiny_world, runtime, tmp_path / "run", objectives=NAMES, train_data=[data])


@pytest.mark.parametrize("bad", ["train_data", "eval_data"])
def test_an_objective_that_no_row_has_is_named(bad, tiny_world, runtime, tmp_path):
    data = write_rows(tmp_path / "mine.jsonl", [{"prompt": "red", "response": "lamp", "scores": {"verbosity": 1}}])
    with pytest.raises(UserError, match=r"No row of .*mine\.jsonl has a score of 'helpfulness'"):
        make("reward", tiny_world, runtime, tmp_path / "run", **{"objectives": NAMES, bad: [data]})


def test_a_run_goes_on_with_its_own_objectives(tiny_world, runtime, tmp_path):
    changes = dict(objectives=NAMES, eval_data=[])
    make("reward", tiny_world, runtime, tmp_path / "run", steps=1, **changes).train()
    with pytest.raises(UserError, match=r"weights of another make: algorithm.objectives verbosity, helpfulness in the"):
        make("reward", tiny_world, runtime, tmp_path / "run", resume="auto", **changes | dict(objectives=NAMES[:1]))
    start = dict(model=str(tmp_path / "run" / "model"), model_config=None, eval_data=[])
    with pytest.raises(UserError, match="has the objectives verbosity, helpfulness, not helpfulness, verbosity"):
        make("reward", tiny_world, runtime, tmp_path / "again", objectives=NAMES[::-1], **start)
    with pytest.raises(UserError, match="has the objectives verbosity, helpfulness, and one score is wanted"):
        make("reward", tiny_world, runtime, tmp_path / "pairs", **start)
