"""vLLM as the rollout engine: its responses are the engine's own. `make test-vllm` runs this file where vLLM is."""

import importlib.util
import json
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coati import rollout
from coati.config import configure
from coati.errors import UserError
from coati.models import Actor
from coati.models.lora import LoraSettings
from coati.rollout import FollowUps, GenerationConfig, Request, RolloutEngine
from coati.rollout.remote.weights import load_weights, version_file
from coati.run_layout import JOURNAL, WEIGHTS
from tests.conftest import ROOT, settings_for, trainer_classes
from tests.distributed import runs
from tests.distributed.forks import run_jobs
from tests.models.families import tiny_config

EOS, VOCABULARY = 2, 50
WIDTH = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # a head that vLLM knows


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_a_missing_vllm_is_named_with_its_remedy():
    with pytest.raises(UserError, match="`make test-vllm`"):
        GenerationConfig(rollout_engine="vllm").check_installed()


class SleepyLLM:
    """A `vllm.LLM` on a GPU, as far as it sleeps: it notes what it is asked, and can't work while it sleeps."""

    def __init__(self):
        self.awake, self.calls = {"weights", "kv_cache"}, []
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True, max_model_len=64))

    def wake_up(self, tags):
        self.calls.append(tuple(tags))
        self.awake.update(tags)

    def sleep(self, level):
        assert level == 2
        self.calls.append("sleep")
        self.awake.clear()

    def collective_rpc(self, function, args):
        assert "weights" in self.awake
        self.calls.append("load")

    def reset_prefix_cache(self):
        return True

    def generate(self, prompts, parameters, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append("generate")
        raise KeyError("a failure in the middle")


def test_on_a_gpu_vllm_sleeps_between_batches_and_after_a_failure(monkeypatch):
    from coati.rollout import vllm

    actor, llm = Actor(config=tiny_config("llama", **WIDTH)), SleepyLLM()
    monkeypatch.setattr(vllm, "_start", lambda *arguments: llm)
    monkeypatch.setattr(vllm.VLLMEngine, "parameters", lambda engine, request: None)
    for _ in range(2):
        with pytest.raises(KeyError):
            complete(actor, [Request([5, 6])])
        assert llm.calls == [("weights",), "load", ("kv_cache",), "generate", "sleep"]
        llm.calls.clear()


class TalkingLLM(SleepyLLM):
    """Samples 7 and EOS, whatever it is asked."""

    def generate(self, prompts, parameters, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append([prompt["prompt_token_ids"] for prompt in prompts])
        log_probs = [{token: SimpleNamespace(logprob=-1.0)} for token in (7, EOS)]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7, EOS], logprobs=log_probs)])] * len(prompts)


def test_the_turns_of_a_conversation_share_weights_and_prefix_cache(monkeypatch):
    from coati.rollout import vllm

    actor, llm, told = Actor(config=tiny_config("llama", **WIDTH)), TalkingLLM(), {}
    monkeypatch.setattr(vllm, "_start", lambda *arguments: llm)
    monkeypatch.setattr(vllm.VLLMEngine, "parameters", lambda engine, request: None)
    requests = [Request([5]), Request([6])]

    def following(number):
        if number == 1:  # the second conversation has one turn, the first one has three
            return None
        requests.append(Request([*requests[number].prompt, *told[number].ids, 9]))
        return requests[-1] if number < 3 else None

    engine = vllm.VLLMEngine(actor, GenerationConfig(max_new_tokens=4), eos_ids=[EOS])
    found = engine.generate(requests[:], told.__setitem__, FollowUps(following, 32))
    turns = [[[5], [6]], [[5, 7, EOS, 9]], [[5, 7, EOS, 9, 7, EOS, 9]]]
    assert llm.calls == [("weights",), "load", ("kv_cache",), *turns, "sleep"]
    assert list(told) == [0, 1, 2, 3] and found == list(told.values())
    assert all(c.ids == [7, EOS] and c.finish_reason == "eos" for c in found)


GIB = 2**30


@pytest.mark.parametrize(("free", "fits"), [(12, True), (9, False)])
def test_vllm_takes_what_is_free_beside_the_models_or_says_what_is_missing(free, fits):
    from coati.rollout.vllm import gpu_options

    if not fits:
        with pytest.raises(
            UserError, match=r"needs 2\.0 GiB .* 8\.0 GiB .* and 9\.0 GiB of the GPU are free: lower vllm"
        ):
            gpu_options(free * GIB, 80 * GIB, 2 * GIB, 8 * GIB)
        return
    options = gpu_options(free * GIB, 80 * GIB, 2 * GIB, 8 * GIB)
    assert options["gpu_memory_utilization"] * 80 <= free
    assert options["enable_sleep_mode"] and not options["enforce_eager"]


