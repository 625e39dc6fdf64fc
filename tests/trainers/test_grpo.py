"""GRPO and its relatives: whole tiny runs, what each option does, and what is refused."""

import copy
import dataclasses
import math
import statistics

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.errors import UserError
from coati.losses import group_advantages
from coati.models.adapters import vocabulary
from coati.rollout import prompt_of
from coati.tracking import read_metrics
from coati.trainers.grpo import GRPOConfig, GRPOTrainer
from tests.conftest import functions, settings_for, write_rows
from tests.trainers.stale import make_stale
from tests.trainers.steps import iterate, nudge, record_gradients

# The published algorithms as options, see docs/grpo.md; here each runs, there they are explained.
ALGORITHMS = {
    "GRPO": dict(kl_coefficient=0.04),
    "Dr. GRPO": dict(advantage="dr_grpo", aggregation="constant"),
    "DAPO": dict(aggregation="token", clip_high=0.28, dynamic_sampling=True, overlong_buffer=2, overlong_penalty=0.1),
    "GSPO": dict(policy_loss="gspo", clip_low=3e-4, clip_high=4e-4),
    "CISPO": dict(policy_loss="cispo", aggregation="token", clip_low=1.0, clip_high=1.0),
    "SAPO": dict(policy_loss="sapo", gate_positive=1.0, gate_negative=2.0),
    "DPPO": dict(policy_loss="dppo", aggregation="token", clip_low=0.15, clip_high=0.15),
    "LUSPO": dict(policy_loss="gspo", aggregation="sum", clip_low=3e-4, clip_high=4e-4),
    "VESPO": dict(policy_loss="vespo", aggregation="token"),
    "MaxRL": dict(advantage="maxrl"),
    "GDPO": dict(advantage="gdpo"),
    "RLOO": dict(advantage="rloo", policy_loss="none", kl_in="reward", kl_estimator="k1", kl_coefficient=0.03),
    "RLOO with a floor": dict(advantage="rloo_std", advantage_std_floor=0.2),
    "REINFORCE++": dict(advantage="reinforce++", kl_in="reward", kl_coefficient=0.01, aggregation="token"),
    "REINFORCE++ with a baseline": dict(advantage="reinforce++-baseline", kl_estimator="k2", kl_coefficient=0.01),
    "ReMax": dict(advantage="remax", group_size=1, batch_size=16),
}


# what no other of these runs through; tests/losses has every loss beside a slow one
QUICK = ("GRPO", "DAPO", "CISPO", "GDPO", "RLOO", "REINFORCE++", "REINFORCE++ with a baseline", "ReMax")

CENTERED = dict(policy_loss="cispo", clip_low=0.0, clip_high=0.0, score_centering=9)


def make(world, runtime, output, /, **changes) -> GRPOTrainer:
    return GRPOTrainer(configure(GRPOConfig, **settings_for("grpo", world, output_dir=str(output), **changes)), runtime)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ALGORITHMS]
)
def test_every_algorithm_learns_to_answer_at_length(name, tiny_world, runtime, tmp_path):
    make(tiny_world, runtime, tmp_path, steps=6, eval_data=[], learning_rate=1e-2, **ALGORITHMS[name]).train()
    rows = read_metrics(tmp_path)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-2:]) > sum(rewards[:2])
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def reward(tmp_path, body: str) -> list[dict]:
    """A reward function of prompts and responses, as `rewards`."""
    path = tmp_path / "own_rewards.py"
    path.write_text(f"def own(prompts, responses, **columns):\n    return {body}\n")
    return functions(f"{path}:own")


def test_a_prompt_is_read_once_for_its_group_and_answered_in_different_ways(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, minibatches=1)
    read, next_logits = [], trainer.actor.module.next_logits
    trainer.actor.module.next_logits = lambda ids, *a, **k: (read.append(ids.shape), next_logits(ids, *a, **k))[1]
    batch, _ = trainer.rollouts.next(0)
    assert sum(rows for rows, columns in read if columns > 1) == len({row for row in trainer.order.batch(0)})
    answers = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert len(answers) == 8 * 4 and all(len({*map(tuple, answers[i : i + 4])}) > 1 for i in range(0, 32, 4))
    prompts = [
        ids[~mask & seen].tolist()
        for ids, mask, seen in zip(batch.input_ids, batch.response_mask, batch.attention_mask, strict=True)
    ]
    assert prompts == [trainer.data[row].input_ids for row in trainer.order.batch(0) for _ in range(4)]


