"""Answers against slow computations without batches, caches or shared beginnings."""

import math
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coati.errors import UserError
from coati.rollout.engine.reader import SHORTEST_PREFIX
from colossal_eval.benchmarks.benchmark_settings import TaskOptions
from colossal_eval.prepare import PrepareConfig, prepare
from colossal_eval.run.log_probs import BatchLimits, TokenRow, plan_batches
from colossal_eval.run.question_records import run_benchmark
from colossal_eval.run.response_store import ResponseStore
from colossal_eval.run.task_yaml import load_tasks, write_tasks
from colossal_eval.scores.metrics import mean
from tests.applications.colossal_eval.conftest import DATA, make_model

LETTERS = "ABCD"


def run(lm, benchmark, prepared, tmp_path, limit=None, **options):
    """Records by id, and lm-eval's results."""
    write_tasks(benchmark, prepared, tmp_path / "tasks", TaskOptions(**options))
    records, results = run_benchmark(lm, tmp_path / "tasks", benchmark, limit)
    return {record["id"]: record for record in records}, results


def oracle(folder, prompt: str, labels=LETTERS) -> list[float]:
    """log (p("A") + p(" A")) and so on after the prompt: one forward, the last position, plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).tolist()
    found = []
    for label in labels:
        tokens = set()
        for text in (label, " " + label):
            whole = tokenizer(prompt + text)["input_ids"]
            assert whole[:-1] == ids
            tokens.add(whole[-1])
        found.append(math.log(sum(math.exp(log_probs[token]) for token in tokens)))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data sets are not at {DATA}")
@pytest.mark.parametrize("name", ["mmlu", "cmmlu", "agieval", "gaokao_bench"])
def test_the_shared_data_has_the_log_probs_of_a_plain_forward(name, runtime, harness, tmp_path):
    """The first questions of each subject. And a random model scores what guessing does."""
    prepare(PrepareConfig(benchmark=name, data=str(DATA / name), output=str(tmp_path / "data")))
    lm = harness("long", make_model(tmp_path / "long", 5, length=32768))
    records, _ = run(lm, name, tmp_path / "data", tmp_path, limit=4, methods=["first_token"])
    prompts = prompts_of(name, tmp_path / "data", tmp_path, shots=0 if name == "gaokao_bench" else 5)
    scored = [record for record in records.values() if record["kind"] == "single_choice"]
    for record in scored:
        expected = oracle(tmp_path / "long", prompts[record["id"]], record["labels"])
        assert record["log_probs"] == pytest.approx(expected, abs=1e-4)  # weights this large round in the fifth place
        assert int(np.argmax(record["log_probs"])) == int(np.argmax(expected))
    score = mean([record["scores"]["first_token"] for record in scored])
    assert abs(score.value - mean([record["random"] for record in scored]).value) <= 3 * score.stderr


def prompts_of(benchmark, prepared, tmp_path, shots=5) -> dict[str, str]:
    write_tasks(benchmark, prepared, tmp_path / "prompts", TaskOptions())
    tasks = load_tasks(tmp_path / "prompts", benchmark)["tasks"].values()
    return {doc["id"]: task.fewshot_context(doc, shots) for task in tasks for doc in task.eval_docs}


@pytest.mark.parametrize("name, tokens", [("first", None), ("first", 64), ("sliding", None)])
def test_every_question_has_the_log_probs_of_a_plain_forward(name, tokens, tiny, harness, prepared, tmp_path):
    lm = harness(name, batch_tokens=tokens)
    records, _ = run(lm, "mmlu", prepared, tmp_path)
    assert len(records) == 12
    assert lm.scorer.shares_prefix == (name != "sliding")
    picks = set()
    for id, prompt in prompts_of("mmlu", prepared, tmp_path).items():
        expected = oracle(tiny[name], prompt)
        assert records[id]["log_probs"] == pytest.approx(expected, abs=1e-5)
        picks.add(int(np.argmax(expected)))
        assert int(np.argmax(records[id]["log_probs"])) == int(np.argmax(expected))
        assert records[id]["scores"]["first_token"] == float(
            LETTERS[int(np.argmax(expected))] in records[id]["answers"]
        )
    assert len(picks) > 1, "a model that always gives one letter shows little"


def test_lm_evals_own_model_gives_the_same_scores(tiny, harness, prepared, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    ours, results = run(harness(), "mmlu", prepared, tmp_path)
    theirs = HFLM(pretrained=str(tiny["first"]), device="cpu", batch_size=4, add_bos_token=False)
    other = evaluate(theirs, load_tasks(tmp_path / "tasks", "mmlu"), bootstrap_iters=1)
    assert results["results"]["mmlu"]["first_token,none"] == other["results"]["mmlu"]["first_token,none"]
    for task, samples in other["samples"].items():
        for sample in samples:
            found = [log_prob for log_prob, _ in sample["filtered_resps"]]
            pairs = [math.log(math.exp(a) + math.exp(b)) for a, b in zip(found[::2], found[1::2], strict=True)]
            assert ours[sample["doc"]["id"]]["log_probs"] == pytest.approx(pairs, abs=1e-5), task


def test_groups_are_weighted_by_size(harness, prepared, tmp_path):
    records, results = run(harness(), "mmlu", prepared, tmp_path)
    right = [record["scores"]["first_token"] for record in records.values()]
    assert results["results"]["mmlu"]["first_token,none"] == pytest.approx(sum(right) / len(right))
    assert results["results"]["mmlu"]["first_token_stderr,none"] > 0


def test_a_question_costs_its_own_tokens_and_the_examples_once(harness, prepared, tmp_path):
    lm = harness()
    records, _ = run(lm, "mmlu", prepared, tmp_path)
    lengths = {
        id: len(lm.prompt_tokenizer.encode(prompt)) for id, prompt in prompts_of("mmlu", prepared, tmp_path).items()
    }
    per_question = lm.scorer.usage.read / len(records)
    assert per_question < 0.4 * sum(lengths.values()) / len(lengths)


@pytest.mark.parametrize("name", ["first", "sliding"])
def test_generation_is_that_of_transformers(name, tiny, harness, prepared, tmp_path):
    from transformers import AutoModelForCausalLM

    lm = harness(name)
    records, _ = run(lm, "gsm8k", prepared, tmp_path, shots=1, max_new_tokens=12)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny[name]), lm.loaded.tokenizer
    lengths = set()
    for id, prompt in prompts_of("gsm8k", prepared, tmp_path, shots=1).items():
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=2)[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        for stop in ("\n\n", "Question:", "题目："):
            text = text.split(stop)[0]
        assert records[id]["text"] == text
        assert records[id]["scores"]["exact_match"] == 0.0
        lengths.add(ids.shape[1])
    assert len(lengths) > 1, "prompts of one length show nothing about padding"


def test_choices_are_compared_by_perplexity(tiny, harness, prepared, tmp_path):
    from transformers import AutoModelForCausalLM

    lm = harness()
    records, _ = run(lm, "mmlu", prepared, tmp_path, shots=0, methods=["first_token", "choice_perplexity"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny["first"]), lm.loaded.tokenizer
    for i in range(6):
        prompt = f"The following are multiple choice questions (with answers) about anatomy.\n\nQuestion: What is {3 * i} + {i % 4} in anatomy?\nAnswer:"  # noqa: E501
        perplexities = []
        for choice in range(3 * i, 3 * i + 4):
            start, ids = (tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {choice}"))
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            chosen = [float(log_probs[t - 1, ids[t]]) for t in range(len(start), len(ids))]
            perplexities.append(math.exp(-sum(chosen) / len(chosen)))
        scores = records[f"anatomy/test/{i}"]["scores"]
        assert scores["choice_perplexity"] == float(int(np.argmin(perplexities)) == i % 4)
        assert set(scores) == {"first_token", "choice_perplexity"}


def test_whole_texts_are_read_in_windows(tiny, harness):
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM

    lm = harness()
    lm.prompt_tokenizer.max_length = 40
    text = "What is 12 + 3 in anatomy? " * 12
    request = Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))
    [found] = lm.loglikelihood_rolling([request])
    model, ids, total = AutoModelForCausalLM.from_pretrained(tiny["first"]), lm.prompt_tokenizer._plain(text), 0.0
    for start in range(0, len(ids), 39):
        part = list(ids[start : start + 39])
        # the last window is as long as the others
        before = [1] if start == 0 else list(ids[max(0, start - (40 - len(part))) : start])
        with torch.no_grad():
            log_probs = model(torch.tensor([before + part])).logits[0].log_softmax(-1)
        total += sum(float(log_probs[len(before) + t - 1, token]) for t, token in enumerate(part))
    assert found == pytest.approx(total, abs=1e-3)


def test_questions_that_never_fit_score_0_and_are_counted(harness, prepared, tmp_path):
    records, _ = run(harness("short", max_length=40), "mmlu", prepared, tmp_path)
    assert {record["fits"] for record in records.values()} == {False}
    assert {record["scores"]["first_token"] for record in records.values()} == {0.0}


def test_batches_are_halved_when_memory_runs_out(harness, prepared, tmp_path, monkeypatch):
    expected, _ = run(harness(), "mmlu", prepared, tmp_path)
    lm = harness()
    lm.store = ResponseStore(tmp_path / "others")
    whole = lm.scorer._score

    def too_much(rows, prefix):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no more")
        return whole(rows, prefix)

    monkeypatch.setattr(lm.scorer, "_score", too_much)
    records, _ = run(lm, "mmlu", prepared, tmp_path)
    for id, record in records.items():
        assert record["log_probs"] == pytest.approx(expected[id]["log_probs"], abs=1e-5)
    monkeypatch.setattr(lm.scorer, "_score", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    lm.store = ResponseStore(tmp_path / "third")
    with pytest.raises(UserError, match="does not fit into the memory"):
        run(lm, "mmlu", prepared, tmp_path)


rows = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(1, 2)),
    min_size=1,
    max_size=30,
)


@given(rows, st.integers(1, 100), st.booleans(), st.booleans())
def test_a_plan_reads_every_row_once_within_the_budget(drawn, tokens, sharing, batching):
    drawn = sorted(drawn, key=lambda row: row[0])
    made = [TokenRow(np.array([7] * 20 * (task > 0) + ids, np.int32), count, ()) for task, ids, count in drawn]
    groups = [[i for i, _ in g] for _, g in groupby(enumerate(drawn), key=lambda item: item[1][0])]
    room = BatchLimits(tokens, 10, sharing, batching)
    batches = plan_batches(made, groups, room)
    assert sorted(i for batch in batches for i in batch.rows) == list(range(len(made)))
    for batch in batches:
        lengths = [len(made[i].ids) for i in batch.rows]
        assert len(batch.rows) == 1 or len(batch.rows) * (max(lengths) - batch.prefix) <= tokens
        assert all(batch.prefix <= len(made[i].ids) - made[i].count for i in batch.rows)
        assert len({tuple(made[i].ids[: batch.prefix]) for i in batch.rows}) == 1
        assert len({drawn[i][0] for i in batch.rows}) == 1
        assert sharing or batch.prefix == 0
        assert batching or len(batch.rows) == 1
    # neither the order within a task nor a neighbor of another task changes who is read together
    turned = plan_batches(made, [group[::-1] for group in groups], room)
    lengths = [[len(made[i].ids) for i in batch.rows] for batch in batches]
    assert [[len(made[i].ids) for i in batch.rows] for batch in turned] == lengths


@given(st.lists(st.lists(st.integers(0, 1), max_size=8), min_size=2, max_size=5, unique_by=tuple), st.integers(1, 3))
def test_the_beginning_that_is_read_once_is_the_longest_before_what_is_scored(lists, count):
    lists = [[7] * (SHORTEST_PREFIX + 1) + ids for ids in lists]
    made = [TokenRow(np.array([*ids, *[9] * (count - 1)], np.int32), count, ()) for ids in lists]
    [n] = {batch.prefix for batch in plan_batches(made, [list(range(len(made)))], BatchLimits(10_000, 10))}
    assert len({tuple(ids[:n]) for ids in lists}) == 1
    assert any(len(ids) == n + 1 for ids in lists) or len({ids[n] for ids in lists}) > 1
