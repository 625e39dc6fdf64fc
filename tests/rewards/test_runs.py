"""Rewards of every kind in a PPO run."""

import hashlib
import threading

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from coati.config import configure
from coati.errors import UserError
from coati.models import RewardModel
from coati.tracking import read_metrics
from tests.conftest import functions, reward_model, sentence, settings_for, trainer_classes, write_rows
from tests.rewards.judge_server import serving
from tests.rewards.test_classifier import decoder, gpt2_tokenizer
from tests.rewards.test_http import Server
from tests.rewards.test_local_judge import make_judge

RULES = """
from coati.rewards import Reward

class Tokens(Reward):
    name, on_tokens = "even", True

    def score(self, samples):
        return [[float(token % 2 == 0) + token / 1000 for token in sample.tokens] for sample in samples]

even = Tokens()
"""


def make(tiny_world, runtime, folder, /, **changes):
    config_class, trainer_class = trainer_classes("ppo")
    return trainer_class(
        configure(config_class, **settings_for("ppo", tiny_world, output_dir=str(folder), **changes)), runtime
    )


def test_a_run_mixes_rewards_of_every_kind(tiny_world, runtime, tmp_path):
    """Each is logged and timed under its name, in training and evaluation."""
    decoder().save_pretrained(tmp_path / "scorer")
    gpt2_tokenizer().save_pretrained(tmp_path / "scorer")
    (tmp_path / "rules.py").write_text(RULES)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        listed = functions(tiny_world["rewards"] + ":length", f"{tmp_path}/rules.py:even", weights=[1.0, 2.0])
        listed.append(dict(type="classifier", path=str(tmp_path / "scorer"), weight=0.5, batch_size=3))
        url = f"http://127.0.0.1:{server.server_port}/"
        listed.append(dict(type="http", url=url, weight=0.1, batch_size=3))
        make(tiny_world, runtime, tmp_path / "run", rewards=listed, steps=1).train()
        server.shutdown()
    assert max(len(asked["responses"]) for asked in server.asked) == 3
    weights = {"length": 1.0, "even": 2.0, "scorer": 0.5, "127.0.0.1": 0.1}
    trained = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    evaluated = [row for row in read_metrics(tmp_path / "run") if "eval/reward" in row]
    for row, prefix in ((trained[0], ""), (evaluated[0], "eval/")):
        total = sum(weight * row[f"{prefix}reward/{name}"] for name, weight in weights.items())
        assert row[f"{prefix}reward"] == pytest.approx(total, rel=1e-5)
    assert all(trained[0][f"seconds/reward/{name}"] > 0 for name in weights)
    assert sum(trained[0][f"seconds/reward/{name}"] for name in weights) <= trained[0]["seconds/score"]


def test_a_run_with_an_ensemble_tells_its_models(tiny_world, runtime, tmp_path):
    paths = [str(tmp_path / name) for name in ("first", "second")]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        RewardModel(config=AutoConfig.from_pretrained(tiny_world["policy"])).save_pretrained(path)
        AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(path)
    entry = dict(type="ensemble", paths=paths, pessimism=2.0)
    make(tiny_world, runtime, tmp_path / "run", rewards=[entry], steps=1).train()
    [row] = [row for row in read_metrics(tmp_path / "run") if "policy_loss" in row]
    members = [row[f"reward/ensemble/model_{i}"] for i in (1, 2)]
    assert members[0] != members[1] and row["reward/ensemble/std"] > 0
    expected = sum(members) / 2 - 2.0 * row["reward/ensemble/std"]
    assert row["reward"] == pytest.approx(expected, rel=1e-5)