def test_the_loss_sees_what_the_rewards_gave(tiny_world, runtime, tmp_path):
    """Advantages of the group, on response tokens only; nothing of them on prompts and padding."""
    trainer = make(tiny_world, runtime, tmp_path, advantage="rloo")
    found = iterate(trainer)
    expected = group_advantages(found.batch.scores, 4, "rloo")[:, None] * found.batch.response_mask
    assert torch.equal(found.experience.advantages, expected) and found.metrics["advantage_std"] > 0
    assert found.experience.values is None and trainer.reference is None and found.metrics["kl"] == 0


def test_kl_in_the_reward_is_summed_over_the_answer(tiny_world, runtime, tmp_path):
    options = dict(advantage="rloo", kl_in="reward", kl_estimator="k1", kl_coefficient=0.3)
    trainer = make(tiny_world, runtime, tmp_path, **options)
    trainer.reference.engine.module.model.lm_head.weight.data.mul_(0.5)
    found = iterate(trainer)
    batch, experience = found.batch, found.experience
    x = (experience.log_probs - experience.reference_log_probs).masked_fill(~batch.response_mask, 0.0)
    expected = group_advantages(batch.scores - 0.3 * x.sum(1), 4, "rloo")
    torch.testing.assert_close(experience.advantages.amax(1) + experience.advantages.amin(1), expected)
    assert found.metrics["kl"] != 0


def test_groups_of_equal_rewards_are_replaced(tiny_world, runtime, tmp_path):
    """The batch is full of groups that differ, in the order of the data; the position in the data moves on by what was
    drawn."""
    options = dict(rewards=functions(tiny_world["rewards"] + ":odd"), max_refills=20, group_size=2)
    trainer = make(tiny_world, runtime, tmp_path, dynamic_sampling=True, **options)
    rollouts = trainer.rollouts
    rollout, metrics = rollouts.next(0)
    groups = rollout.scores.reshape(8, 2)
    assert (groups.amin(1) < groups.amax(1)).all()
    assert rollouts.position == round(8 / (1 - metrics["equal_groups"])) and metrics["refills"] > 0
    order = [trainer.order.row(place) for place in range(rollouts.position)]
    batch = [i for m in range(2) for i in range(m, 8, 2)]  # minibatch after minibatch
    found = [
        tuple(ids[: int((~mask & seen).sum())].tolist())
        for ids, mask, seen in zip(
            rollout.input_ids[::2], rollout.response_mask[::2], rollout.attention_mask[::2], strict=True
        )
    ]
    in_order = [prompt for _, prompt in sorted(zip(batch, found, strict=True))]
    remaining = iter([tuple(trainer.data[row].input_ids) for row in order])
    assert all(prompt in remaining for prompt in in_order)


def test_oversampling_takes_the_same_groups_in_fewer_rounds(tiny_world, runtime, tmp_path):
    """And the next iteration begins at the same prompt."""
    options = dict(rewards=functions(tiny_world["rewards"] + ":odd"), max_refills=20, group_size=2)
    found = []
    for oversampling in (1.0, 1.5, 3.0):
        folder = tmp_path / str(oversampling)
        trainer = make(tiny_world, runtime, folder, dynamic_sampling=True, oversampling=oversampling, **options)
        for k in range(2):
            rollout, metrics = trainer.rollouts.next(k)
        found.append((rollout, metrics, trainer.rollouts.position))
    (plain, of_plain, position), *others = found
    for rollout, metrics, its_position in others:
        assert torch.equal(rollout.input_ids, plain.input_ids) and torch.equal(rollout.scores, plain.scores)
        assert its_position == position
        assert metrics["refills"] < of_plain["refills"] and metrics["unused_groups"] > 0
        for name in ("reward", "reward_std", "response_length", "equal_groups"):
            assert metrics[name] == of_plain[name]
    assert "unused_groups" not in of_plain


def test_oversampling_needs_dynamic_sampling(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="oversampling is for dynamic_sampling"):
        make(tiny_world, runtime, tmp_path, oversampling=2.0)


