"""What a run in bf16 is held to, on models whose logits have the standard deviation of trained ones, near 2: under the
default initialization all tokens are alike, and every tolerance holds.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coati.config import configure
from coati.errors import UserError
from coati.models import Actor, ActorCritic, Critic, RewardModel
from coati.models.packed import PackedGroups, check_packing
from coati.tracking import read_metrics
from tests.conftest import reward_model, settings_for, trainer_classes
from tests.models.families import padded, tiny_config
from tests.trainers.steps import iterate

FAMILIES = ("llama", "qwen3", "gpt2", "mistral")
PLUGINS = ("ddp", "zero1", "zero2")  # autocast of fp32 weights, and bf16 weights with fp32 copies
RESPONSES = dict(temperature=1.0, max_new_tokens=16, batch_size=8)


def sharp(model_class, family: str = "llama"):
    torch.manual_seed(0)
    return model_class(config=tiny_config(family, vocab_size=300, initializer_range=0.35))


def rows(count: int = 16, longest: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [longest, *torch.randint(2, longest, (count - 1,), generator=generator).tolist()]
    return padded([torch.randint(3, 300, (n,), generator=generator) for n in lengths], "right")


@pytest.fixture(scope="module")
def sharp_world(tiny_world, tmp_path_factory) -> dict[str, str]:
    """The tiny world with a policy and a reward model (`scorer`) that tell tokens apart."""
    from transformers import AutoConfig, AutoTokenizer

    folder = tmp_path_factory.mktemp("sharp")
    config = AutoConfig.from_pretrained(tiny_world["model_config"])
    config.initializer_range = 0.35
    for name, model_class in (("policy", Actor), ("scorer", RewardModel)):
        torch.manual_seed(3)
        model_class(config=config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_world["tokenizer"]).save_pretrained(folder / name)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    names = dict(policy=folder / "policy", scorer=folder / "scorer", model_config=folder / "config.json")
    return tiny_world | {name: str(path) for name, path in names.items()}


def make(algorithm: str, world, runtime, output: Path, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    changes = dict(precision="bf16") | changes
    return trainer_class(
        configure(config_class, **settings_for(algorithm, world, output_dir=str(output), **changes)), runtime
    )


def test_logits_differ_as_those_of_trained_models_do(sharp_world):
    ids, mask = rows()
    for actor in [sharp(Actor, family) for family in FAMILIES] + [Actor(sharp_world["policy"])]:
        assert 1.5 < actor.model(input_ids=ids, attention_mask=mask).logits[mask].std() < 3


# --- sampling and training


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_sampling_differs_from_training_by_less_than_stops_a_run(algorithm, plugin, sharp_world, runtime, tmp_path):
    """And by more than nothing: all log-probs are computed again."""
    metrics = iterate(make(algorithm, sharp_world, runtime, tmp_path, plugin=plugin, **RESPONSES)).metrics
    assert 0 < metrics["rollout_kl"] < 0.02


@pytest.mark.parametrize("plugin", PLUGINS)
def test_weights_of_a_few_steps_ago_are_more_than_rounding(plugin, sharp_world, runtime, tmp_path):
    """The default limit tells a sampler whose weights were not synced from one that rounds."""
    trainer = make("grpo", sharp_world, runtime, tmp_path, plugin=plugin, **RESPONSES)

    def move(batch):
        generator = torch.Generator().manual_seed(4)
        for p in trainer.actor.module.parameters():
            p.data.add_(0.1 * p.data.std() * torch.randn(p.shape, generator=generator).to(p.dtype))
        return batch

    with pytest.raises(UserError, match="log-prob mismatch"):
        iterate(trainer, change=move)


# --- shared prompts


def shared_prompts(model_class, members: int = 4) -> list[dict]:
    """Groups of rows with prompts of some length, as a call's keywords."""
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 300, (n,), generator=generator) for n in (30, 12, 5)]
    responses = torch.randint(3, 300, (members, len(prompts), 16), generator=generator)
    ids, mask = padded([torch.cat([p, r]) for of in responses for p, r in zip(prompts, of, strict=True)], "right")
    starts = torch.tensor([len(prompt) for prompt in prompts]).repeat(members)
    targets = mask & (torch.arange(ids.shape[1]) >= starts[:, None])
    inputs = dict(input_ids=ids, attention_mask=mask, right_padded=True, shared_prefix_group=members)
    return [inputs | ({"targets": targets} if model_class is Actor else {})]