def test_a_reward_of_tokens_ends_up_at_its_tokens(tiny_world, runtime, tmp_path, monkeypatch):
    """Normalizing and clipping leave it alone: they are for the scores of whole responses."""
    from coati.trainers import ppo

    gae, seen = ppo.gae, []
    (tmp_path / "rules.py").write_text(RULES)
    places = [f"{tmp_path}/rules.py:even", tiny_world["rewards"] + ":length"]
    changes = dict(rewards=functions(*places, weights=[3.0, 1.0]), temperature=1.0)
    changes |= dict(kl_coefficient=0.0, reward_clip=0.25, normalize_reward=True)
    trainer = make(tiny_world, runtime, tmp_path / "run", **changes)
    monkeypatch.setattr(
        ppo, "gae", lambda values, rewards, mask, *a: seen.append(rewards) or gae(values, rewards, mask, *a)
    )
    rollouts, batches = trainer.rollouts.next, []
    monkeypatch.setattr(trainer.rollouts, "next", lambda k: batches.append(rollouts(k)) or batches[-1])
    metrics = trainer.step(0)
    [(batch, _)], [rewards] = batches, seen
    ids, mask = batch.input_ids, batch.response_mask
    expected = torch.where(mask, 3.0 * ((ids % 2 == 0).float() + ids / 1000), 0.0)
    assert metrics["reward/even"] == pytest.approx(expected.sum(1).mean().item() / 3, rel=1e-5)
    of_responses = (rewards - expected).sum(1)
    assert of_responses.abs().max() == pytest.approx(0.25) and len(of_responses.unique()) > 1
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    expected[torch.arange(len(ids)), last] += of_responses
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_rewards_by_rule(tiny_world, runtime, tmp_path, workers):
    """The answer comes from the data; an answer that can't be told right or wrong is counted."""
    rows = [{"question": sentence(i, 3), "answer": "ten" if i == 0 else f"so\n#### {i}"} for i in range(8)]
    data = [write_rows(tmp_path / "rows.jsonl", rows)]
    changes = dict(rewards=["gsm8k", dict(type="regex", pattern="(?s).*", weight=0.5)], eval_data=data)
    changes |= dict(train_data=data, steps=1, reward_workers=workers)
    make(tiny_world, runtime, tmp_path / "run", **changes, reward_failure_score=-8.0).train()
    written = read_metrics(tmp_path / "run")
    [trained] = [row for row in written if "reward" in row]
    evaluated = next(row for row in written if "eval/reward" in row)
    for row, prefix in ((trained, ""), (evaluated, "eval/")):
        assert row[f"{prefix}reward/gsm8k/failed"] == 1 / 8 and row[f"{prefix}reward/regex/failed"] == 0
        assert row[f"{prefix}reward/gsm8k"] == pytest.approx(-1.0) and row[f"{prefix}reward/regex"] == 1
        assert row[f"{prefix}reward"] == pytest.approx(-1.0 + 0.5)
    assert trained["seconds/reward/gsm8k"] >= 0