def test_what_cannot_be_replaced_stays_and_teaches_nothing(tiny_world, runtime, tmp_path):
    options = dict(rewards=reward(tmp_path, "[1.0] * len(responses)"), max_refills=2, learning_rate=1.0)
    trainer = make(tiny_world, runtime, tmp_path / "run", dynamic_sampling=True, **options)
    before = [p.detach().clone() for p in trainer.actor.module.parameters()]
    metrics = trainer.step(0)
    assert (metrics["refills"], metrics["equal_groups"], metrics["advantage_std"]) == (2, 1.0, 0.0)
    assert trainer.rollouts.position == 3 * 8
    assert all(map(torch.equal, before, trainer.actor.module.parameters()))


def test_prompts_that_all_responses_earn_the_same_on_rest(tiny_world, runtime, tmp_path):
    """For an epoch; then they come back."""
    rewards = reward(tmp_path, "[float(int(c) % 3 == 0) * i for i, c in enumerate(columns['number'])]")
    rows = [{"prompt": "say", "number": n} for n in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    changes = dict(rewards=rewards, train_data=[data], eval_data=[], batch_size=4, group_size=2, minibatches=1)
    rollouts = make(tiny_world, runtime, tmp_path / "run", rest_epochs=1, **changes).rollouts

    def drawn(k):
        batch, metrics = rollouts.next(k)
        return [sample.columns["number"] for sample in batch.samples[::2]], metrics["resting"]

    first = [drawn(k) for k in range(3)]
    assert sorted(n for numbers, _ in first for n in numbers) == list(range(12))
    assert [share for _, share in first] == sorted(share for _, share in first)
    hard = [n for n in range(12) if n % 3]
    assert first[-1][1] == len(hard) / 12
    (second, _), (third, _) = drawn(3), drawn(4)
    assert sorted(second) == [0, 3, 6, 9] and set(third) & set(hard)


@pytest.mark.parametrize("choice", [dict(dynamic_sampling=True), dict(rest_epochs=1)])
def test_what_is_drawn_resumes_where_it_was(choice, tiny_world, runtime, tmp_path):
    """PITFALL 25: to the last bit, with a reference that is refreshed and a temperature that falls."""
    changes = choice | dict(rewards=functions(tiny_world["rewards"] + ":odd"), kl_coefficient=0.05)
    changes |= dict(
        group_size=2,
        refresh_reference=2,
        final_temperature=0.5,
        steps=6,
        save_every=3,
        keep_checkpoints=9,
        eval_data=[],
    )
    whole = make(tiny_world, runtime, tmp_path / "whole", **changes)
    whole.train()
    resume = str(tmp_path / "whole" / "checkpoints" / "step-00000003")
    resumed = make(tiny_world, runtime, tmp_path / "resumed", resume=resume, **changes)
    assert resumed.rollouts.position > 3 * 8 or resumed.rollouts.resting
    resumed.train()
    assert whole.state() == resumed.state()
    for name in ("actor", "reference"):
        ours, theirs = ((t.engines | t.frozen)[name].module.state_dict() for t in (whole, resumed))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first = load_file(f"{tiny_world['policy']}/model.safetensors")
    assert any(not torch.equal(first[k], v) for k, v in whole.frozen["reference"].module.model.state_dict().items())


def test_truncated_answers_can_be_left_out(tiny_world, runtime, tmp_path):
    """Their rewards still count in the group; their tokens have no gradient and are in no count."""
    trainer = make(tiny_world, runtime, tmp_path, mask_truncated=True, learning_rate=1e-2)
    finished = torch.arange(32) % 3 > 0
    cut = iterate(trainer, change=lambda batch: dataclasses.replace(batch, finished=finished)).experience
    assert (cut.response_mask.any(1) == finished).all()
    assert torch.equal(cut.advantages, iterate(trainer).experience.advantages)
    before = [p.detach().clone() for p in trainer.actor.module.parameters()]
    none = torch.zeros(32, dtype=torch.bool)
    iterate(trainer, change=lambda batch: dataclasses.replace(batch, finished=none), learns=True)
    assert all(map(torch.equal, before, trainer.actor.module.parameters()))


def test_long_answers_are_punished_and_the_temperature_falls(tiny_world, runtime, tmp_path):
    options = dict(overlong_buffer=4, overlong_penalty=0.5, final_temperature=0.2, steps=5)
    trainer = make(tiny_world, runtime, tmp_path, **options)
    batch, _ = trainer.rollouts.next(0)
    assert batch.temperature == 1.0
    lengths = batch.response_mask.sum(1)
    assert torch.allclose(batch.scores - trainer.shape(batch), 0.5 * (lengths - 4).clamp(min=0) / 4)
    assert trainer.rollouts.next(2)[0].temperature == pytest.approx(0.6)
    assert iterate(trainer, 4).metrics["temperature"] == pytest.approx(0.2)


def test_an_entropy_bonus_keeps_the_policy_undecided(tiny_world, runtime, tmp_path):
    entropies = []
    for coefficient in (0.0, 1.0):
        options = dict(entropy_coefficient=coefficient, learning_rate=1e-2, warmup=0.0, eval_data=[])
        make(tiny_world, runtime, tmp_path / str(coefficient), **options).train()
        entropies.append(read_metrics(tmp_path / str(coefficient))[-1]["entropy"])
    assert entropies[1] > entropies[0]


def test_the_baseline_of_remax_is_the_greedy_answer(tiny_world, runtime, tmp_path):
    trainer = make(tiny_world, runtime, tmp_path, advantage="remax", group_size=2, minibatches=1)
    found = iterate(trainer)
    prompts = [prompt_of(trainer.data, row, [9]) for row in trainer.order.batch(0)]
    greedy = trainer.generation.sample(prompts, dataclasses.replace(trainer.config.generation, temperature=0.0)).samples
    baseline = torch.tensor([sample.score for sample in greedy]).repeat_interleave(2)
    expected = (found.batch.scores - baseline)[:, None] * found.batch.response_mask
    torch.testing.assert_close(found.experience.advantages, expected)
    assert baseline.unique().numel() > 1


def test_gdpo_normalizes_each_reward_by_itself(tiny_world, runtime, tmp_path):
    """Then adds them up by weight, and whitens over the responses; one reward skips some of them."""
    (tmp_path / "own_rewards.py").write_text(
        "def long(prompts, responses, **columns):\n    return [float(len(r)) for r in responses]\n"
        "def vowels(prompts, responses, **columns):\n"
        "    return [None if len(r) % 3 == 0 else 9.0 * sum(c in 'aeiou' for c in r) for r in responses]\n"
    )
    places = [f"{tmp_path}/own_rewards.py:{name}" for name in ("long", "vowels")]
    rewards = functions(*places, weights=[2.0, -0.5])
    trainer = make(tiny_world, runtime, tmp_path / "run", advantage="gdpo", rewards=rewards)
    found = iterate(trainer)
    samples, mask = found.batch.samples, found.batch.response_mask
    given = {name: [sample.rewards[name] for sample in samples] for name in ("long", "vowels")}
    assert None in given["vowels"]
    sums = []
    for i in range(len(samples)):
        total = 0.0
        for name, weight in (("long", 2.0), ("vowels", -0.5)):
            group = [r for r in given[name][i // 4 * 4 : i // 4 * 4 + 4] if r is not None]
            if given[name][i] is not None and len(group) > 1:
                total += weight * (given[name][i] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        sums.append(total)
    expected = torch.tensor([(s - statistics.mean(sums)) / statistics.pstdev(sums) for s in sums])
    torch.testing.assert_close(found.experience.advantages, expected[:, None] * mask, rtol=1e-4, atol=1e-5)


def mismatched(batch):
    """The batch as from a sampler that is not the policy: planted, every other response by 0.5 a token."""
    log_probs = batch.sampling_log_probs - 0.03
    log_probs[::2] += 0.5
    return dataclasses.replace(batch, sampling_log_probs=log_probs)


PLANTED = torch.tensor([-0.47, 0.03]).repeat(16)[:, None]  # log p / mu of each row's tokens
MEASURED = {"token": lambda lengths: PLANTED, "geometric": lambda lengths: PLANTED, "sequence": lambda n: PLANTED * n}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("level", MEASURED)
def test_weights_of_each_level_correct_the_advantages(level, precision, tiny_world, runtime, tmp_path, monkeypatch):
    """PITFALL 32: also in fp32, where log-probs are else those noted at sampling."""
    options = dict(weights=level, cap=1.05, max_rollout_kl=9.0, rollout_engine="coati")
    trainer = make(tiny_world, runtime, tmp_path, **options)
    plain = iterate(trainer).experience
    monkeypatch.setattr("coati.trainers.policy.resolve_precision", lambda config: precision)
    found = iterate(trainer, change=mismatched)
    mask = found.batch.response_mask
    weights = MEASURED[level](mask.sum(1, keepdim=True)).exp().clamp(max=1.05)
    expected = plain.advantages * weights * mask
    torch.testing.assert_close(found.experience.advantages, expected, rtol=1e-4, atol=1e-6)
    mean = (weights * mask).sum().item() / mask.sum().item()
    assert found.metrics["mismatch/weight"] == pytest.approx(mean, rel=1e-4) and mean < 0.9
    assert found.metrics["mismatch/k1"] == pytest.approx(-(PLANTED * mask).sum().item() / mask.sum().item(), abs=1e-4)
    assert found.metrics["mismatch/rejected"] == 0 and found.metrics["mismatch/effective_sample_size"] < 0.99


@pytest.mark.parametrize("level", MEASURED)
def test_what_is_rejected_adds_nothing_but_counts(level, tiny_world, runtime, tmp_path):
    """Weights and rejection are two things: what is accepted keeps its advantage as it is."""
    options = dict(reject=level, reject_below=0.9, reject_above=1.5, max_rollout_kl=9.0, advantage="rloo")
    trainer = make(tiny_world, runtime, tmp_path, minibatches=1, **options)
    plain = iterate(trainer).experience
    found = iterate(trainer, change=mismatched)
    mask = found.batch.response_mask
    log_r = MEASURED[level](mask.sum(1, keepdim=True))
    accepted = (log_r >= math.log(0.9)) & (log_r <= math.log(1.5)) & mask
    torch.testing.assert_close(found.experience.advantages, plain.advantages * accepted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.experience.response_mask, mask)
    share = 1 - accepted.sum().item() / mask.sum().item()
    assert found.metrics["mismatch/rejected"] == pytest.approx(share) and 0.3 < share < 0.8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bypass_takes_the_samplers_log_probs_for_the_old_policys(precision, tiny_world, runtime, tmp_path, monkeypatch):
    trainer = make(tiny_world, runtime, tmp_path, bypass=True, max_rollout_kl=9.0)
    monkeypatch.setattr("coati.trainers.policy.resolve_precision", lambda config: precision)
    read = []
    monkeypatch.setattr(
        trainer.actor, "forward_all", lambda all, f=trainer.actor.forward_all: (read.extend(all), f(all))[1]
    )
    found = iterate(trainer, change=mismatched)
    assert torch.equal(found.experience.log_probs, found.batch.sampling_log_probs)
    assert sum(len(inputs["input_ids"]) for inputs in read) <= 32 / 8  # a few rows, to measure the mismatch
    assert found.metrics["rollout_kl"] > 1e-4


def test_bad_responses_that_the_policy_has_left_are_masked(tiny_world, runtime, tmp_path):
    """DeepSeek-V3.2's off-policy mask, of what sampled the responses and the policy as it is at each update: with a
    bound that no response keeps, the gradient is that of the good ones, over the same number of tokens."""
    options = dict(advantage="dr_grpo", aggregation="token", minibatches=1, max_rollout_kl=9.0, max_grad_norm=0.0)
    options |= dict(learning_rate=1e-2, warmup=0.0)
    trainer = make(tiny_world, runtime, tmp_path / "mask", off_policy_bound=0.2, weights="token", cap=1.0, **options)
    moved = lambda batch: dataclasses.replace(batch, sampling_log_probs=batch.sampling_log_probs + 0.3)  # noqa: E731
    found = iterate(trainer, change=moved, learns=True)
    bad = found.experience.advantages < 0
    assert found.metrics["off_policy_masked"] == pytest.approx(
        bad.sum().item() / found.batch.response_mask.sum().item()
    )
    assert 0.2 < found.metrics["off_policy_masked"] < 0.8
    plain = make(tiny_world, runtime, tmp_path / "plain", weights="token", cap=1.0, **options)
    advantages = type(plain).advantages
    plain.advantages = lambda *a: advantages(plain, *a).clamp(min=0)
    expected = iterate(plain, change=moved, learns=True)
    assert "off_policy_masked" not in expected.metrics
    for one, other in zip(trainer.actor.module.parameters(), plain.actor.module.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    bounded = make(tiny_world, runtime, tmp_path / "far", off_policy_bound=0.4, **options)
    assert iterate(bounded, change=moved, learns=True).metrics["off_policy_masked"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(kl_coefficient=0.04, minibatches=2),
        dict(micro_batch_size=2, lora_rank=2, kl_coefficient=0.04),
        dict(max_tokens_per_batch=256, dynamic_sampling=True, mask_truncated=True),
    ],
)
def test_a_prompt_that_is_read_once_for_its_answers_changes_nothing(changes, tiny_world, runtime, tmp_path):
    runs, read = {}, {}
    for share in (False, True):
        trainer = make(
            tiny_world, runtime, tmp_path / str(share), share_prompts=share, **dict(micro_batch_size=8) | changes
        )
        tokens = read[share] = []
        trainer.actor.module.transformer.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs, tokens=tokens: tokens.append(inputs[0].numel()) if torch.is_grad_enabled() else None
        )
        trainer.train()
        runs[share] = [
            {k: v for k, v in row.items() if not any(word in k for word in ("time", "second", "padding"))}
            for row in read_metrics(tmp_path / str(share))
        ]
    for shared, separate in zip(runs[True], runs[False], strict=True):
        assert shared == pytest.approx(separate, rel=1e-3, abs=1e-4)
    assert sum(read[True]) < 0.9 * sum(read[False])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(group_size=0), "group_size is 0: it must be at least 1"),
        (dict(group_size=1), "group_size must be at least 2"),
        (dict(group_size=1, advantage="remax", dynamic_sampling=True), "group_size must be at least 2"),
        (dict(temperature=0.0), "temperature"),
        (dict(final_temperature=0.0), "final_temperature"),
        (dict(normalize_reward=True), "normalize_reward"),
        (dict(kl_coefficient=0.1, kl_estimator="k1"), "k2 or k3"),
        (dict(refresh_reference=3), "kl_coefficient"),
        (
            dict(refresh_reference=3, kl_coefficient=0.1, plugin="gemini", precision="bf16"),
            "are replicated",
        ),
        (dict(refresh_reference=3, kl_coefficient=0.1, lora_rank=2), "without LoRA"),
        (dict(dynamic_sampling=True, max_refills=0), "max_refills"),
        (dict(group_size=1, advantage="remax", rest_epochs=1), "group_size must be at least 2"),
        (dict(observation_coefficient=0.1), "there is none"),
        (dict(advantage="turns"), "give --environment, and turn_rewards"),
        (dict(overlong_buffer=9), "max_new_tokens, 8"),
        (dict(mask_truncated=True, missing_eos_penalty=1.0), "choose one"),
        (dict(policy_loss="cispo", dual_clip=3.0), "dual_clip"),
        (dict(policy_loss="dppo", dual_clip=3.0), "dual_clip"),
        (dict(advantage="maxrl", kl_coefficient=0.1, kl_in="reward"), "kl_in loss"),
        (dict(advantage="gdpo", group_size=1), "group_size must be at least 2"),
        (dict(advantage="gdpo", kl_coefficient=0.1, kl_in="reward"), "kl_in loss"),
        (dict(advantage="gdpo", dynamic_sampling=True), "leave out dynamic_sampling"),
        (dict(advantage="gdpo", overlong_buffer=2), "and overlong_buffer"),
        (dict(advantage="gdpo", reward_clip=2.0), "leave out reward_clip"),
        (dict(advantage="gdpo", missing_eos_penalty=1.0), "and missing_eos_penalty"),
        (dict(policy_loss="vespo", weights="token"), "vespo weights whole responses itself"),
        (dict(policy_loss="vespo", dual_clip=3.0), "dual_clip"),
        (dict(power_negative=-1.0), "power_negative"),
        (dict(decay_positive=0.0), "decay_positive"),
        (dict(cap=0.5), "cap"),
        (dict(bypass=True, weights="token"), "leave out weights and reject, or bypass"),
        (dict(bypass=True, reject="geometric"), "leave out weights and reject, or bypass"),
        (CENTERED | dict(weights="token"), "leave out weights and reject"),
        (dict(score_centering=9), "give policy_loss cispo"),
        (CENTERED | dict(mask_truncated=True), "leave out mask_truncated"),
        (CENTERED | dict(top_p=0.9), "leave out top_k, top_p"),
        (CENTERED | dict(min_new_tokens=2), "and min_new_tokens"),
        (CENTERED | dict(rollout_engine="vllm"), "leave out vLLM"),
        (CENTERED | dict(tensor_parallel=2), "leave out vLLM, tensor"),
        (CENTERED | dict(environment="games.py:Game"), "leave it out with an environment"),
        (dict(entropy_coefficient=0.1, tensor_parallel=2), "tensor_parallel"),
        (dict(share_prompts=True, group_size=4, micro_batch_size=6), "one a multiple of the other"),
        (dict(share_prompts=True, group_size=4, micro_batch_size=1), "of 2 or more"),
        (dict(share_prompts=True, micro_batch_size=4, tensor_parallel=2), "leave out tensor"),
        (dict(batch_size=7), "2 minibatches"),
        (dict(num_beams=2), "num_beams"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(changes, words, tiny_world):
    with pytest.raises(UserError, match=words) as error:
        configure(GRPOConfig, **settings_for("grpo", tiny_world, output_dir="unused", **changes)).check(world_size=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bounds", [(0.0, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_score_centering_takes_off_what_the_sampler_expects(
    bounds, share_prompts, tiny_world, runtime, tmp_path, monkeypatch
):
    """The sampler has other weights, and its head is the whole vocabulary: the gradient is that of a sum over it."""
    probe = make(tiny_world, runtime, tmp_path / "probe").actor.module
    options = CENTERED | dict(clip_low=bounds[0], clip_high=bounds[1], share_prompts=share_prompts, max_rollout_kl=9.0)
    options |= dict(score_centering=vocabulary(probe.transformer), aggregation="token", ppo_epochs=1, minibatches=1)
    trainer = make(tiny_world, runtime, tmp_path / "run", micro_batch_size=4, max_grad_norm=0.0, **options)
    make_stale(trainer, monkeypatch, iterations=1)
    sampler = copy.deepcopy(trainer.actor.module)
    trainer.rollouts.next(0)
    nudge(trainer.actor.module.parameters(), 0.1)
    policy = copy.deepcopy(trainer.actor.module)
    gradients: dict[str, torch.Tensor] = {}
    record_gradients("actor", trainer.actor, gradients, monkeypatch)
    found = iterate(trainer, 1, learns=True)

    e = found.experience
    mask = e.response_mask[:, 1:]
    log_p, log_q = (
        model.run(e.input_ids, e.attention_mask).logits[:, :-1].log_softmax(-1) for model in (policy, sampler)
    )
    ratios = (log_p - log_q).exp().clamp(1 - bounds[0], 1 + bounds[1]).detach()
    of_drawn = (ratios * log_p).gather(-1, e.input_ids[:, 1:, None]).squeeze(-1)
    expected = (log_q.exp().detach() * ratios * log_p).sum(-1)
    loss = -(e.advantages[:, 1:] * (of_drawn - expected))[mask].sum() / mask.sum()
    loss.backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(gradients[f"actor.{name}"], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())
    assert found.metrics["head_mass"] == pytest.approx(1.0, abs=1e-5)


def test_score_centering_does_nothing_where_the_sampler_is_the_policy(tiny_world, runtime, tmp_path, monkeypatch):
    """But for rounding, in the first update of an iteration."""
    gradients: list[dict[str, torch.Tensor]] = [{}, {}]
    for size, recorded in zip((0, 9), gradients, strict=True):
        options = CENTERED | dict(score_centering=size, ppo_epochs=1, minibatches=1, learning_rate=0.0)
        trainer = make(tiny_world, runtime, tmp_path / str(size), max_grad_norm=0.0, **options)
        record_gradients("actor", trainer.actor, recorded, monkeypatch)
        metrics = trainer.step(0)
        assert ("head_mass" in metrics) == (size > 0)
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=0.0, atol=1e-4 * plain.abs().max().item())


def test_a_head_larger_than_the_vocabulary_is_refused(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="score_centering is 100000, but the policy knows"):
        make(tiny_world, runtime, tmp_path, **CENTERED | dict(score_centering=100_000))


def test_a_run_without_a_policy_is_refused(tiny_world, runtime, tmp_path):
    with pytest.raises(UserError, match="--model"):
        make(tiny_world, runtime, tmp_path, model=None)
