"""The rollout engine: transformers' tokens, whatever the neighbors, the slots and the order of arrival."""

import copy
import math
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import nn
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from coati import rollout
from coati.errors import UserError
from coati.models import Actor
from coati.rollout import FollowUps, GenerationConfig, Request, RolloutEngine
from coati.rollout.engine.batch import ContinuousBatch
from coati.rollout.engine.cache import SlotCache
from coati.rollout.engine.engine import FEWEST_PACKED
from coati.rollout.engine.graphs import StepGraphs
from coati.rollout.engine.live import HEADS, LiveRequest
from coati.rollout.engine.packed_weights import SMALLEST, _packed, packed_weights
from coati.rollout.engine.reader import KEPT_SHARE
from coati.rollout.engine.sampling import BLOCK, Sampler, draw, key_of
from tests.models.families import padded, tiny_config
from tests.rollout.batches import batch_of

EOS, PAD, VOCABULARY = 2, 0, 50
FAMILIES = ("llama", "qwen3", "gpt2", "opt", "mistral", "bloom", "gemma2", "falcon")


@pytest.fixture(scope="module")
def actors():
    """By family; Mistral's and Gemma's windows are shorter than the rows."""

    def make(family):
        torch.manual_seed(0)
        window = dict(sliding_window=9) if family in ("mistral", "gemma2") else {}
        options = dict(vocab_size=VOCABULARY, initializer_range=0.2)
        return Actor(config=tiny_config(family, **options, **window)).eval()

    made = {}
    return lambda family: made.setdefault(family, made.get(family) or make(family))


