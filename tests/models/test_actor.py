"""Actor: log-probs are those of the plain model; generation is transformers'."""

import pytest
import torch

from coati.models import Actor
from tests.models.families import EOS, FAMILIES, PAD, padded, rows, tiny_config


def make(family, **overrides):
    torch.manual_seed(0)
    return Actor(config=tiny_config(family, **overrides)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_plain_models_for_any_padding(family, temperature):
    """PITFALL 32: the same numbers for a row alone and in a padded batch, on either side."""
    actor, tokens = make(family), rows()
    for side in ("left", "right"):
        ids, mask = padded(tokens, side, extra=1)
        log_probs, entropy = actor(ids, mask, temperature=temperature, with_entropy=True)
        assert log_probs.shape == entropy.shape == ids.shape
        for row, x in enumerate(tokens):
            plain = (actor.transformer(x[None]).logits[0] / temperature).log_softmax(-1)
            expected = plain[torch.arange(len(x) - 1), x[1:]]
            here = mask[row].nonzero()[1:, 0]  # nothing predicts a row's first token
            torch.testing.assert_close(log_probs[row, here], expected, rtol=1e-4, atol=1e-5)
            plain_entropy = -(plain.exp() * plain).sum(-1)[:-1]
            torch.testing.assert_close(entropy[row, here], plain_entropy, rtol=1e-4, atol=1e-5)
    assert not entropy.requires_grad
    assert log_probs.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("chunk", "kept"), [(1, 0), (1, 2**24), (3 * 61, 0), (2**24, 0)])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "bloom", "falcon", "gptj"])
