"""The benchmarks run; what they measure is nothing for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import report
from benchmarks.generation import limits_of
from benchmarks.soak import slope_of
from benchmarks.time_to_reward import curve_of_records, reached
from benchmarks.world import PLAIN, write_real_models
from coati.models import RewardModel

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def run_small(script: str, case: str, rounds: int, *more: str) -> dict:
    """The case's result, of a very small model."""
    command = [sys.executable, f"benchmarks/{script}.py", "--cases", case, "--rounds", str(rounds), "--threads", "1"]
    done = subprocess.run(
        [*command, "--model", json.dumps(SMALL), *more], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])["cases"][case]


@pytest.mark.slow
def test_generation_is_a_contest_with_transformers():
    case = run_small("generation", "fixed-3-2", rounds=2)
    ours, peer = case["contenders"]["coati"], case["contenders"]["transformers, batch 3"]
    assert ours["rate"] > 0 and case["ratios"]["coati"] == ours["rate"] / peer["rate"]
    assert ours["lowest"] <= ours["rate"] <= ours["highest"]


@pytest.mark.slow
def test_streams_of_a_server_are_measured_beside_the_engine():
    command = [sys.executable, "benchmarks/serve.py", "--streams", "3", "--new", "4", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [*command, "--model", json.dumps(SMALL)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    case = json.loads(done.stdout.splitlines()[-1])["cases"]["3-4"]
    rates, first = case["tokens_per_second"], case["seconds_to_first_token"]
    assert min(rates.values()) > 0 and case["ratio"] == rates["server"] / rates["engine"]
    assert 0 < first["median"] <= first["p95"]


@pytest.mark.slow
def test_requests_for_rewards_are_all_answered_and_their_waits_told():
    command = [sys.executable, "benchmarks/serve_rewards.py", "--clients", "2", "--requests", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cases = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert set(cases) == {"exact", "model"}
    for case in cases.values():
        assert case["requests"] == 6 and case["requests_per_second"] > 0
        assert 0 < case["seconds"]["median"] <= case["seconds"]["p99"]


@pytest.mark.slow
def test_how_long_a_judge_is_waited_for_is_compared_with_its_verdicts_alone():
    command = [sys.executable, "benchmarks/judging.py", "--cases", "0.05:8", "--responses", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    case = json.loads(done.stdout.splitlines()[-1])["cases"]["0.05:8"]
    seconds = case["seconds"]
    assert min(seconds[name] for name in ("generate", "alone", "late")) > 0 and seconds["wait"] >= 0
    assert case["hidden"] == 1 - seconds["wait"] / seconds["alone"]


@pytest.mark.slow
def test_turns_that_join_others_are_a_contest_with_those_that_begin_together():
    found = run_small("waiting", "64-small", 1, "--episodes", "6")["contenders"]
    joined, together = found["turns that join"], found["turns together"]
    assert min(joined["rate"], together["rate"]) > 0
    assert all(0 < one["parts"]["busy"] <= one["parts"]["busy or nothing to do"] <= 1 for one in found.values())


def test_lengths_are_those_of_the_issue():
    lengths = limits_of("log-normal")
    assert len(lengths) == 128 and 52 < sum(lengths) / 128 < 64 and max(lengths) <= 256


@pytest.mark.slow
def test_training_is_a_contest_with_a_plain_loop():
    case = run_small("training", "reward-fixed", rounds=3)
    ours, loop = (case["contenders"][name]["rates"] for name in ("coati", "plain loop"))
    assert min(ours) > 0
    assert case["ratios"]["plain loop"] == sorted(a / b for a, b in zip(ours, loop, strict=True))[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ppo-log-normal", "grpo-log-normal"])
def test_responses_are_drawn_as_long_as_the_case_says(case):
    ours = run_small("training", case, rounds=1)["contenders"]["coati"]
    assert ours["rate"] > 0 and min(ours["parts"].values()) > 0


@pytest.mark.slow
def test_a_real_model_is_measured_with_its_own_weights(tmp_path):
    shape = LlamaConfig(**SMALL, vocab_size=1024, tie_word_embeddings=True, max_position_embeddings=1024)
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "base")
    cases = ["dpo-log-normal", "grpo-fixed"]
    command = [sys.executable, "benchmarks/real_model.py", "--model", str(tmp_path / "base"), "--cases", *cases]
    done = subprocess.run(
        [*command, "--rounds", "1", "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])["cases"]
    assert set(found) == set(cases) and all(case["contenders"]["coati"]["rate"] > 0 for case in found.values())


def test_the_models_of_a_benchmark_have_the_weights_of_their_base(tmp_path):
    base = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=64, tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    write_real_models(tmp_path / "world", tmp_path / "base", PLAIN)
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "world" / "policy")
    scorer = RewardModel(str(tmp_path / "world" / "scorer"))
    weights = base.model.state_dict()
    for model in (policy.model, scorer.transformer):
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (policy.config.bos_token_id, policy.config.eos_token_id, policy.config.pad_token_id) == (0, 1, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "world" / "policy")
    assert tokenizer("w0 w59")["input_ids"] == [4, 63]


@pytest.mark.slow
def test_the_gpu_script_measures_on_any_device():
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--shapes", "tiny", "--rounds", "1"]
    command += ["--threads", "1", "--cases", "fixed-2-4", "--parts", "reward", "decode"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["found"]
    assert 0 < found["tiny reward"]["coati"]["mfu"] < 1 and found["tiny reward"]["plain loop"]["mfu"] > 0
    assert 0 < found["tiny fixed-2-4"]["coati"]["bandwidth_share"] < 1


def test_the_page_holds_the_committed_figures():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert report.filled(page, report.read_results()) == page


def contender(rate: float, peak: float) -> dict:
    return {"rate": rate, "lowest": rate, "highest": rate, "cpu_seconds": 1.0, "peak_mib": peak}


def test_the_real_model_is_compared_with_its_quickest_peer():
    slow, quick = contender(5, 100), contender(8, 400)
    of_sft = {"coati": contender(10, 200), "TRL, padded": slow, "TRL, packed": quick, "plain loop": contender(20, 50)}
    ratios = {"TRL, padded": 2.0, "TRL, packed": 1.25, "plain loop": 0.5}
    generated = {"coati": contender(3, 90), "vLLM": contender(2, 60), "transformers, batch 32": contender(1, 60)}
    memory = {"TRL, padded": 2.0, "TRL, packed": 0.5, "plain loop": 4.0}
    result = {"sft-log-normal": {"ratios": ratios, "memory_ratios": memory, "contenders": of_sft}}
    result |= {"fixed-32-64": {"ratios": {"coati": 3.0, "vLLM": 2.0}, "contenders": generated}}
    rows = report.real_targets({"cases": result}).splitlines()[2:]
    assert rows == [
        "| fixed-32-64 | vLLM | 1.00 | 1.50 |  |",
        "| sft-log-normal | TRL, packed | 2.00 | 1.25 | 0.50 |",
    ]


def test_a_target_that_was_not_reached_is_said():
    curves = {"coati": [[0.0, 0.25], [20.0, 0.75], [40.0, 0.5], [60.0, 0.85]], "TRL": [[0.0, 0.25], [60.0, 0.5]]}
    assert report.time_to_reward({"seeds": {"0": {"curves": curves}}}).splitlines()[2:] == [
        "| 0 | coati | 20 | 60 | 25.0% (0), 75.0% (20), 50.0% (40), 85.0% (60) |",
        "| 0 | TRL | not in 60 | not in 60 | 25.0% (0), 50.0% (60) |",
    ]


def test_the_time_to_a_reward_leaves_out_the_evaluations():
    rows = [
        {"step": 0, "time": 100.0, "eval/reward": 0.2},
        {"step": 1, "time": 110.0, "reward": 0.3},
        {"step": 2, "time": 121.0, "reward": 0.4},
    ]
    rows += [{"step": 2, "time": 500.0, "eval/reward": 0.6}, {"step": 3, "time": 505.0, "reward": 0.7}]
    rows += [{"step": 4, "time": 506.0, "reward": 0.7}, {"step": 4, "time": 900.0, "eval/reward": 0.8}]
    curve = curve_of_records(rows)
    assert curve == [(0.0, 0.2), (21.0, 0.6), (27.0, 0.8)]
    assert [reached(curve, target) for target in (0.2, 0.5, 0.8, 0.9)] == [0.0, 21.0, 27.0, None]


def test_the_slope_of_memory_has_an_interval_that_holds_the_true_one():
    noisy = [(step, 100 + 0.02 * step + (step * 7919 % 13 - 6) / 10) for step in range(100, 500)]
    slope, half = slope_of(noisy)
    assert abs(slope - 0.02) < half < 0.002