@pytest.mark.parametrize(
    ("rewards", "says"),
    [
        (
            ["gsm8k"],
            "reads the column 'answer', which the prompts' rows don't have",
        ),
        ([dict(type="gsm8k", answer_column="gold")], "name one of its fields: gold.value"),
        (functions("{rules}:asks"), r"asks\(.*it asks for solution, but the columns are gold, input_ids"),
        (
            functions("{rules}:completions"),
            r"is called as completions\(prompts, responses, \*\*columns\)",
        ),
    ],
)
@pytest.mark.parametrize("bad", ["train_data", "eval_data"])
def test_rows_that_a_reward_cannot_score_are_refused_before_anything_is_generated(
    tiny_world, runtime, tmp_path, rewards, says, bad
):
    """REPORT 15, REPORT 30: those of training and of evaluation."""
    (tmp_path / "rules.py").write_text(
        "def asks(prompts, responses, solution):\n    return [0.0] * len(responses)\n"
        "def completions(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    good = {"answer": "1", "gold": "1", "solution": "1"}
    files = {"train_data": good, "eval_data": good} | {bad: {"gold": {"value": 1}}}
    changes = {}
    for name, columns in files.items():
        rows = [{"prompt": sentence(i, 3)} | columns for i in range(8)]
        changes |= {name: [write_rows(tmp_path / f"{name}.jsonl", rows)]}
    rules = str(tmp_path / "rules.py")
    listed = [r | {"path": r["path"].format(rules=rules)} if "path" in r else r for r in rewards]
    with pytest.raises(UserError, match=says):
        make(tiny_world, runtime, tmp_path / "run", rewards=listed, **changes)


def test_a_reward_that_skips_responses_in_a_run(tiny_world, runtime, tmp_path):
    """REPORT 30: its mean is that of the responses that it scores, in training and evaluation."""
    (tmp_path / "rules.py").write_text(
        "def some(prompts, responses, kind, **c):\n    return [None if k == 'chat' else 3.0 for k in kind]\n"
        "def none(prompts, responses, **c):\n    return [None] * len(responses)\n"
    )
    rows = [{"prompt": sentence(i, 3), "kind": "chat" if i < 6 else "code"} for i in range(8)]
    data = [write_rows(tmp_path / "rows.jsonl", rows)]
    places = [f"{tmp_path}/rules.py:some", f"{tmp_path}/rules.py:none"]
    changes = dict(rewards=functions(*places), train_data=data, eval_data=data, steps=1)
    make(tiny_world, runtime, tmp_path / "run", **changes).train()
    written = read_metrics(tmp_path / "run")
    [trained] = [row for row in written if "reward" in row]
    evaluated = next(row for row in written if "eval/reward" in row)
    assert trained["reward/some/scored"] == 2 / 8
    for row, prefix in ((trained, ""), (evaluated, "eval/")):
        assert row[f"{prefix}reward"] == pytest.approx(3 * 2 / 8) and row[f"{prefix}reward/some"] == 3


def test_a_model_without_a_head_is_no_reward_model(tiny_world, runtime, tmp_path):
    """A head of random weights would be learned from without a word."""
    with pytest.raises(UserError, match=rf"{tiny_world['policy']} has no head, so it is no reward model"):
        make(tiny_world, runtime, tmp_path / "run", rewards=[reward_model(tiny_world["policy"])])


def test_a_reward_model_of_another_vocabulary_points_to_the_classifiers(tiny_world, runtime, tmp_path):
    from coati.models import RewardModel
    from tests.models.families import tiny_config

    RewardModel(config=tiny_config("llama", vocab_size=400)).save_pretrained(tmp_path / "scorer")
    gpt2_tokenizer().save_pretrained(tmp_path / "scorer")
    with pytest.raises(UserError, match=r"another vocabulary than the policy.*type classifier"):
        make(tiny_world, runtime, tmp_path / "run", rewards=[reward_model(str(tmp_path / "scorer"))])
    RewardModel(config=tiny_config("llama", vocab_size=400)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"no tokenizer beside it.*type classifier with a tokenizer"):
        make(tiny_world, runtime, tmp_path / "run", rewards=[reward_model(str(tmp_path / "bare"))])


def test_a_reward_model_may_be_a_sequence_classifier(tiny_world, runtime, tmp_path):
    """With the policy's tokenizer it scores the sampled ids, and the critic starts from it."""
    from transformers import AutoTokenizer, LlamaConfig

    from tests.rewards.test_classifier import make as make_classifier

    config = LlamaConfig.from_pretrained(tiny_world["policy"], num_labels=1)
    classifier = make_classifier(config)
    classifier.save_pretrained(tmp_path / "scorer")
    AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(tmp_path / "scorer")
    changes = dict(rewards=[reward_model(str(tmp_path / "scorer"))])
    trainer = make(tiny_world, runtime, tmp_path / "run", **changes)
    assert trainer.engines["critic"].module.value_head.weight.equal(classifier.score.weight)
    batch, _ = trainer.rollouts.next(0)
    with torch.no_grad():
        expected = [
            classifier.eval()(ids[mask][None]).logits[0, 0]
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
    torch.testing.assert_close(batch.scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_responses_are_scored_while_others_are_generated(tiny_world, runtime, tmp_path, monkeypatch):
    """In a process of their own, and with the same scores."""
    (tmp_path / "rules.py").write_text("def words(prompts, responses, **c):\n    return [len(r) for r in responses]\n")
    (tmp_path / "rules.py").open("a").write("words.per_response = True\n")
    changes = dict(rewards=functions(f"{tmp_path}/rules.py:words"), reward_workers=1, max_rollout_kl=9.0)
    trainer = make(tiny_world, runtime, tmp_path / "run", **changes)
    scorer, begun = trainer.generation.scorer, []
    submit, score = scorer.pool.submit, scorer.score
    monkeypatch.setattr(scorer.pool, "submit", lambda *asked: begun.append(asked) or submit(*asked))
    before = []
    monkeypatch.setattr(scorer, "score", lambda *given: before.append(len(begun)) or score(*given))
    batch, metrics = trainer.rollouts.next(0)
    assert metrics["seconds/reward_wait"] == metrics["seconds/reward/words"]
    assert before == [len(batch)], "all were begun before generation was over"
    assert len(begun) == len(batch), "none was asked for again"
    expected = [len(sample.response) for sample in batch.samples]
    assert batch.scores.tolist() == expected and len(set(expected)) > 1
    score(batch.samples)
    assert [sample.score for sample in batch.samples] == expected
    scorer.pool.close()


def test_the_documented_settings_parse(tmp_path):
    from coati.config import parse_config
    from coati.trainers.config import GRPOConfig
    from tests.conftest import ROOT
    from tests.docs.pages import blocks

    parsed = []
    for block in blocks(ROOT / "docs" / "rewards.md", "yaml"):
        (tmp_path / "grpo.yaml").write_text(block.text)
        parsed.append(parse_config(GRPOConfig, ["--config", str(tmp_path / "grpo.yaml")]).rewards)
    assert [(reward.type, reward.weight) for reward in parsed[0]] == [("math", 1.0), ("regex", 0.2), ("model", 0.5)]
    [reward] = parsed[1]
    assert reward.type == "classifier" and reward.pad_token == "<|endoftext|>" and reward.padding_side == "right"
    assert reward.max_length == 256
    [ensemble], [process], [http] = parsed[2:5]
    assert ensemble.type == "ensemble" and len(ensemble.paths) == 3 and ensemble.pessimism == 1
    assert (process.type, process.path, process.reduce) == ("process", "runs/prm/model", "min")
    assert http.type == "http" and http.more_urls and http.send_ids
    judges = [(reward.type, getattr(reward, "mode", None), reward.name) for reward in parsed[5]]
    assert judges == [("judge", "score", None), ("judge", "pairwise", "wins"), ("rubric", None, None)]
    assert [(reward.type, reward.path) for reward in parsed[6]] == [("judge", "runs/sft/model")]
    assert [(reward.type, reward.answer_column) for reward in parsed[7]] == [("regex", "answer")]


def test_a_run_with_a_judge_and_a_rubric_asks_nothing_again_when_it_is_repeated(tiny_world, runtime, tmp_path):
    """GRPO, twice from the same checkpoint: the verdicts are in its folder."""
    config_class, trainer_class = trainer_classes("grpo")
    (tmp_path / "rubric.yaml").write_text("- {criterion: is short, name: short}\n- {criterion: is odd}\n")

    def reply(text, count):
        number = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        if "Criterion" in text:
            return f"Met: {('yes', 'no')[number % 2]}"
        return f"Better: {('A', 'B', 'tie')[number % 3]}" if "Better" in text else f"Score: {1 + number % 10}"

    with serving(reply) as server:
        common = dict(model="m", endpoint=server.url)
        listed = [dict(type="judge", **common), dict(type="rubric", rubric=str(tmp_path / "rubric.yaml"), **common)]
        listed.append(dict(type="judge", mode="pairwise", name="wins", comparisons=2, **common))
        changes = dict(rewards=listed, steps=2, batch_size=4, save_every=1, samples=0)
        shared = [dict(entry, cache=str(tmp_path / "verdicts")) for entry in listed]
        rows = []
        for name, entries in (("a", shared), ("b", shared), ("c", listed)):
            run = settings_for("grpo", tiny_world, output_dir=str(tmp_path / name), **changes | dict(rewards=entries))
            asked = len(server.heard)
            trainer_class(configure(config_class, **run), runtime).train()
            rows.append([row for row in read_metrics(tmp_path / name) if "reward" in row])
            assert (len(server.heard) == asked) == (name == "b")
    assert [*(tmp_path / "c" / "verdicts").iterdir()]
    assert any("reward/length_correlation" in row for row in rows[0]), "once lengths differ"
    for first, second in zip(*rows[:2], strict=True):
        assert first["reward"] == second["reward"] and 0 < first["reward/judge"] < 1
        assert {"reward/rubric/short", "reward/rubric/2"} <= first.keys()
        assert first["reward/rubric"] == pytest.approx((first["reward/rubric/short"] + first["reward/rubric/2"]) / 2)
        assert first["reward/wins"] == pytest.approx(0.5, abs=0.2) and first["reward/wins/failed"] == 0


def test_a_run_with_a_judge_of_its_own(tiny_world, runtime, tmp_path):
    """Alone, within the group and by criteria, and evaluated with one response per prompt."""
    config_class, trainer_class = trainer_classes("grpo")
    folder = make_judge(tmp_path)
    criteria = '- {criterion: "is short", name: short}\n- {criterion: "is odd"}\n'
    (tmp_path / "rubric.yaml").write_text(criteria)
    listed = [dict(type="judge", path=folder), dict(type="judge", path=folder, mode="pairwise", name="wins")]
    listed.append(dict(type="rubric", path=folder, rubric=str(tmp_path / "rubric.yaml")))
    changes = dict(rewards=listed, steps=1, batch_size=4, samples=0, output_dir=str(tmp_path / "run"))
    trainer_class(configure(config_class, **settings_for("grpo", tiny_world, **changes)), runtime).train()
    [row] = [row for row in read_metrics(tmp_path / "run") if "reward" in row]
    assert 0 < row["reward/judge"] < 1 and row["reward/wins"] == pytest.approx(0.5)
    assert row["reward/rubric"] == pytest.approx((row["reward/rubric/short"] + row["reward/rubric/2"]) / 2)
    assert all(0 < row[f"reward/{name}/choice_mass"] < 1 for name in ("judge", "wins", "rubric"))
    assert all(row[f"reward/{name}/failed"] == 0 for name in ("judge", "wins", "rubric"))


def test_a_judge_of_its_own_may_stand_in_a_split_run(tiny_world):
    config_class, _ = trainer_classes("ppo")
    changes = dict(rewards=[dict(type="judge", path="folder")], tensor_parallel=2, plugin="zero1")
    configure(config_class, **settings_for("ppo", tiny_world, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(mode="pairwise"), "this method draws one: give it a reference_column"),
        (dict(tensor_parallel=2, plugin="zero1"), "would each ask the judge of the reward judge"),
    ],
)
def test_judges_that_can_not_be_are_refused_with_the_settings(tiny_world, changes, says):
    config_class, _ = trainer_classes("ppo")
    entry = dict(type="judge", model="m") | {name: changes[name] for name in changes if name == "mode"}
    others = {name: value for name, value in changes.items() if name != "mode"}
    with pytest.raises(UserError, match=says):
        configure(config_class, **settings_for("ppo", tiny_world, rewards=[entry], **others))
