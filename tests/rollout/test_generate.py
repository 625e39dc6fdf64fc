"""Rollouts: the ids are the sampled ones, the log-probs those they were sampled with, the mask is the response."""

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor
from coati.rollout import Completion, Experience, GenerationConfig, Request, complete
from coati.rollout.generate import response_lengths
from tests.models.families import padded, rows, tiny_config
from tests.rollout.batches import batch_of, response_ids

EOS, PAD = 2, 0


@pytest.fixture(scope="module")
def actors():
    """By family; 11 tokens and logits of size 1 to 2, so that EOS comes early in some rows and late in others."""

    def make(family):
        torch.manual_seed(0)
        return Actor(config=tiny_config(family, vocab_size=11, initializer_range=0.3)).eval()

    return {family: make(family) for family in ("llama", "gpt2", "opt", "qwen3")}


def prompts(seed=0, lengths=(6, 2, 4, 1, 5, 3)):
    return [(x % 8 + 3).tolist() for x in rows(seed, lengths)]


def completions(actor, *, seed=0, pad_id=PAD, eos_ids=(EOS,), batch=None, **settings) -> list[Completion]:
    requests = [Request(prompt, [seed, row]) for row, prompt in enumerate(batch or prompts())]
    config = GenerationConfig(**{"max_new_tokens": 12, **settings})
    return complete(actor, requests, config, eos_ids=list(eos_ids), pad_id=pad_id)


def draw(actor, *, batch=None, pad_id=PAD, **options):
    """`completions` as a batch."""
    found = completions(actor, batch=batch, pad_id=pad_id, **options)
    return batch_of(batch or prompts(), found, pad_id)


def same(a, b):
    return a.input_ids.shape == b.input_ids.shape and torch.equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_recorded_log_probs_are_the_actors_own(actors, family, temperature):
    """PITFALL 32: prompts of unequal lengths padded on the left, rows that end early: sampling and training agree."""
    actor = actors[family]
    rollout = draw(actor, seed=1, temperature=temperature, eos_ids=(EOS, 5, 7))
    assert rollout.finished.any()
    assert rollout.response_mask.sum(1).unique().numel() > 1
    log_probs = actor(rollout.input_ids, rollout.attention_mask, temperature=temperature).detach()
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.sampling_log_probs[mask], log_probs[mask], rtol=1e-4, atol=1e-5)
    assert (rollout.sampling_log_probs[~mask] == 0).all()
    assert (rollout.sampling_log_probs[mask] < 0).all()


@pytest.mark.parametrize(
    "settings", [dict(top_k=3), dict(top_p=0.6), dict(temperature=0.0)], ids=["top_k", "top_p", "greedy"]
)
def test_recorded_log_probs_are_those_before_top_k_and_top_p(actors, settings):
    """PITFALL 32."""
    actor = actors["llama"]
    rollout = draw(actor, seed=1, **settings)
    log_probs = actor(rollout.input_ids, rollout.attention_mask).detach()
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.sampling_log_probs[mask], log_probs[mask], rtol=1e-4, atol=1e-5)


def test_a_minimum_length_does_not_change_the_recorded_distribution(actors):
    """PITFALL 32: EOS is forbidden at first; the log-prob of the token that was drawn is the policy's all the same."""
    actor = actors["llama"]
    rollout = draw(actor, seed=1, min_new_tokens=5)
    mask = rollout.response_mask
    assert (mask.sum(1) >= 5).all()
    log_probs = actor(rollout.input_ids, rollout.attention_mask).detach()
    torch.testing.assert_close(rollout.sampling_log_probs[mask], log_probs[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "published",
    [
        dict(top_k=2),
        dict(top_p=0.3),
        dict(temperature=0.2),
        pytest.param(dict(repetition_penalty=1.5)),
    ],
)
def test_the_models_generation_config_does_not_change_what_is_sampled(published):
    """PITFALL 32: published models carry a repetition penalty or top-k of their own (Qwen2.5: 1.05, 20); the
    settings of the run are the only ones, but for tokens that are never sampled (test_engine.py)."""
    torch.manual_seed(0)
    actor = Actor(config=tiny_config("llama", vocab_size=11, initializer_range=0.3)).eval()
    expected = draw(actor, seed=1)
    for name, value in published.items():
        setattr(actor.transformer.generation_config, name, value)
    rollout = draw(actor, seed=1)
    assert same(rollout, expected)
    assert torch.equal(rollout.sampling_log_probs, expected.sampling_log_probs)


def test_sampling_follows_the_distribution(actors):
    """PITFALL 32: the frequencies of one sampled token are the model's probabilities at that temperature."""
    actor, n = actors["llama"], 4000
    ids = torch.tensor([[3, 4, 5]]).repeat(n, 1)
    rollout = draw(actor, seed=0, batch=ids.tolist(), max_new_tokens=1, temperature=0.6)
    expected = (actor.transformer(ids[:1]).logits[0, -1].detach() / 0.6).softmax(-1)
    frequency = torch.bincount(rollout.input_ids[:, 3], minlength=11) / n
    assert (frequency - expected).abs().max() < 5 * (0.25 / n) ** 0.5


def test_another_seed_draws_different_noise_and_the_same_seed_the_same(actors):
    """PITFALL 4: the noise is a response's own, whatever was drawn before."""
    actor = actors["llama"]
    first, second = draw(actor, seed=5), draw(actor, seed=6)
    assert not same(first, second)
    assert same(first, draw(actor, seed=5))
    copies = draw(actor, seed=5, batch=[[3, 4]] * 8)
    assert len({tuple(response) for response in response_ids(copies)}) > 1, "nor do rows share their noise"


@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_the_response_ends_with_its_first_eos(actors, pad_id):
    """PITFALL 5, PITFALL 6: the first EOS belongs to the response, nothing after it does, pad = EOS or not."""
    rollout = draw(actors["llama"], seed=1, pad_id=pad_id)
    for response, finished in zip(response_ids(rollout), rollout.finished.tolist(), strict=True):
        assert (EOS in response) == finished
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) == finished
        assert finished or len(response) == 12
    assert (rollout.input_ids[~rollout.attention_mask] == pad_id).all()


