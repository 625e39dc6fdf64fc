"""Responses that are drawn part by part are those that are drawn at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coati.config.generation import GenerationConfig
from coati.models import Actor
from coati.rollout import Request, RolloutEngine
from coati.rollout.partial import continued
from coati.samples import Sample
from tests.models.families import tiny_config

EOS = 2
PROMPTS = [[5, 6, 7], [9], [11, 4, 8, 3, 12], [6, 6]]


@pytest.fixture(scope="module")
def actor():
    torch.manual_seed(0)
    return Actor(config=tiny_config("llama", vocab_size=16, initializer_range=0.3)).eval()


def stopped(responses: list[list[int]]) -> list[bool]:
    """As a stop text of two tokens does, which may be in two parts."""
    return [len(ids) > 1 and sum(ids[-2:]) % 8 == 5 for ids in responses]


def complete(actor, requests, **options):
    config = GenerationConfig(**{"max_new_tokens": 12, **options})
    return RolloutEngine(actor, config, eos_ids=[EOS], stop=stopped, slots=3).generate(requests)


OPTIONS = [{}, dict(min_new_tokens=7), dict(repetition_penalty=1.5, top_k=5), dict(temperature=0.0)]


@pytest.mark.parametrize("options", OPTIONS)
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True).map(sorted))
@settings(max_examples=15, deadline=None)
def test_wherever_a_response_is_cut_it_goes_on_as_if_it_had_not_been(actor, options, cuts):
    whole = complete(actor, [Request(prompt, [7, i]) for i, prompt in enumerate(PROMPTS)], **options)
    ids, log_probs, reasons = [[] for _ in PROMPTS], [[] for _ in PROMPTS], ["length" for _ in PROMPTS]
    for start, end in zip([0, *cuts], [*cuts, 12], strict=True):
        cut = [i for i, reason in enumerate(reasons) if reason == "length"]
        if not cut:
            break
        requests = [Request([*PROMPTS[i], *ids[i]], [7, i], end - start, begun=len(ids[i])) for i in cut]
        for i, part in zip(cut, complete(actor, requests, **options), strict=True):
            ids[i] += part.ids
            log_probs[i] += part.log_probs
            reasons[i] = part.finish_reason
    assert ids == [completion.ids for completion in whole]
    assert reasons == [completion.finish_reason for completion in whole]
    for found, completion in zip(log_probs, whole, strict=True):
        assert found == pytest.approx(completion.log_probs, abs=1e-5)


def test_the_prompts_give_every_kind_of_end(actor):
    """Else the test above would show less than it says."""
    found = [complete(actor, [Request(p, [7, i]) for i, p in enumerate(PROMPTS)], **options) for options in OPTIONS]
    reasons = {completion.finish_reason for completions in found for completion in completions}
    assert reasons == {"eos", "stop", "length"}


def part(tokens: list[int], drawn: int, version: int, reason: str) -> Sample:
    mask = [False] * (len(tokens) - drawn) + [True] * drawn
    log_probs = [-float(version + 1) if one else 0.0 for one in mask]
    return Sample(0, {}, "p", "r", tokens, mask, log_probs, reason, weights_version=version)


def test_parts_are_put_together_with_their_versions():
    found = part([1, 2, 3], 2, 4, "length")
    for more in (part([1, 2, 3, 4], 1, 5, "length"), part([1, 2, 3, 4, 5, 6], 2, 7, "eos")):
        found = continued(found, more)
    assert found.tokens == [1, 2, 3, 4, 5, 6]
    assert found.response_mask == [False, True, True, True, True, True]
    assert found.log_probs == [0.0, -5.0, -5.0, -6.0, -8.0, -8.0]
    assert found.parts == [[3, 4], [4, 5], [6, 7]]
    assert (found.weights_version, found.finish_reason) == (7, "eos")