def test_log_probs_of_targets_are_those_of_all_tokens(family, chunk, kept, frozen, monkeypatch):
    """Values, entropies and every trained weight's gradient, however few logits are there at a time, and whether the
    output layer learns; Gemma 2 caps its logits after the head and is computed as a whole."""
    monkeypatch.setattr("coati.models.actor.MAX_LOGITS", {"cpu": chunk})
    monkeypatch.setattr("coati.models.actor.KEPT_LOGITS", kept)
    monkeypatch.setattr("coati.models.actor.ROWS", 1)
    capped = dict(final_logit_softcapping=1.0) if family == "gemma2" else {}
    actor, (ids, mask) = make(family, initializer_range=0.3, **capped), padded(rows(), "right")
    actor.transformer.get_output_embeddings().requires_grad_(not frozen)
    targets = mask & (torch.arange(ids.shape[1]) > 2)
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))

    def measure(**options):
        actor.zero_grad()
        log_probs, entropy = actor(ids, mask, temperature=0.7, with_entropy=True, **options)
        (log_probs * weights)[targets].sum().backward()
        gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.requires_grad}
        return log_probs.detach()[targets], entropy[targets], gradients

    for _ in range(2):  # the first call finds out what the head does
        for found, expected in zip(measure(targets=targets), measure(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert actor._head_is_last == (family != "gemma2")
    with torch.no_grad():
        assert torch.equal(actor(ids, mask, targets=targets) != 0, targets) or family == "gemma2"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt"])
def test_documents_of_a_row_see_no_other(family):
    """Packed behind one another, with padding after them, they get the log-probs that each gets alone."""
    actor, tokens = make(family), rows(lengths=(7, 4, 1, 5))
    positions = [torch.arange(len(x)) for x in tokens] + [torch.zeros(3, dtype=torch.long)]
    packed = torch.cat([*tokens, torch.full((3,), PAD)]).repeat(2, 1)
    everything = torch.ones_like(packed, dtype=torch.bool)
    for targets in (None, everything):
        position_ids = torch.cat(positions).repeat(2, 1)
        found = actor(packed, everything, targets=targets, position_ids=position_ids)
        for row in found:
            for x, part in zip(tokens, row.split([*map(len, tokens), 3]), strict=False):
                torch.testing.assert_close(part[1:], actor(x[None])[0, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mamba"])
def test_which_models_keep_documents_apart(family):
    """OPT makes a mask of its own, and Bloom takes no positions."""
    assert make(family).isolates_documents() == (family not in ("opt", "bloom", "mamba"))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_the_log_partition_is_that_of_the_logits(family):
    actor, (ids, mask) = make(family, initializer_range=0.3), padded(rows(), "right")
    expected = actor.run(ids, mask).logits.logsumexp(-1)[:, :-1]
    for targets in (None, mask):
        log_probs, entropy, found = actor(ids, mask, targets=targets, with_entropy=True, with_log_partition=True)
        here = mask[:, 1:]
        torch.testing.assert_close(found[:, 1:][here], expected[here], rtol=1e-5, atol=1e-5)
        assert found.requires_grad and log_probs.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_log_probs_of_heads_are_those_of_all_tokens(family, chunk, monkeypatch):
    """Of tokens that could have stood at each place, by their gradients too."""
    monkeypatch.setattr("coati.models.actor.MAX_LOGITS", {"cpu": chunk})
    monkeypatch.setattr("coati.models.actor.ROWS", 1)
    actor, (ids, mask) = make(family, initializer_range=0.3), padded(rows(), "right")
    generator = torch.Generator().manual_seed(1)
    heads = torch.randint(61, (*ids.shape, 4), generator=generator)
    plain = (actor.run(ids, mask).logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, heads[:, 1:])
    targets = mask & (torch.arange(ids.shape[1]) > 2)
    weights = torch.randn(heads.shape, generator=generator)
    (plain * weights[:, 1:])[targets[:, 1:]].sum().backward()
    expected = {name: p.grad.clone() for name, p in actor.named_parameters()}
    for given in (targets, None):
        actor.zero_grad()
        log_probs, entropy, found = actor(ids, mask, targets=given, head_ids=heads, temperature=0.7, with_entropy=True)
        assert found.shape == heads.shape and log_probs.shape == entropy.shape == ids.shape
        torch.testing.assert_close(found[targets], plain[targets[:, 1:]], rtol=1e-4, atol=1e-5)
        (found * weights)[targets].sum().backward()
        for name, p in actor.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_gives_every_weight_a_gradient_of_zero():
    actor, (ids, mask) = make("llama"), padded(rows(), "right")
    log_probs = actor(ids, mask, targets=torch.zeros_like(mask))
    assert (log_probs == 0).all()
    log_probs.sum().backward()
    assert all((p.grad == 0).all() for p in actor.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_transformers_own(family):
    """PITFALL 36: greedy works; a left-padded batch gives what each prompt gives alone."""
    actor, tokens = make(family), rows()
    ids, mask = padded(tokens, "left")
    result = actor.generate(ids, mask, do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=PAD)
    keywords = dict(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=PAD)
    expected = actor.transformer.generate(input_ids=ids, attention_mask=mask.long(), **keywords)
    assert torch.equal(result, expected)
    for row, x in enumerate(tokens):
        alone = actor.generate(x[None], torch.ones_like(x)[None], **keywords)
        assert torch.equal(result[row, -5:], alone[0, -5:])


@pytest.mark.parametrize("settings", [dict(do_sample=True, top_k=0), dict(num_beams=3, do_sample=False)])
def test_sampling_and_beams_run_and_leave_the_mode_alone(settings):
    """PITFALL 36: sampling and beam search; a model in training mode stays in it, and is not sampled with dropout."""
    actor = make("gpt2").train()
    ids, mask = padded(rows(), "left")
    torch.manual_seed(1)
    result = actor.generate(ids, mask, max_new_tokens=4, eos_token_id=EOS, pad_token_id=PAD, **settings)
    assert torch.equal(result[:, : ids.shape[1]], ids)
    assert ids.shape[1] < result.shape[1] <= ids.shape[1] + 4
    assert actor.training
    assert actor.transformer.training
    torch.manual_seed(1)
    again = actor.eval().generate(ids, mask, max_new_tokens=4, eos_token_id=EOS, pad_token_id=PAD, **settings)
    assert torch.equal(result, again)


def test_beam_search_finds_a_response_at_least_as_likely_as_greedy():
    """PITFALL 36: with as many beams as there are tokens, two steps are searched exhaustively."""
    actor = make("llama", vocab_size=7)
    torch.nn.init.normal_(actor.transformer.lm_head.weight, std=2.0)
    ids = torch.tensor([[3, 4, 5]])
    keywords = dict(do_sample=False, max_new_tokens=2, eos_token_id=None, pad_token_id=PAD)
    greedy = actor.generate(ids, torch.ones_like(ids), **keywords)
    beam = actor.generate(ids, torch.ones_like(ids), num_beams=7, **keywords)
    every = torch.tensor([[*ids[0].tolist(), a, b] for a in range(7) for b in range(7)])
    scores = actor(every)[:, -2:].sum(1)
    assert torch.equal(beam[0], every[scores.argmax()])
    assert scores.max() >= actor(greedy)[0, -2:].sum()