def test_vllm_computes_in_the_precision_of_autocast():
    from coati.rollout.vllm import vllm_memory, working_dtype

    actor = Actor(config=tiny_config("llama", **WIDTH))
    assert working_dtype(actor) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert working_dtype(actor) == torch.bfloat16
    sizes = [vllm_memory(actor, GenerationConfig(), dtype, True) for dtype in (torch.float32, torch.bfloat16)]
    assert sizes[0]["parameters"] == 2 * sizes[1]["parameters"] and sizes[0]["KV cache"] == 8 * GIB


@pytest.fixture(scope="module")
def vllm(request):
    """Beside the process group of a trainer, as in a run."""
    module = pytest.importorskip("vllm", reason="vLLM is not installed: `make test-vllm`")
    request.getfixturevalue("runtime")
    return module


@pytest.fixture(scope="module")
def actors(vllm):
    def make(family):
        torch.manual_seed(0)
        options = dict(vocab_size=VOCABULARY, initializer_range=0.2, max_position_embeddings=128, **WIDTH)
        return Actor(config=tiny_config(family, **options)).eval()

    made = {family: make(family) for family in ("llama", "qwen3")}
    return made.__getitem__


def some_prompts(count, longest=12, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, VOCABULARY, draw.integers(1, longest + 1)).tolist() for _ in range(count)]


def complete(actor, requests, engine="vllm", eos_ids=(EOS,), stop=None, **options):
    from coati.rollout.vllm import VLLMEngine

    kind = VLLMEngine if engine == "vllm" else RolloutEngine
    config = GenerationConfig(**{"max_new_tokens": 20, **options})
    return kind(actor, config, eos_ids=list(eos_ids), slots=64, stop=stop).generate(requests)


def log_probs_are_the_models(actor, prompts, found, temperature=1.0):
    for prompt, completion in zip(prompts, found, strict=True):
        expected = actor(torch.tensor([prompt + completion.ids]), temperature=temperature)[0, len(prompt) :]
        torch.testing.assert_close(torch.tensor(completion.log_probs), expected.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(repetition_penalty=1.7), dict(min_new_tokens=9)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_is_the_engines_own_token_for_token(actors, family, options):
    actor, prompts = actors(family), some_prompts(50)
    requests = [Request(p, max_new_tokens=10 + i % 9) for i, p in enumerate(prompts)]
    found, expected = (complete(actor, requests, e, temperature=0.0, **options) for e in ("vllm", "coati"))
    assert [(c.ids, c.finish_reason) for c in found] == [(c.ids, c.finish_reason) for c in expected]
    assert "length" in {c.finish_reason for c in found} <= {"eos", "length"}
    log_probs_are_the_models(actor, prompts, found)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=0.7, top_k=5, repetition_penalty=1.3),
        dict(temperature=1.4, top_p=0.8),
        dict(temperature=0.9, min_p=0.1, min_new_tokens=4),
    ],
)
def test_log_probs_are_the_models_at_the_temperature_and_before_top_k(actors, options):
    """Where vLLM's own modes have the temperature only together with top-k, top-p and penalties."""
    actor, prompts = actors("llama"), some_prompts(30)
    found = complete(actor, [Request(p, i) for i, p in enumerate(prompts)], eos_ids=(EOS, 7, 9), **options)
    assert len({len(c.ids) for c in found}) > 3
    log_probs_are_the_models(actor, prompts, found, options["temperature"])


def test_tokens_come_as_often_as_the_engines_own(actors):
    """4,000 first tokens of one prompt, at a temperature and with top-k, against the exact probabilities."""
    actor, options = actors("llama"), dict(temperature=0.7, top_k=4, max_new_tokens=1)
    found = complete(actor, [Request([5, 6, 7], [1, i]) for i in range(4000)], **options)
    logits = actor.transformer(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7
    best = logits.topk(4)
    expected = torch.zeros(VOCABULARY).scatter(0, best.indices, best.values.softmax(0))
    counts = torch.bincount(torch.tensor([c.ids[0] for c in found]), minlength=VOCABULARY)
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.04)