def forward_all_of(model, weights: str):
    """Of a model with bf16 weights, or of fp32 weights under autocast."""
    if weights == "bf16":
        model.bfloat16()

    def forward_all(inputs):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=weights == "fp32"):
            return [model(**one) for one in inputs]

    return forward_all


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("model_class", [Actor, RewardModel])
def test_prompts_that_are_read_once_are_taken(model_class, family, weights):
    model = sharp(model_class, family).eval()
    check_packing(model, forward_all_of(model, weights), shared_prompts(model_class), exact=False)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("fault", ["positions", "others"])
@pytest.mark.parametrize("model_class", [Actor, RewardModel])
def test_rows_that_are_packed_wrongly_are_refused(model_class, fault, weights, monkeypatch):
    from_rows = PackedGroups.from_rows

    def wrong(*arguments):
        packed = from_rows(*arguments)
        if fault == "positions":  # as if all stood in one row
            positions = torch.arange(packed.input_ids.shape[1]).expand_as(packed.input_ids)
            return replace(packed, position_ids=positions)
        return replace(packed, owner=torch.full_like(packed.owner, -1))  # as if responses saw one another

    model = sharp(model_class).eval()
    monkeypatch.setattr(PackedGroups, "from_rows", wrong)
    with pytest.raises(UserError, match="share_prompts"):
        check_packing(model, forward_all_of(model, weights), shared_prompts(model_class), exact=False)


# --- rewards and values


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("model_class", [RewardModel, Critic, ActorCritic])
def test_scores_and_values_are_finer_than_bf16(model_class, family, weights):
    """Heads compute in float32: numbers near one another, which a pair or an advantage tells apart, stay apart."""
    model, (ids, mask) = sharp(model_class, family).eval(), rows()
    with torch.no_grad():
        exact = values_of(model(ids, mask), mask)
    [output] = forward_all_of(model, weights)([dict(input_ids=ids, attention_mask=mask)])
    found = values_of(output, mask)
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).float().mean() > 0.9
    assert (found - exact).abs().mean() < 0.05 * exact.std()


def values_of(output, mask: torch.Tensor) -> torch.Tensor:
    values = output[-1] if isinstance(output, tuple) else output
    return values if values.ndim == 1 else values[mask]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_rewards_of_a_run_are_those_of_the_model_in_fp32(plugin, sharp_world, runtime, tmp_path):
    """Of the same responses, up to the rounding of the reward model's trunk."""
    changes = dict(rewards=[reward_model(sharp_world["scorer"])], plugin=plugin) | RESPONSES
    trainer = make("grpo", sharp_world, runtime, tmp_path, **changes)
    batch, _ = trainer.rollouts.next(0)
    with torch.no_grad():
        exact = RewardModel(sharp_world["scorer"]).eval()(batch.input_ids, batch.attention_mask)
    assert batch.scores.dtype == torch.float32
    assert (batch.scores - exact).abs().mean() < 0.05 * exact.std()


# --- resume


RESUMED = {
    "sft": {},
    "reward": {},
    "preference": {},
    "ppo": dict(temperature=1.0, kl_target=0.5, kl_horizon=50, normalize_reward=True),
    "grpo": dict(kl_coefficient=0.05),
}


CASES = [(algorithm, plugin) for plugin in ("ddp", "zero2") for algorithm in RESUMED]
QUICK = [("sft", "zero2"), ("grpo", "ddp")]


@pytest.mark.parametrize(
    ("algorithm", "plugin"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(algorithm, plugin, sharp_world, runtime, tmp_path):
    """The fp32 weights that bf16 ones are rounded from go on too: at this learning rate some steps change no bf16
    weight by themselves."""
    changes = dict(RESUMED[algorithm], plugin=plugin, steps=4, save_every=2, eval_data=[], learning_rate=1e-4)
    changes |= dict(ppo_epochs=1, batch_size=4) if algorithm in ("ppo", "grpo") else {}
    make(algorithm, sharp_world, runtime, tmp_path / "whole", **changes).train()
    changes |= dict(resume=str(tmp_path / "whole" / "checkpoints" / "step-00000002"))
    make(algorithm, sharp_world, runtime, tmp_path / "resumed", **changes).train()
    expected, found = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "whole")[2:] == losses(tmp_path / "resumed")


def losses(folder: Path) -> list[float]:
    return [row[name] for row in read_metrics(folder) for name in row if name in ("loss", "policy_loss")]