def some_prompts(count, longest=12, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCABULARY, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def complete(actor, requests, slots=256, eos_ids=(EOS,), stop=None, **options):
    config = GenerationConfig(**{"max_new_tokens": 20, **options})
    return RolloutEngine(actor, config, eos_ids=list(eos_ids), slots=slots, stop=stop).generate(requests)


def watch_batches(engine) -> list[ContinuousBatch]:
    """Those that it begins from now on."""
    begun = []

    class Watched(ContinuousBatch):
        def __init__(self, *arguments, **options):
            begun.append(self)
            super().__init__(*arguments, **options)

    engine.batch_class = Watched
    return begun


def transformers_own(actor, prompts, **options):
    """Greedy responses of `transformers.generate`, cut after the first EOS."""
    ids, mask = padded([torch.tensor(p) for p in prompts], "left")
    keywords = dict(max_new_tokens=20, eos_token_id=EOS, pad_token_id=PAD) | options
    responses = actor.generate(ids, mask.long(), do_sample=False, **keywords)[:, ids.shape[1] :].tolist()
    return [response[: response.index(EOS) + 1] if EOS in response else response for response in responses]


@pytest.mark.parametrize("slots", [7, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_own_token_for_token(actors, family, slots):
    """PITFALL 36: 200 prompts; with 7 slots they come and go."""
    actor, prompts = actors(family), some_prompts(200)
    found = complete(actor, [Request(p) for p in prompts], slots, temperature=0.0)
    assert [c.ids for c in found] == transformers_own(actor, prompts)
    reasons = {c.finish_reason for c in found}
    assert all((c.ids[-1] == EOS) == (c.finish_reason == "eos") for c in found) and reasons <= {"eos", "length"}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_models_own(actors, family):
    """PITFALL 32: of rows that came and went, by a forward pass over each whole row."""
    actor, prompts = actors(family), some_prompts(30)
    found = complete(actor, [Request(p, i) for i, p in enumerate(prompts)], 5, temperature=0.8, eos_ids=(EOS, 7, 9))
    assert len({len(c.ids) for c in found}) > 3
    for prompt, completion in zip(prompts, found, strict=True):
        expected = actor(torch.tensor([prompt + completion.ids]), temperature=0.8)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slots", [5, 256])
def test_heads_are_the_most_likely_tokens_wherever_one_is_sampled(actors, slots, as_on_a_gpu):
    """Of rows that came and went, on a host that is a step behind; and the tokens are those without heads."""
    actor, prompts = actors("llama"), some_prompts(30)
    options = dict(temperature=0.8, eos_ids=(EOS, 7, 9))
    plain, found = (
        complete(actor, [Request(p, i, heads=n) for i, p in enumerate(prompts)], slots, **options) for n in (0, 4)
    )
    assert [c.ids for c in plain] == [c.ids for c in found] and not any(c.heads for c in plain)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt + completion.ids])
        expected = (actor.run(ids, None).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        assert len(completion.heads) == len(completion.ids)
        for of_model, (tokens, log_probs) in zip(expected, completion.heads, strict=True):
            torch.testing.assert_close(torch.from_numpy(log_probs), of_model.topk(4).values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(of_model[tokens], torch.from_numpy(log_probs), rtol=1e-4, atol=1e-5)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The host a step behind, shapes rounded up, and a "graph" that notes what was captured and does the step again."""
    captured = []

    class Graph:
        def __init__(self, step, shape):
            captured.append(shape)
            self.replay = lambda: step(*shape)

    start = RolloutEngine.__init__

    def started(engine, *args, **settings):
        start(engine, *args, **settings)
        engine.cuda_graphs, engine.steps_behind = True, 1

    monkeypatch.setattr(RolloutEngine, "__init__", started)
    capture = lambda graphs, step, shape: graphs.graphs.update({shape: Graph(step, shape)})  # noqa: E731
    monkeypatch.setattr(StepGraphs, "_capture", capture)
    return captured


@pytest.mark.parametrize("slots", [7, 256])
@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(top_p=0.9, repetition_penalty=1.3)], ids=str)
def test_a_step_behind_in_wider_shapes_the_completions_are_the_same(actors, options, slots, as_on_a_gpu, monkeypatch):
    """Rows end in the middle, at their limits, with a stop text and with their first token."""
    actor, prompts = actors("llama"), some_prompts(60)
    requests = [Request(p, i, max_new_tokens=1 + i % 23) for i, p in enumerate(prompts)]
    stop = lambda responses: [len(ids) > 3 and ids[-1] % 7 == 0 for ids in responses]  # noqa: E731
    found = complete(actor, requests, slots, stop=stop, **options)
    assert as_on_a_gpu and all(rows % 4 == 0 or rows in (1, 2, slots) for rows, _ in as_on_a_gpu)
    monkeypatch.undo()
    expected = complete(actor, requests, slots, stop=stop, **options)
    assert {c.finish_reason for c in expected} == {"eos", "stop", "length"}
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.finish_reason) == (other.ids, other.finish_reason)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_a_common_beginning_is_read_once(actors):
    """Of prompts that all begin alike, and go on differently."""
    for family in ("llama", "gpt2", "bloom", "mistral", "gemma2"):
        actor, beginning = actors(family), some_prompts(1, seed=5)[0] * 20
        prompts = [beginning[:30] + rest for rest in some_prompts(20)]
        engine = RolloutEngine(actor, GenerationConfig(max_new_tokens=8, temperature=0.0), eos_ids=[EOS])
        found = engine.generate([Request(p) for p in prompts])
        options = dict(max_new_tokens=8)
        assert [c.ids for c in found] == [transformers_own(actor, [p], **options)[0] for p in prompts], family
        assert engine.reader.prompt_tokens == 30 + sum(len(p) - 30 for p in {tuple(p) for p in prompts})


@given(st.data())
@settings(max_examples=10, deadline=None)
def test_a_sample_depends_on_its_prompt_and_seed_only(actors, data):
    """Any subset, in any order, with any number of slots."""
    actor, prompts = actors("llama"), some_prompts(24)
    requests = [Request(p, [3, i], max_new_tokens=i % 9 + 1) for i, p in enumerate(prompts)]
    alone = [complete(actor, [request])[0] for request in requests]
    chosen = data.draw(st.lists(st.sampled_from(range(24)), min_size=1, max_size=40))
    found = complete(actor, [requests[i] for i in chosen], data.draw(st.integers(1, 12)))
    for i, completion in zip(chosen, found, strict=True):
        assert (completion.ids, completion.finish_reason) == (alone[i].ids, alone[i].finish_reason)
        assert completion.log_probs == pytest.approx(alone[i].log_probs, abs=1e-5)
        assert len(completion.ids) <= i % 9 + 1


def test_a_prompt_is_read_once_for_all_its_samples(actors, monkeypatch):
    actor, read = actors("llama"), []
    forward = type(actor).next_logits
    monkeypatch.setattr(type(actor), "next_logits", lambda *a, **k: read.append(a[1].shape) or forward(*a, **k))
    found = complete(actor, [Request([5, 6, 7], i) for i in range(40)], max_new_tokens=3, eos_ids=())
    assert read[0] == (1, 3) and len(read) == 3
    assert len({tuple(c.ids) for c in found}) > 20


def test_cost_follows_the_sum_of_lengths(actors, monkeypatch):
    """One long response beside many short ones: rows that have ended are not computed any more."""
    actor, rows = actors("llama"), []
    forward = type(actor).next_logits
    monkeypatch.setattr(type(actor), "next_logits", lambda *a, **k: rows.append(a[1].shape[0]) or forward(*a, **k))
    limits = [100] + [2] * 63
    complete(actor, [Request([5 + i % 9], i, n) for i, n in enumerate(limits)], 16, max_new_tokens=100, eos_ids=())
    prompts = 9  # read once each; they give the first token of every response
    assert sum(rows) == prompts + sum(limits) - len(limits) and max(rows) <= 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_texts_end_a_response(tiny_world, actors, temperature):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    torch.manual_seed(0)
    actor = Actor(config=tiny_config("llama", vocab_size=len(tokenizer), initializer_range=0.2)).eval()
    options = dict(max_new_tokens=30, temperature=temperature)
    prompts, seeds = [[5, 6], [9, 8, 7], [11]], [4, 5, 6]
    requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    common = dict(eos_ids=[tokenizer.eos_token_id], pad_id=PAD, tokenizer=tokenizer)
    free = [c.ids for c in rollout.complete(actor, requests, GenerationConfig(**options), **common)]
    texts = [tokenizer.decode(ids) for ids in free]
    stop = texts[0][len(texts[0]) // 2 :][:2]
    found = rollout.complete(actor, requests, GenerationConfig(**options, stop=[stop]), **common)
    for ids, all_ids in zip([c.ids for c in found], free, strict=True):
        assert ids == all_ids[: len(ids)]
        ends = [n for n in range(1, len(all_ids) + 1) if stop in tokenizer.decode(all_ids[:n])]
        assert len(ids) == (ends[0] if ends else len(all_ids))
    assert len(found[0].ids) < len(free[0]) and found[0].finish_reason == "stop"


@pytest.mark.parametrize("options", [dict(repetition_penalty=1.7), dict(min_new_tokens=9)])
def test_greedy_with_penalty_or_shortest_length_is_transformers_own(actors, options):
    actor, prompts = actors("llama"), some_prompts(40)
    found = complete(actor, [Request(p) for p in prompts], 9, temperature=0.0, **options)
    # one at a time: transformers' penalty counts padding
    assert [c.ids for c in found] == [transformers_own(actor, [p], **options)[0] for p in prompts]
    assert [c.ids for c in found] != transformers_own(actor, prompts)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_are_never_sampled(temperature, num_beams):
    """As in transformers, by the model's generation config; log-probs stay those of the whole vocabulary."""
    torch.manual_seed(0)
    actor = Actor(config=tiny_config("llama", vocab_size=VOCABULARY, initializer_range=0.2)).eval()
    prompts, options = some_prompts(30), dict(temperature=temperature, num_beams=num_beams)
    config = GenerationConfig(max_new_tokens=20, **options)
    requests = [Request(prompt, i) for i, prompt in enumerate(prompts)]
    before = rollout.complete(actor, requests, config, eos_ids=[EOS], pad_id=PAD)
    never = sorted({token for completion in before for token in completion.ids} - {EOS})[::2]
    actor.transformer.generation_config.suppress_tokens = never
    after = rollout.complete(actor, requests, config, eos_ids=[EOS], pad_id=PAD)
    assert len(never) > 5 and not {token for completion in after for token in completion.ids} & set(never)
    if temperature == 0:
        expected = transformers_own(actor, prompts, num_beams=num_beams)
        assert [completion.ids for completion in after] == expected
    if num_beams == 1:
        batch = batch_of(prompts, after, PAD)
        log_probs = actor(batch.input_ids, batch.attention_mask) * batch.response_mask
        torch.testing.assert_close(batch.sampling_log_probs, log_probs, rtol=1e-4, atol=1e-5)


def test_probabilities_are_those_of_transformers_processors():
    torch.manual_seed(0)
    config = GenerationConfig(temperature=0.7, top_p=0.8, repetition_penalty=1.3)
    logits, ids = torch.randn(6, VOCABULARY) * 2, torch.randint(0, VOCABULARY, (6, 9))
    scores = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()) / 0.7
    expected = LogitsProcessorList([TopPLogitsWarper(0.8)])(ids, scores).softmax(-1)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    sampler, counts = Sampler(config, [EOS], torch.device("cpu")), torch.zeros(6, dtype=torch.long)
    found = sampler.warp(sampler.adjust(logits, counts, seen) / 0.7).softmax(-1)
    torch.testing.assert_close(found, expected)
    tokens, log_probs = sampler(logits, torch.arange(6), counts, seen)
    own = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs, own)


def mixed(x: int) -> int:
    """SplitMix64's finalizer on unsigned numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def noise(key: int, count: int, lane: int) -> float:
    golden = 0x9E3779B97F4A7C15
    row = mixed((key + (count + 1) * golden) % 2**64)
    uniform = ((mixed((row + (lane + 1) * golden) % 2**64) >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 0.5, 1.0]), min_size=1, max_size=300).filter(any),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 10**6),
)
def test_a_draw_is_the_race_written_out(weights, key, count):
    """Blocks race by their sums, then the winner's tokens; never one of probability 0."""
    scores = torch.tensor([weights], dtype=torch.float32).log()
    tokens, total = draw(scores, torch.tensor([key]), torch.tensor([count]))
    assert weights[tokens.item()] > 0
    assert total.item() == pytest.approx(math.log(sum(weights)), rel=1e-5, abs=1e-6)
    log = [math.log(w) if w else -math.inf for w in weights]
    blocks = [range(start, min(start + BLOCK, len(log))) for start in range(0, len(log), BLOCK)]
    sums = [math.log(s) if (s := math.fsum(weights[i] for i in block)) else -math.inf for block in blocks]
    race = [value + noise(key % 2**64, count, BLOCK + i) for i, value in enumerate(sums)]
    winner = max(range(len(race)), key=race.__getitem__)
    inside = {i: log[i] + noise(key % 2**64, count, i - blocks[winner][0]) for i in blocks[winner]}
    expected = max(inside, key=inside.__getitem__)
    runner_up = max((v for i, v in inside.items() if i != expected), default=-math.inf)
    if len(race) > 1 and sorted(race)[-1] - sorted(race)[-2] < 1e-5:
        return  # a photo finish, which float32 may decide otherwise
    assert tokens.item() == expected or inside[expected] - runner_up < 1e-5


def test_draws_follow_the_distribution():
    """Chi-square over 300 tokens in three blocks, for different keys at one place and one key at different places."""
    torch.manual_seed(0)
    scores, n = torch.randn(300) * 2, 200_000
    expected = scores.softmax(-1).double() * n
    numbers, zeros = torch.tensor([key_of([3, i]) for i in range(n)]), torch.zeros(n, dtype=torch.long)
    for keys, counts in ((numbers, zeros), (zeros + key_of(5), torch.arange(n))):
        found = torch.cat(
            [
                draw(scores.expand(len(k), -1), k, c)[0]
                for k, c in zip(keys.split(4096), counts.split(4096), strict=True)
            ]
        )
        found = torch.bincount(found, minlength=300)
        often = expected >= 5
        statistic = ((found - expected)[often] ** 2 / expected[often]).sum().item()
        assert chi2.sf(statistic, int(often.sum()) - 1) > 1e-4
        seldom = expected[~often].sum().item()
        assert found[~often].sum().item() == pytest.approx(seldom, abs=5 * seldom**0.5)


def test_an_empty_prompt_is_named(actors):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        complete(actors("llama"), [Request([3]), Request([])])
    assert complete(actors("llama"), []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["own dtype", "autocast"])
def test_packed_weights_give_the_same_products(dtype, autocast):
    """Of layers with and without bias, for one row and for many; afterwards the layers are as they were."""
    if torch.bfloat16 in (dtype, torch.bfloat16 if autocast else None):
        require_bf16_products()
    layers = nn.Sequential(nn.Linear(200, SMALLEST // 200 + 1), nn.Linear(SMALLEST // 200 + 1, 200, bias=False))
    layers.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for rows in ((1,), (7, 3), (130,)):
            x = torch.randn(*rows, 200, dtype=dtype)
            expected = layers(x)
            with packed_weights(layers):
                assert all("forward" in vars(layer) for layer in layers)
                found = layers(x)
            assert found.dtype == expected.dtype
            tolerance = 1e-5 if found.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert not any("forward" in vars(layer) for layer in layers)


def require_bf16_products():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no products in bf16")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_weights_change_no_token(actors, family, monkeypatch):
    """With 30 rows at first, and fewer and fewer; weights that change between two calls are packed anew."""
    actor, prompts = copy.deepcopy(actors(family)), some_prompts(30)
    packed = []
    monkeypatch.setattr("coati.rollout.engine.packed_weights.SMALLEST", 1)
    monkeypatch.setattr(
        "coati.rollout.engine.packed_weights._packed", lambda layer: packed.append(layer) or _packed(layer)
    )
    for _ in range(2):
        packed.clear()
        found = complete(actor, [Request(p) for p in prompts], temperature=0.0)
        assert packed and [c.ids for c in found] == transformers_own(actor, prompts)
        with torch.no_grad():
            for weight in actor.parameters():
                weight.mul_(1.5)


def test_what_gains_nothing_is_not_packed(actors, monkeypatch):
    """Small layers; responses of a few tokens; a model that would take too much memory twice."""
    monkeypatch.setattr("coati.rollout.engine.packed_weights._packed", lambda layer: pytest.fail("packed a layer"))
    complete(actors("llama"), [Request([3, 4])], temperature=0.0)
    monkeypatch.setattr("coati.rollout.engine.packed_weights.SMALLEST", 1)
    complete(actors("llama"), [Request([3, 4])], max_new_tokens=FEWEST_PACKED - 1, temperature=0.0)
    monkeypatch.setattr("coati.rollout.engine.packed_weights.MOST_BYTES", 1000)
    complete(actors("llama"), [Request([3, 4])], temperature=0.0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_step_gives_the_same_tokens(actors, family):
    actor, prompts = actors(family), some_prompts(40)
    found = complete(actor, [Request(p) for p in prompts], 7, temperature=0.0, compile_generation=True)
    assert [c.ids for c in found] == transformers_own(actor, prompts)


def test_compiling_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        GenerationConfig(compile_generation=True).check_installed()


def test_a_response_is_reported_when_it_has_ended(actors):
    """Each once, whole, with its place, in the order in which they end and not when all have; by transformers too."""
    actor, prompts = actors("llama"), some_prompts(40)
    requests = [Request(prompt, i) for i, prompt in enumerate(prompts)]
    engine = RolloutEngine(actor, GenerationConfig(max_new_tokens=20), eos_ids=[EOS, 7, 9], slots=7)
    batches, seen, under_way = watch_batches(engine), {}, []

    def report(index, completion):
        assert index not in seen and completion.finish_reason
        seen[index] = list(completion.ids)
        under_way.append(sum(not row.completion.finish_reason for row in batches[0].rows))

    found = engine.generate(requests, report)
    assert [seen[i] for i in range(40)] == [c.ids for c in found] and max(under_way) > 1
    ends = []
    options = dict(eos_ids=[EOS], pad_id=PAD, on_done=lambda i, completion: ends.append((i, completion.ids)))
    beams = rollout.complete(actor, requests[:3], GenerationConfig(max_new_tokens=4, num_beams=2), **options)
    assert ends == [(i, beam.ids) for i, beam in enumerate(beams)]


def turns_of(actor, keeps: bool, slots: int, turns: int = 4, **options):
    """Completions of several turns, each of which goes on from the one before and some tokens more; and how many prompt
    tokens were read in each: those that no states stand for."""
    more = some_prompts(turns * 30, longest=9, seed=3)
    requests = [Request(prompt, [i, 0], keep_states=keeps) for i, prompt in enumerate(some_prompts(30))]
    found, read, new = [], [], []
    for turn in range(turns):
        new.append(sum(len(r.prompt) - (r.states.length if r.states else 0) for r in requests))
        config = GenerationConfig(**{"max_new_tokens": 8, "temperature": 1.0, **options})
        engine = RolloutEngine(actor, config, eos_ids=[EOS, 7, 9], slots=slots)
        completions = engine.generate(requests)
        found.append(completions)
        read.append(engine.reader.prompt_tokens)
        requests = [
            Request(
                [*request.prompt, *completion.ids, *more.pop()],
                [i, turn + 1],
                states=completion.states,
                keep_states=keeps,
            )
            for i, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]
    assert read == new
    return found, read


@pytest.mark.parametrize("slots", [7, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_that_goes_on_from_kept_states_is_the_one_read_anew(actors, family, slots):
    found, read = turns_of(actors(family), True, slots)
    expected, all_read = turns_of(actors(family), False, slots)
    for kept, anew in zip(found, expected, strict=True):
        assert [c.ids for c in kept] == [c.ids for c in anew]
        for one, other in zip(kept, anew, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    assert not any(c.states for turn in expected for c in turn)
    if family == "bloom":  # its mask tells positions
        assert read == all_read and not any(c.states for turn in found for c in turn)
        return
    for turn in found:
        could_be = [c for c in turn if c.finish_reason != "length" and len(c.ids) < 8]
        kept = [c for c in turn if c.states]
        assert 0 < len(kept) == min(slots, len(could_be)) and all(c in could_be for c in kept)
    assert read[-1] < all_read[-1]


def test_kept_states_are_the_same_a_step_behind(actors, as_on_a_gpu, monkeypatch):
    found, _ = turns_of(actors("llama"), True, 7)
    monkeypatch.undo()
    expected, _ = turns_of(actors("llama"), True, 7)
    for behind, other in zip(found, expected, strict=True):
        assert [c.ids for c in behind] == [c.ids for c in other]
    assert any(c.states for turn in found for c in turn)


def test_no_token_of_an_episode_is_read_twice(actors):
    """Eight turns, each ended by an EOS: the model reads what is new, and what was sampled but for each last token."""
    actor, new = actors("llama"), [3, 4, 5, 6, 8]
    everything = list(range(VOCABULARY))  # whatever is sampled ends the response after its shortest length
    tokens, states, read = list(new), None, 0
    for turn in range(8):
        engine = RolloutEngine(actor, GenerationConfig(max_new_tokens=8), eos_ids=everything)
        [completion] = engine.generate([Request(tokens, turn, states=states, keep_states=True)])
        tokens, states, read = tokens + completion.ids + new, completion.states, read + engine.reader.prompt_tokens
    given = 8 * len(new)
    assert given <= read <= given + 7  # each response's last token is read with what follows it


class Talk:
    """Conversations that go on for some turns, each by a few tokens.

    Attributes:
        asked: the number of each completion that was asked about, with the engine's step then.
    """

    def __init__(self, engine, keeps: bool = True, turns: int = 4, wait=lambda: None):
        self.batches, self.keeps, self.turns, self.wait = watch_batches(engine), keeps, turns, wait
        self.asked, self.ended, self.most_kept = [], {}, 0
        new = some_prompts(turns * 30, longest=9, seed=3)
        self.new = {(i, turn): new.pop() for turn in range(1, turns) for i in range(30)}
        self.requests = [Request(p, [i, 0], keep_states=keeps) for i, p in enumerate(some_prompts(30))]
        self.completions, self.new_tokens = {}, sum(len(request.prompt) for request in self.requests)

    def hear(self, i, completion):
        self.completions[tuple(self.requests[i].seed)] = completion
        [batch] = self.batches
        self.ended[i] = batch.steps
        self.most_kept = max(self.most_kept, batch.kept)

    def next(self, i):
        self.wait()
        self.asked.append((i, self.batches[0].steps))
        request, completion = self.requests[i], self.completions[tuple(self.requests[i].seed)]
        place, turn = request.seed
        states, completion.states = completion.states, None
        if turn + 1 == self.turns:
            return None
        tokens = [*request.prompt, *completion.ids, *self.new[place, turn + 1]]
        self.new_tokens += len(tokens) - (states.length if states else 0)
        self.requests.append(Request(tokens, [place, turn + 1], states=states, keep_states=self.keeps))
        return self.requests[-1]


def talk(actor, slots: int = 7, steps: int = 2, prefill_tokens: int = 8192, **options) -> Talk:
    config = GenerationConfig(max_new_tokens=8, temperature=1.0)
    engine = RolloutEngine(actor, config, eos_ids=[EOS, 7, 9], slots=slots, prefill_tokens=prefill_tokens)
    found = Talk(engine, **options)
    completions = engine.generate(found.requests[:], found.hear, FollowUps(found.next, 150, steps))
    assert [c.ids for c in completions] == [found.completions[tuple(r.seed)].ids for r in found.requests]
    assert found.batches[0].kept == 0 and engine.reader.prompt_tokens == found.new_tokens
    return found


@pytest.mark.parametrize("slots", [7, 256])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_turns_that_join_others_on_their_way_are_those_that_are_made_together(actors, family, slots):
    expected, _ = turns_of(actors(family), True, slots)
    for keeps in (True, False):
        found = talk(actors(family), slots, keeps=keeps)
        assert len(found.requests) == 30 * 4 and found.most_kept <= slots
        for (i, turn), completion in found.completions.items():
            assert completion.ids == expected[turn][i].ids
            assert completion.log_probs == pytest.approx(expected[turn][i].log_probs, abs=1e-5)


def test_turns_that_join_are_the_same_a_step_behind(actors, as_on_a_gpu, monkeypatch):
    behind = talk(actors("llama"))
    monkeypatch.undo()
    assert {k: c.ids for k, c in behind.completions.items()} == {
        k: c.ids for k, c in talk(actors("llama")).completions.items()
    }


def test_rows_that_come_back_take_memory_for_few_of_them_at_a_time(actors, monkeypatch):
    copied, restore = [], SlotCache.restore

    def watched(cache, states):
        copied.append((len(states), max(row.length for row in states)))
        restore(cache, states)

    monkeypatch.setattr(SlotCache, "restore", watched)
    few = talk(actors("llama"), 256, prefill_tokens=20)
    assert all(rows == 1 or rows * tokens <= KEPT_SHARE * 20 for rows, tokens in copied)
    copied.clear()
    many = talk(actors("llama"), 256)
    assert max(rows * tokens for rows, tokens in copied) > KEPT_SHARE * 20
    assert all(few.completions[key].ids == completion.ids for key, completion in many.completions.items())


def test_no_bit_of_a_turn_depends_on_how_long_its_environment_takes(actors):
    random = np.random.default_rng(0)
    quick = talk(actors("llama"))
    slow = talk(actors("llama"), wait=lambda: time.sleep(random.uniform(0, 0.004)))
    assert quick.asked == slow.asked and quick.completions == slow.completions


def test_a_turn_is_asked_for_after_enough_steps_or_when_there_is_nothing_else_to_do(actors):
    for steps in (1, 3):
        found = talk(actors("llama"), steps=steps)
        waited = [step - found.ended[i] for i, step in found.asked]
        early = [i for (i, step), n in zip(found.asked, waited, strict=True) if n < steps]
        assert max(waited) <= 2 * steps and len(early) < len(waited) / 4


def test_a_conversation_that_has_begun_comes_before_one_that_has_not(actors):
    order = [found.seed for found in talk(actors("llama")).requests]
    places = [place for place, turn in order[30:] if turn == 3]
    first_begun = {place for place, turn in order[30:60] if turn == 1}
    assert set(places[: len(places) // 3]) <= first_begun and len(first_begun) < 30


def served(actor, prompts, slots, arrive, end_early=(), heads=0, **drawn):
    """Completions by `serve`, of requests that come `arrive` at a time, before every third step.

    Args:
        end_early: numbers of those that are ended after two tokens.
    """
    found = [None] * len(prompts)
    polls = []

    def request(i):
        def on_token(completion):
            found[i] = completion
            return "canceled" if i in end_early and len(completion.ids) == 2 else completion.finish_reason

        return LiveRequest(
            prompts[i], i, 20, heads=heads, on_token=on_token, **{"temperature": 0.0, "top_p": 1.0} | drawn
        )

    waiting = [request(i) for i in range(len(prompts))]

    def poll(free):
        polls.append(free)
        if not waiting:
            return None
        if free < slots and len(polls) % 3:
            return []
        taken = [waiting.pop(0) for _ in range(min(arrive, free, len(waiting)))]
        return taken

    RolloutEngine(actor, GenerationConfig(), eos_ids=[EOS], slots=slots).serve(poll, 40)
    assert min(polls) >= 0 and max(polls) == slots
    return found


@pytest.mark.parametrize("family", ["llama", "bloom", "mistral"])
def test_requests_that_come_while_others_run_get_what_they_get_alone(actors, family):
    actor, prompts = actors(family), some_prompts(30)
    alone = complete(actor, [Request(p, i) for i, p in enumerate(prompts)], temperature=0.0)
    found = served(actor, prompts, 7, 3)
    assert [c.ids for c in found] == [c.ids for c in alone]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
    drawn = complete(actor, [Request(p, i) for i, p in enumerate(prompts)], temperature=1.0)
    found = served(actor, prompts, 5, 2, heads=HEADS, temperature=1.0)
    assert [c.ids for c in found] == [c.ids for c in drawn]
    assert all(len(c.heads) == len(c.ids) and len(c.heads[0][0]) == HEADS for c in found)


def test_a_request_that_is_ended_leaves_its_slot_to_others(actors):
    actor, prompts = actors("llama"), some_prompts(12)
    whole = served(actor, prompts, 2, 2)
    found = served(actor, prompts, 2, 2, end_early={1, 4, 5})
    for i, (one, other) in enumerate(zip(found, whole, strict=True)):
        ended = i in (1, 4, 5) and len(other.ids) > 1
        assert one.ids == (other.ids[:2] if ended else other.ids)
        assert one.finish_reason == ("canceled" if ended else other.finish_reason)
