"""The experts of sampling, replayed in training: log-probs differ by rounding alone, and the router still learns."""

import copy

import pytest
import torch

from coati.models import Actor
from coati.models.packed import PackedGroups
from coati.models.routing import RoutingNotes, routers_of
from coati.rollout import GenerationConfig, Request, RolloutEngine, padded_routing
from tests.distributed.world import family_config

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3", "gpt_oss")
PROMPTS = [[3 + (7 * i + j) % 50 for j in range(3 + i % 4)] for i in range(10)] + [[9] * 6] * 2


def actor_of(family: str) -> Actor:
    torch.manual_seed(0)
    actor = Actor(config=family_config(family, 60)).eval()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return actor


def sample(actor: Actor, prompts=PROMPTS, slots: int = 4, with_routing: bool = True):
    config = GenerationConfig(max_new_tokens=16)
    requests = [Request(prompt, i, with_routing=with_routing) for i, prompt in enumerate(prompts)]
    return RolloutEngine(actor, config, eos_ids=[1], slots=slots).generate(requests)


def batch_of(completions, prompts=PROMPTS):
    """Token ids, attention mask and response mask, padded on the right, and the experts."""
    rows = [prompt + completion.ids for prompt, completion in zip(prompts, completions, strict=True)]
    ids, mask, sampled = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long) for _ in range(3))
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)], sampled[i, len(prompt) : len(row)] = torch.tensor(row), 1, 1
    return ids, mask.bool(), sampled.bool(), padded_routing([c.routing for c in completions], ids.shape, ids.device)


def chosen_by(actor: Actor, ids: torch.Tensor) -> torch.Tensor:
    """Of one row, `[tokens, layers, k]`, the experts in order."""
    notes = RoutingNotes(actor)
    with notes.noted(), torch.no_grad():
        actor(ids, None)
        return notes.take().sort(-1).values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_tells_the_experts_that_a_forward_pass_chooses(family):
    """Of rows that came and went, with equal prompts that are read once; and the tokens are those without."""
    actor = actor_of(family)
    completions = sample(actor)
    assert [c.ids for c in completions] == [c.ids for c in sample(actor, with_routing=False)]
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = chosen_by(actor, torch.tensor([prompt + completion.ids]))
        assert completion.routing.dtype == "int16" and len(completion.routing) == len(prompt + completion.ids) - 1
        assert torch.equal(torch.from_numpy(completion.routing).sort(-1).values, expected[:-1])


def test_what_all_prompts_begin_with_has_its_experts_too():
    actor, begin = actor_of("mixtral"), [3 + i % 50 for i in range(20)]
    prompts = [begin + prompt for prompt in PROMPTS]
    for prompt, completion in zip(prompts, sample(actor, prompts), strict=True):
        expected = chosen_by(actor, torch.tensor([prompt + completion.ids]))
        assert torch.equal(torch.from_numpy(completion.routing).sort(-1).values, expected[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_own_choice_replayed_changes_nothing(family):
    actor = actor_of(family)
    ids, mask, sampled, routing = batch_of(sample(actor))
    own, replayed = (actor(ids, mask, targets=sampled, **more) for more in ({}, dict(routing=routing)))
    torch.testing.assert_close(replayed, own, rtol=1e-5, atol=1e-5)
    assert torch.equal(actor(ids, mask, targets=sampled), own), "the pass after it chooses again"


@pytest.mark.parametrize("family", FAMILIES)
def test_given_experts_are_those_that_work(family):
    """Each token's next experts instead of its own; where none is given, its own."""
    actor = actor_of(family)
    ids, mask, sampled, routing = batch_of(sample(actor))
    router = routers_of(actor)[0]
    experts = router.weight.shape[0]
    given = torch.where(routing < 0, routing, (routing + 1) % experts)
    notes = RoutingNotes(actor)
    own = actor(ids, mask, targets=sampled)
    other = actor(ids, mask, targets=sampled, routing=given)
    assert (own - other).abs().max() > 1e-3
    with notes.noted():
        again = actor(ids, mask, targets=sampled, routing=given)
        used = notes.take().long().reshape(given.shape)
    assert torch.equal(again, other)
    assert torch.equal(used[given >= 0], given[given >= 0]) and (used >= 0).all()
    actor.zero_grad()
    again.sum().backward()
    assert router.weight.grad.norm() > 0


def test_activations_that_are_computed_again_go_to_the_same_experts():
    actor = actor_of("qwen3_moe")
    ids, mask, sampled, routing = batch_of(sample(actor))
    given = torch.where(routing < 0, routing, (routing + 1) % 4)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            actor.train()
            actor.model.gradient_checkpointing_enable()
        actor.zero_grad()
        actor(ids, mask, targets=sampled, routing=given).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in actor.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5)


def test_experts_of_a_prompt_that_is_read_once():
    """Rows that share what they begin with, with their own experts after it."""
    actor, prompts = actor_of("mixtral"), [p for p in ([5, 9, 13, 21], [7, 8, 30, 31, 40]) for _ in range(3)]
    completions = sample(actor, prompts)
    order = [0, 3, 1, 4, 2, 5]  # the groups' first rows, then their second ones
    ids, mask, sampled, routing = batch_of([completions[i] for i in order], [prompts[i] for i in order])
    apart, once = (actor(ids, mask, targets=sampled, routing=routing, shared_prefix_group=n) for n in (1, 3))
    torch.testing.assert_close(once, apart, rtol=1e-4, atol=1e-5)
    packed = PackedGroups.from_rows(ids, mask, 3)
    known = mask & (routing[..., 0, 0] >= 0)
    assert torch.equal(packed.unpack(packed.pack(routing))[known], routing[known])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_sampler_that_rounds_is_nearer_with_its_experts(family):
    """Sampled in bf16, computed in fp32."""
    actor = actor_of(family)
    prompts = PROMPTS * 3
    completions = sample(copy.deepcopy(actor).bfloat16(), prompts)
    ids, mask, sampled, routing = batch_of(completions, prompts)
    log_probs = torch.tensor([x for c in completions for x in c.log_probs])
    with torch.no_grad():
        own, replayed = (actor(ids, mask, targets=sampled, **m)[sampled] for m in ({}, dict(routing=routing)))
    of_own, of_replayed = ((found - log_probs).pow(2).mean() for found in (own, replayed))
    assert of_replayed < 0.25 * of_own
