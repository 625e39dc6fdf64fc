"""A process reward model as a reward: it scores the steps of what was sampled, where they end among its tokens."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from coati.check_reward import load, text_model_reward
from coati.config import configure
from coati.errors import UserError
from coati.models import Actor, ProcessRewardModel
from coati.rewards import Scorer
from coati.rewards.config import ProcessRewardSettings
from coati.rewards.process import ProcessReward, load_here, steps_of
from coati.rollout import GenerationConfig, best_of_n
from coati.samples import Sample
from coati.serve.rewards import load_model_reward
from tests.conftest import reward_model, settings_for, trainer_classes
from tests.rewards.samples import rewards_of

BY_TOKEN = torch.tensor([math.log(p / (1 - p)) for p in torch.linspace(0.02, 0.98, 400).tolist()])


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return AutoTokenizer.from_pretrained(tiny_world["tokenizer"])


@pytest.fixture(scope="module")
def folder(tiny_world, tokenizer, tmp_path_factory):
    """An untrained model whose logits differ from token to token."""
    path = tmp_path_factory.mktemp("prm")
    torch.manual_seed(2)
    model = ProcessRewardModel(config=AutoConfig.from_pretrained(tiny_world["policy"]))
    torch.nn.init.normal_(model.value_head.weight, std=0.5)
    model.config.step_separator = " "
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def reward_by_token(tokenizer, reduce: str, separator: str = "\n", size: int = 2) -> ProcessReward:
    """Whose logit depends on the token alone, with `size` rows per forward pass, the last ones first."""

    def forward_all(batches):
        return [BY_TOKEN[batch["input_ids"]].where(batch["attention_mask"], torch.nan) for batch in batches]

    def split(lengths):
        rows = list(range(len(lengths)))[::-1]
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    how = dict(tokenizer=tokenizer, separator=separator, reduce=reduce)
    return ProcessReward(forward_all, 0, torch.device("cpu"), split, **how)


def sampled(tokenizer, response: str, end: str = "<eos>") -> Sample:
    asked, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("User: red\n", response + end))
    mask = [False] * len(asked) + [True] * len(ids)
    return Sample(0, {}, "User: red\n", response, asked + ids, mask, [0.0] * len(mask), "eos" if end else "length")


def probability(tokenizer, text: str) -> float:
    """Of the last token of a text."""
    return BY_TOKEN[tokenizer(text, add_special_tokens=False)["input_ids"][-1]].sigmoid().item()


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_response_is_scored_by_the_last_tokens_of_its_steps(tokenizer, size):
    lines = ["red lamp", "sorry", "blue clock!"]
    first, second, third = (probability(tokenizer, line) for line in lines)
    samples = [sampled(tokenizer, "\n".join(lines)), sampled(tokenizer, " red lamp\n\nsorry\n", end="")]
    samples += [sampled(tokenizer, " \n"), sampled(tokenizer, "")]
    expected = {
        "min": [min(first, second, third), min(first, second)],
        "product": [first * second * third, first * second],
        "mean": [(first + second + third) / 3, (first + second) / 2],
        "last": [third, second],
    }
    for reduce, scores in expected.items():
        found = reward_by_token(tokenizer, reduce, size=size).score(samples)
        assert found == pytest.approx([*scores, 0.0, 0.0], rel=1e-5)


def test_steps_are_rewarded_at_their_last_tokens(tokenizer):
    """In the sum of rewards, with a weight; nothing falls on the prompt, on separators or on EOS."""
    sample = sampled(tokenizer, "red lamp\nsorry")
    Scorer([(reward_by_token(tokenizer, "none"), 2.0)]).score([sample])
    ends = steps_of(sample, tokenizer, "\n")
    assert [tokenizer.decode(sample.tokens[: place + 1]) for place in ends] == [
        "User: red\nred lamp",
        "User: red\nred lamp\nsorry",
    ]
    expected = {place: 2 * BY_TOKEN[sample.tokens[place]].sigmoid().item() for place in ends}
    assert sample.score == 0 and {i: r for i, r in enumerate(sample.token_rewards) if r} == pytest.approx(expected)
    assert sample.rewards["process"] == pytest.approx(sum(expected.values()) / 2)


def test_the_turns_of_an_episode_are_split_one_by_one(tokenizer):
    texts = ("red\nlamp<eos>", "x\ny", "ok")
    first, told, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    mask = [True] * len(first) + [False] * len(told) + [True] * len(second)
    sample = Sample(0, {}, "", "ok", first + told + second, mask, None, "done")
    texts = [tokenizer.decode([sample.tokens[place]]) for place in steps_of(sample, tokenizer, "\n")]
    assert texts == [tokenizer.decode(tokenizer(t)["input_ids"][-1:]) for t in ("red", "lamp", "ok")]


def run_of(algorithm, world, runtime, output, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), **changes)
    return trainer_class(configure(config_class, **settings), runtime)


@pytest.mark.parametrize(("algorithm", "changes"), [("ppo", {}), ("grpo", dict(advantage="reinforce++"))])
def test_a_policy_learns_from_rewards_of_steps(algorithm, changes, tiny_world, folder, tokenizer, runtime, tmp_path):
    """They stand where the model that is trained finds them, and the metric is their sum."""
    entry = dict(type="process", path=folder, reduce="none", weight=0.5)
    changes = changes | dict(temperature=1.0, rewards=[entry], minibatches=1)
    trainer = run_of(algorithm, tiny_world, runtime, tmp_path / "run", **changes)
    next_batch, seen = trainer.rollouts.next, []
    trainer.rollouts.next = lambda k: seen.append(next_batch(k)) or seen[-1]
    metrics = trainer.step(0)
    [(batch, _)] = seen
    model = ProcessRewardModel(folder).eval()
    with torch.no_grad():
        real = torch.arange(batch.input_ids.shape[1]) < torch.tensor(batch.lengths)[:, None]
        probabilities = model(batch.input_ids, real)
    expected = torch.zeros_like(batch.token_rewards)
    for row, sample in enumerate(batch.samples):
        ends = steps_of(sample, tokenizer, " ")
        expected[row, ends] = 0.5 * probabilities.sigmoid()[row, ends]
    assert (expected > 0).sum() > len(batch.samples)
    torch.testing.assert_close(batch.token_rewards, expected)
    assert metrics["reward/process"] == pytest.approx(expected.sum().item() / 0.5 / len(expected), rel=1e-5)


@pytest.mark.parametrize(("algorithm", "changes"), [("grpo", {}), ("distill", {}), ("grpo", dict(advantage="gdpo"))])
def test_methods_that_learn_of_whole_responses_refuse_rewards_of_steps(algorithm, changes, tiny_world, folder):
    config_class, _ = trainer_classes(algorithm)
    settings = settings_for(algorithm, tiny_world, output_dir="run", **changes)
    with pytest.raises(UserError, match="reduce min, or choose ppo"):
        configure(config_class, **settings | dict(rewards=[dict(type="process", path=folder, reduce="none")]))
    configure(config_class, **settings | dict(rewards=[dict(type="process", path=folder)]))


def test_a_run_with_a_response_score_by_steps(tiny_world, folder, runtime, tmp_path):
    entries = [dict(type="process", path=folder, reduce="product")]
    trainer = run_of("grpo", tiny_world, runtime, tmp_path / "run", rewards=entries)
    assert 0 < trainer.step(0)["reward/process"] < 1


def test_other_models_and_other_tokenizers_are_refused_at_the_start(tiny_world, folder, runtime, tmp_path):
    from tests.distributed.world import make_family

    world = make_family("llama", tiny_world, tmp_path)
    with pytest.raises(UserError, match=r"no process reward model.*train one with coati prm"):
        run_of("ppo", world, runtime, tmp_path / "a", rewards=[dict(type="process", path=world["scorer"])])
    with pytest.raises(UserError, match="no value head of this model: bias"):
        run_of("ppo", tiny_world, runtime, tmp_path / "b", rewards=[reward_model(folder)])


def test_best_of_n_keeps_the_response_with_the_best_steps(tiny_world, folder, tokenizer):
    [entry] = rewards_of(dict(type="process", path=folder))
    whole = load_here(folder, entry, tokenizer, torch.device("cpu"), lambda lengths: [[*range(len(lengths))]])
    config = GenerationConfig(max_new_tokens=12)
    prompts = ["User: red\nAssistant:", "User: blue lamp\nAssistant:"]
    actor = Actor(tiny_world["policy"]).eval()
    chosen = best_of_n(actor, whole, prompts, 4, tokenizer=tokenizer, config=config)
    for best in chosen:
        assert best.scores[best.best] == max(best.scores) > min(best.scores) and all(0 <= s <= 1 for s in best.scores)
    again = best_of_n(actor, whole, prompts, 4, tokenizer=tokenizer, config=config, batch_size=3)
    assert [best.response for best in again] == [best.response for best in chosen]


def test_a_served_and_a_checked_reward_are_the_runs(folder, tokenizer, tiny_world):
    """They read texts: as the policy's tokenizer has them, with the chat template or with what a request says."""
    entry = ProcessRewardSettings(path=folder, reduce="mean")
    response = "red lamp sorry"
    here = load_here(folder, entry, tokenizer, torch.device("cpu"), lambda lengths: [[*range(len(lengths))]])
    asked = "<bos>User: red\nAssistant: "
    ids = tokenizer(asked + response + "<eos>", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(asked.rstrip(), add_special_tokens=False)["input_ids"])
    mask = [i >= start for i in range(len(ids))]
    [expected] = here.score([Sample(0, {}, "red", response, ids, mask, None, "eos")])
    assert text_model_reward(folder, entry).score([Sample.of_texts("red", response)]) == pytest.approx([expected])
    with_space = Sample.of_texts(asked.rstrip(), " " + response)
    assert load_model_reward(folder, entry).score([with_space]) == pytest.approx([expected])
    with pytest.raises(UserError, match="check it with reduce min"):
        load(ProcessRewardSettings(path=folder, reduce="none"))