def test_the_same_seed_gives_the_same_response_in_any_batch(actors):
    actor, prompts = actors("qwen3"), some_prompts(20)
    requests = [Request(p, [3, i]) for i, p in enumerate(prompts)]
    together = complete(actor, requests)
    assert [c.ids for c in complete(actor, requests[7:9])] == [c.ids for c in together[7:9]]
    others = complete(actor, [Request(p, [4, i]) for i, p in enumerate(prompts)])
    assert [c.ids for c in others] != [c.ids for c in together]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_changed_weights_are_used_by_the_next_call(vllm, lora):
    """A prompt's keys and values of the old weights, too, are forgotten."""
    torch.manual_seed(1)
    config = tiny_config("llama", vocab_size=VOCABULARY, initializer_range=0.2, tie_word_embeddings=not lora, **WIDTH)
    actor, prompts = Actor(config=config, lora=lora).eval(), [list(range(3, 40)), *some_prompts(9)]
    responses = []
    for _ in range(3):
        found = complete(actor, [Request(p) for p in prompts], temperature=0.0)
        log_probs_are_the_models(actor, prompts, found)
        responses.append([c.ids for c in found])
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    assert responses[0] != responses[1] != responses[2]


def test_a_stop_ends_a_response_after_the_token_that_says_so(actors):
    actor, prompts = actors("llama"), some_prompts(30)
    requests = [Request(p, i) for i, p in enumerate(prompts)]
    asked = []

    def stop(responses):
        asked.extend(responses)
        return [ids[-1] % 10 == 3 for ids in responses]

    free, found = complete(actor, requests), complete(actor, requests, stop=stop)
    for whole, cut in zip(free, found, strict=True):
        ends = [n for n, token in enumerate(whole.ids, 1) if token % 10 == 3]
        assert cut.ids == whole.ids[: ends[0] if ends else None] and len(cut.log_probs) == len(cut.ids)
        assert cut.finish_reason == ("stop" if ends else whole.finish_reason)
    assert asked and {c.finish_reason for c in found} >= {"stop", "eos"}


def test_random_numbers_threads_and_variables_of_training_are_left_alone(vllm):
    actor = Actor(config=tiny_config("llama", **WIDTH)).eval()

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)

    before, set_num_threads, threads = state(), torch.set_num_threads, torch.get_num_threads()
    complete(actor, [Request([5, 6])])
    assert state() == before
    assert torch.set_num_threads is set_num_threads and torch.get_num_threads() == threads


def test_what_vllm_can_not_do_is_named(actors):
    actor = actors("llama")
    with pytest.raises(UserError, match="prompt 1 is empty"):
        complete(actor, [Request([3]), Request([])])
    with pytest.raises(UserError, match="may have 130 tokens, and vLLM's KV cache holds 128"):
        complete(actor, [Request([3], max_new_tokens=129)])
    with pytest.raises(UserError, match="leave out num_beams"):
        GenerationConfig(rollout_engine="vllm", num_beams=2).check_installed()
    assert complete(actor, []) == []


def test_a_model_that_vllm_does_not_run_is_named(vllm):
    with pytest.raises(UserError, match="does not support this LlamaForCausalLM"):
        complete(Actor(config=tiny_config("llama")).eval(), [Request([3])])