def test_pad_equal_to_eos_changes_nothing_but_the_padding(actors):
    """PITFALL 6."""
    one, other = draw(actors["llama"], seed=1), draw(actors["llama"], seed=1, pad_id=EOS)
    assert response_ids(one) == response_ids(other)
    assert torch.equal(one.sampling_log_probs, other.sampling_log_probs)
    assert torch.equal(one.attention_mask, other.attention_mask)


def test_several_tokens_may_end_a_response(actors):
    rollout = draw(actors["llama"], seed=1, eos_ids=(EOS, 7, 8))
    assert rollout.finished.any()
    assert all(set(response[:-1]).isdisjoint({EOS, 7, 8}) for response in response_ids(rollout))
    ends = {r[-1] for r, done in zip(response_ids(rollout), rollout.finished, strict=True) if done}
    assert ends <= {EOS, 7, 8}


def test_rows_are_prompt_response_padding(actors):
    """PITFALL 19: the sampled ids are the ones that stand in the rollout."""
    rollout = draw(actors["llama"], seed=1)
    for row, (prompt, response) in enumerate(zip(prompts(), response_ids(rollout), strict=True)):
        n = len(prompt) + len(response)
        assert rollout.input_ids[row, :n].tolist() == prompt + response
        assert rollout.attention_mask[row].tolist() == [True] * n + [False] * (rollout.input_ids.shape[1] - n)
        assert rollout.response_mask[row].nonzero()[:, 0].tolist() == list(range(len(prompt), n))
    assert rollout.input_ids.shape[1] == rollout.attention_mask.sum(1).max()


def test_beams_are_transformers_own_and_have_no_log_probs(actors):
    """PITFALL 36: beam search."""
    actor, (ids, mask) = actors["llama"], padded([torch.tensor(p) for p in prompts()], "left")
    found = completions(actor, num_beams=3)
    keywords = dict(max_new_tokens=12, eos_token_id=[EOS], pad_token_id=PAD)
    plain = actor.generate(ids, mask, do_sample=False, num_beams=3, **keywords)
    for row, completion in enumerate(found):
        assert completion.ids == plain[row, ids.shape[1] :][: len(completion.ids)].tolist()
    assert {completion.log_probs for completion in found} == {None}


def test_greedy_with_top_k_is_a_contradiction(actors):
    for settings in (dict(top_k=5), dict(top_p=0.9), dict(min_p=0.1)):
        with pytest.raises(UserError, match="temperature 0 is greedy"):
            draw(actors["llama"], temperature=0.0, **settings)


def test_response_lengths_count_up_to_the_first_eos():
    """PITFALL 5: by position, so that padding of any id, EOS included, is left out."""
    responses = torch.tensor([[5, EOS, EOS, EOS], [EOS, 5, 5, 5], [5, 5, 5, 5], [5, 5, 5, EOS], [0, 0, EOS, 0]])
    lengths, finished = response_lengths(responses, [EOS])
    assert lengths.tolist() == [2, 1, 4, 4, 3]
    assert finished.tolist() == [True, True, False, True, True]


def test_a_rollout_by_hand():
    """PITFALL 2: all padding to the right; PAD ids inside prompt or response are real tokens."""
    responses = [Completion([7, PAD, 8], [-1.0, -2.0, -3.0], "length"), Completion([EOS], [-4.0], "eos")]
    rollout = batch_of([[3], [4, PAD, 6]], responses, PAD)
    assert rollout.input_ids.tolist() == [[3, 7, PAD, 8], [4, PAD, 6, EOS]]
    assert rollout.attention_mask.all()
    assert rollout.response_mask.int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert rollout.sampling_log_probs.tolist() == [[0, -1, -2, -3], [0, 0, 0, -4]]
    assert rollout.finished.tolist() == [False, True]
    assert response_ids(rollout) == [[7, PAD, 8], [EOS]]


def test_rows_of_an_experience_are_cut_to_the_longest():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    tokens = torch.arange(12).reshape(3, 4)
    names = ("log_probs", "reference_log_probs", "sampling_log_probs", "values", "returns")
    per_token = {name: tokens * i for i, name in enumerate(names)}
    of_batch = dict(input_ids=tokens, attention_mask=mask, response_mask=mask, lengths=[4, 2, 3], temperature=1.0)
    experience = Experience(**of_batch, **per_token, advantages=tokens)
    part = experience.rows([2, 1])
    assert (len(experience), len(part), part.lengths) == (3, 2, [3, 2])
    assert part.input_ids.tolist() == [[8, 9, 10], [4, 5, 6]]
    assert part.values.tolist() == [[24, 27, 30], [12, 15, 18]]


def test_rows_of_a_rollout_keep_what_belongs_to_them():
    responses = [Completion([7] * n, [-1.0] * n, "length" if n > 1 else "eos") for n in (3, 1, 2)]
    part = batch_of([[3], [4], [5]], responses, PAD).rows([2, 1])
    assert [sample.row for sample in part.samples] == [2, 1] and part.lengths == [3, 2]
    assert part.input_ids.tolist() == [[5, 7, 7], [4, 7, PAD]]
    assert part.finished.tolist() == [False, True] and part.scores.shape == (2,)