def settings_with_vllm(algorithm: str, world, folder) -> dict:
    """Settings of two iterations on a model whose heads vLLM knows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world["tokenizer"])
    torch.manual_seed(3)
    policy = folder / "policy"
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=128, **WIDTH)
    Actor(config=tiny_config("llama", **sizes)).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    options = dict(model=str(policy), rollout_engine="vllm", steps=2, temperature=1.0, output_dir=str(folder / "run"))
    return settings_for(algorithm, world, **options)


@pytest.mark.parametrize("changes", [dict(temperature=0.8), dict(lora_rank=2), dict(shared_trunk=True, stop=["red"])])
def test_ppo_samples_with_vllm_as_it_trains(vllm, tiny_world, runtime, tmp_path, changes):
    from coati.tracking import read_metrics

    config_class, trainer_class = trainer_classes("ppo")
    settings = settings_with_vllm("ppo", tiny_world, tmp_path) | changes
    trainer_class(configure(config_class, **settings), runtime).train()
    rows = [row for row in read_metrics(tmp_path / "run") if "rollout_kl" in row]
    assert len(rows) == 2 and all(0 <= row["rollout_kl"] < 1e-5 for row in rows)


def test_episodes_are_played_with_vllm(vllm, tiny_world, runtime, tmp_path):
    """In turns of several, some of which go on when others have ended, on what vLLM has read before."""
    from coati.tracking import read_metrics

    config_class, trainer_class = trainer_classes("ppo")
    talk = dict(environment=f"{ROOT / 'tests' / 'talk.py'}:Talk", max_turns=4, max_tokens=120, stop=["e", "o"])
    settings = settings_with_vllm("ppo", tiny_world, tmp_path) | talk | dict(rewards=[])
    trainer_class(configure(config_class, **settings), runtime).train()
    rows = [row for row in read_metrics(tmp_path / "run") if "rollout_kl" in row]
    assert len(rows) == 2 and all(0 <= row["rollout_kl"] < 1e-5 for row in rows)
    assert all(row["environment/failed"] == 0 and 1 < row["environment/turns"] <= 3 for row in rows)


def test_each_process_has_a_vllm_of_its_own(vllm, tiny_world, tmp_path):
    """Greedy responses and the training on them are those of coati's engine, rank by rank."""
    settings = settings_with_vllm("ppo", tiny_world, tmp_path) | dict(temperature=0.0, plugin="zero2")
    names = ("coati", "vllm")
    jobs = [
        {
            "name": name,
            "algorithm": "ppo",
            "settings": settings | dict(rollout_engine=name, output_dir=str(tmp_path / name)),
        }
        for name in names
    ]
    found = run_jobs(jobs, tmp_path, 2)
    for metric in ("reward", "response_length", "policy_loss", "value_loss"):
        expected, with_vllm = ([step[metric] for step in found[name]["steps"]] for name in names)
        assert with_vllm == pytest.approx(expected, rel=1e-3, abs=1e-4), metric
    assert max(step["rollout_kl"] for step in found["vllm"]["steps"]) < 1e-5


@pytest.mark.parametrize("ahead", [dict(max_staleness=1), dict(max_staleness=2, partial_rollouts=True)])
def test_generators_sample_with_vllm(ahead, vllm, tiny_world, tmp_path):
    """GRPO with two generators: samples are of the versions that the schedule says, with the log-probs of these
    versions' weights, and a second run has the same samples."""
    from coati.tracking import read_metrics

    journals = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        settings = settings_with_vllm("grpo", tiny_world, folder) | dict(steps=4) | ahead
        process = runs.start("coati", f"{ROOT / 'examples' / 'train_grpo.py'}", settings, folder, 1, generators=2)
        assert process.wait(1500) == 0, (folder / "log.txt").read_text()[-4000:]
        assert not runs.processes_of(folder)
        files = sorted((folder / "run" / JOURNAL).glob("*/*.jsonl"))
        journals.append([[json.loads(line) for line in path.read_text().splitlines()[:-1]] for path in files])
    logged = [row for row in read_metrics(tmp_path / "first" / "run") if "rollout_kl" in row]
    staleness = [row["staleness"] for row in logged]
    assert staleness == [0, 1, 1, 1] if ahead["max_staleness"] == 1 else staleness[0] == 0 and 1 < staleness[3] < 2
    assert logged[0]["rollout_kl"] < 1e-5 < logged[3]["rollout_kl"]

    assert [header["version"] for header, *_ in journals[0]] == [0, 0, 1, 2]
    header, *samples = journals[0][-1]
    policy = Actor(str(tmp_path / "first" / "policy")).eval()
    load_weights(policy, version_file(tmp_path / "first" / "run" / WEIGHTS, 2), header["weights"])
    for sample in samples:
        assert sample["weights_version"] == 2
        mask = torch.tensor(sample["response_mask"])
        expected = policy(torch.tensor([sample["tokens"]]))[0][mask].detach()
        torch.testing.assert_close(torch.tensor(sample["log_probs"])[mask], expected, rtol=0, atol=1e-4)
    tokens = [[[sample["tokens"] for sample in samples] for _, *samples in journal] for journal in journals]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("changes", [dict(plugin="gemini"), dict(tensor_parallel=2)])
def test_sharded_models_are_refused(vllm, tiny_world, changes):
    config_class, _ = trainer_classes("ppo")
    with pytest.raises(UserError, match="--rollout_engine coati"):
        configure(config_class, **settings_for("ppo", tiny_world, rollout_engine="vllm", **changes))


def test_generate_takes_it_from_the_settings(actors):
    config = GenerationConfig(rollout_engine="vllm", max_new_tokens=6, temperature=0.0)
    requests = [Request(prompt) for prompt in some_prompts(5)]
    found = rollout.complete(actors("llama"), requests, config, eos_ids=[EOS])
    config.rollout_engine = "coati"
    expected = rollout.complete(actors("llama"), requests, config, eos_ids=[EOS])
    assert [completion.ids for completion in found] == [completion.ids for completion in expected]
