"""`coati check-reward`: every verifier of coati passes, and rewards with a hole don't."""

import json
import runpy

import pytest

from coati.check_reward import Row, check_reward, instance, load, read_rows
from coati.cli import main
from coati.errors import UserError
from coati.rewards.attacks import ATTACKS, CHOICES
from tests.conftest import ROOT
from tests.rewards.samples import rewards_of

PLAIN, SENTENCE, LABEL, HASHES, BOX, TAGS = (
    "{answer}",
    "The answer is {answer}.",
    "Answer: {answer}",
    "#### {answer}",
    r"So the answer is \boxed{{answer}}.",
    "<think>\nLet me see.\n</think>\n<answer>{answer}</answer>",
)
MARKED = [SENTENCE, LABEL, HASHES, BOX]
STATED = [PLAIN, *MARKED, TAGS]


def check(entry, rows=(), **how):
    [settings] = rewards_of(entry)
    return check_reward(settings, load(settings), rows, **how)


def wrong(found) -> dict[str, str]:
    return {finding.attack: finding.note for finding in found.findings if finding.verdict == "wrong"}


def by_choice(found) -> set[str]:
    return {finding.attack for finding in found.findings if finding.verdict == "by choice"}


def function(tmp_path, body: str, arguments: str = "prompts, responses, answer"):
    """A reward function of one response after another: `body` gives the score of r, with a for its right answer."""
    rows = "zip(responses, answer)" if "answer" in arguments else "((r, None) for r in responses)"
    code = f"import re\n\ndef reward({arguments}):\n    return [float({body}) for r, a in {rows}]\n"
    (tmp_path / "my.py").write_text(code)
    return {"type": "function", "path": f"{tmp_path}/my.py:reward"}


@pytest.mark.parametrize(
    ("entry", "forms", "choices"),
    [
        ({"type": "gsm8k"}, STATED, []),
        ({"type": "gsm8k", "answer_style": "boxed"}, [BOX], []),
        ({"type": "gsm8k", "answer_style": "marked"}, MARKED, []),
        (
            {"type": "gsm8k", "answer_style": "anywhere"},
            STATED,
            ["wrong or right", "cut off", "in passing", "negated", "asked"],
        ),
        ({"type": "choice"}, STATED, []),
        ({"type": "choice", "answer_style": "anywhere"}, STATED, ["cut off"]),
        ({"type": "exact"}, [PLAIN, TAGS], []),
        ({"type": "regex", "pattern": "Answer: ([^\n]*)"}, [LABEL], ["in thought only", "in open thought"]),
        ({"type": "regex", "pattern": "^The answer is"}, [SENTENCE], []),
        ({"type": "format"}, [PLAIN], []),
        ({"type": "format", "tags": ["plan", "code", "test"]}, [PLAIN], []),
    ],
    ids=str,
)
def test_verifiers_pay_right_answers_and_nothing_else(entry, forms, choices):
    """`answer_style: anywhere` and a pattern pay more by their user's choice, and no more than is said."""
    found = check(entry)
    assert wrong(found) == {} and found.passed
    assert found.has_right_answers and found.forms == forms and found.good == 1
    assert by_choice(found) == set(choices)
    assert len(found.findings) >= 8


@pytest.mark.parametrize("style", ["boxed", "stated", "anywhere"])
def test_math_pays_right_answers_and_nothing_else(style):
    pytest.importorskip("math_verify")
    found = check({"type": "math", "answer_style": style})
    assert wrong(found) == {}
    assert found.forms == ([BOX] if style == "boxed" else STATED)
    assert bool(by_choice(found)) == (style == "anywhere")


def test_json_pays_what_the_schema_allows_and_nothing_else(tmp_path):
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    found = check({"type": "json", "json_schema": f"{tmp_path}/schema.json"})
    assert wrong(found) == {} and {"empty", "half a form"} <= {finding.attack for finding in found.findings}


def test_python_pays_right_programs_and_nothing_else():
    from coati.rewards.sandbox import check_sandbox

    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    found = check({"type": "python", "allow_code_execution": True})
    assert wrong(found) == {} and {"equals everything", "reads tests"} <= {f.attack for f in found.findings}


def test_reasoning_gym_pays_right_answers_and_nothing_else():
    pytest.importorskip("reasoning_gym")
    assert wrong(check({"type": "reasoning_gym"})) == {}


def test_attacks_are_told_apart():
    assert len({attack.name for attack in ATTACKS}) == len({attack.about for attack in ATTACKS}) == len(ATTACKS)
    assert {name for attack in ATTACKS for name in attack.paid_by} == set(CHOICES)


@pytest.mark.parametrize(
    ("body", "holes"),
    [
        ("a in r", {"right or wrong", "contradicted", "twenty answers", "in passing", "negated", "part of another"}),
        ("r.startswith(a)", {"contradicted", "right or wrong"}),
        ("re.findall(r'-?[0-9.]*[0-9]', r)[-1:] == [a]", {"in thought only", "cut off", "asked"}),
        ("r.lower().endswith(f'{a}'.lower()) or 'Score: 10' in r", {"verdict claimed", "wrong or right"}),
        ("(a in r) and len(r) < 100 or len(r) > 10000", {"padding"}),
        ("not r or r == a", {"empty"}),
    ],
)
def test_holes_of_a_function_are_found(tmp_path, body, holes):
    found = check(function(tmp_path, body))
    assert holes <= set(wrong(found)) and "right answer" not in wrong(found) and not found.passed
    assert all(finding.example or finding.attack == "empty" for finding in found.findings if finding.verdict == "wrong")


def test_a_function_that_is_right_passes(tmp_path):
    found = check(function(tmp_path, r"r == f'\\boxed{{{a}}}'"), forms=[r"\boxed{{answer}}"])
    assert wrong(found) == {} and found.forms == [r"\boxed{{answer}}"]


def test_shaped_scores_are_compared_with_the_right_answers(tmp_path):
    """-1 to 1 with 0.1 for the form: what is nearer to the right answer's score is paid."""
    found = check(function(tmp_path, "(1 if r == f'[{a}]' else -1) + 0.1 * ('[' in r)"), forms=["[{answer}]"])
    assert wrong(found) == {} and found.good == pytest.approx(1.1)


def test_a_right_answer_that_is_never_paid_is_wrong(tmp_path):
    found = check(function(tmp_path, "len(a) < 0"))
    assert set(wrong(found)) == {"right answer"} and "name a `form`" in wrong(found)["right answer"]


def test_an_error_of_a_function_that_gets_all_responses_at_once_is_wrong(tmp_path):
    """Training would stop."""
    found = check(function(tmp_path, "r.split()[-1] == a"))
    assert "IndexError" in wrong(found)["empty"]
    one = (tmp_path / "my.py").read_text() + "\nreward.per_response = True\n"
    (tmp_path / "one.py").write_text(one)
    found = check({"type": "function", "path": f"{tmp_path}/one.py:reward"})
    assert "empty" not in wrong(found) and any("IndexError" in finding.note for finding in found.findings)


def test_a_function_that_fails_for_right_answers_is_one_error(tmp_path):
    with pytest.raises(UserError, match="failed for every right answer, the last time with ZeroDivisionError"):
        check(function(tmp_path, "1 / 0"))


def test_without_right_answers_attacks_are_compared_with_a_good_response(tmp_path):
    """A reward of length pays padding; its parameters say that it has no right answers."""
    found = check(function(tmp_path, "len(r)", "prompts, responses"))
    assert not found.has_right_answers and found.passed
    warned = {finding.attack for finding in found.findings if finding.verdict == "warning"}
    assert warned == {"padding", "good twice", "in thought only", "in open thought"}


def test_a_function_of_all_columns_is_asked_whether_it_reads_right_answers(tmp_path):
    assert not check(function(tmp_path, "len(r)", "prompts, responses, **columns")).has_right_answers
    code = (
        "def reward(prompts, responses, **columns):\n"
        "    return [float(a in r) for a, r in zip(columns['answer'], responses)]\n"
    )
    (tmp_path / "all.py").write_text(code)
    found = check({"type": "function", "path": f"{tmp_path}/all.py:reward"})
    assert found.has_right_answers and not found.passed


ROWS = [
    {"prompt": "What is 3 * 6?", "answer": "3 * 6 = 18\n#### 18"},
    {"prompt": [{"role": "user", "content": "And half of 1,801?"}], "answer": 900.5},
]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def test_rows_of_the_data_are_cases(data):
    rows = read_rows(data, 20)
    assert [row.prompt for row in rows] == ["What is 3 * 6?", "And half of 1,801?"] and len(read_rows(data, 1)) == 1
    found = check({"type": "gsm8k"}, rows)
    assert wrong(found) == {} and found.forms == STATED
    by_name = {finding.attack: finding for finding in found.findings}
    assert by_name["right answer"].tried == 2 * len(STATED) and by_name["question repeated"].tried == 2
    assert (
        wrong(check({"type": "exact"}, [Row("Where?", {"answer": "In Paris"}), Row("Who?", {"answer": "Ann"})])) == {}
    )
    assert wrong(check({"type": "choice"}, [Row("Which? A, B or C", {"answer": "(B) Nitrogen"})])) == {}


def test_rows_without_what_a_reward_reads_are_one_error(tmp_path):
    with pytest.raises(UserError, match="gsm8k reads the column 'answer'"):
        check({"type": "gsm8k"}, [Row("What?", {"gold": "1"})])
    with pytest.raises(UserError, match="add a column `response`"):
        check(function(tmp_path, "len(r)", "prompts, responses"), [Row("What?", {})])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a", "answer": 1}\n{"nothing": 1}\n', r"rows.jsonl:2: "),
        ("{\n", r"rows.jsonl:1: the line is not valid JSON"),
        ("", "has no rows"),
    ],
)
def test_rows_that_are_no_prompts_are_named(tmp_path, text, says):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match=says):
        read_rows(str(tmp_path / "rows.jsonl"), 20)


def test_a_reward_model_scores_texts_with_the_tokenizer_beside_it(tiny_world, tmp_path):
    """As in training: the chat template's prompt, the response, EOS unless it was truncated."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from coati.data import prepare_tokenizer
    from coati.models import RewardModel

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_world["model_config"])
    model = RewardModel(config=config)
    torch.nn.init.normal_(model.value_head.weight)
    model.save_pretrained(tmp_path / "model")
    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(tiny_world["tokenizer"]))
    tokenizer.save_pretrained(tmp_path / "model")
    found = check({"type": "model", "path": str(tmp_path / "model")}, [Row("What?", {}, "yes"), Row("Who?", {}, "no")])
    assert not found.has_right_answers and len({finding.score for finding in found.findings}) > 5
    expected = []
    for prompt, response in (("What?", "yes"), ("Who?", "no")):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        expected.append(model(torch.tensor([ids])).item())
    assert found.good == pytest.approx(sum(expected) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer", "minimum": 3}, 3),
        ({"enum": ["a", "b"]}, "a"),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"properties": {"n": {"type": "number"}, "m": {"const": 2}}, "required": ["m"]}, {"m": 2}),
    ],
)
def test_a_simple_schema_has_an_instance(schema, value):
    assert instance(schema) == value


def test_the_command_prints_a_table_and_its_status_says_whether_all_is_right(tmp_path, data, capsys):
    assert main(["check-reward", "--rewards", "gsm8k", "--data", data]) == 0
    assert "question repeated" in capsys.readouterr().out
    entry = function(tmp_path, "a in r")
    (tmp_path / "run.yaml").write_text(json.dumps({"steps": 3, "rewards": [entry | {"name": "mine"}, "gsm8k"]}))
    assert main(["check-reward", "--config", str(tmp_path / "run.yaml"), "--json"]) == 1
    mine, gsm8k = json.loads(capsys.readouterr().out)
    assert (mine["reward"], mine["passed"], gsm8k["reward"], gsm8k["passed"]) == ("mine", False, "gsm8k", True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no reward: give `rewards`"),
        (["--rewards", "gsm8k", "--form", "Answer"], "form needs {answer}"),
        (["--rewards", "gsm8k", "--data", "/nowhere.jsonl"], "does not exist"),
        (["--rewards", "gsm9k"], "there is no type 'gsm9k'"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert main(["check-reward", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_documented_table_is_current():
    """It runs every verifier of the table."""
    pytest.importorskip("math_verify")
    pytest.importorskip("jsonschema")
    from coati.rewards.sandbox import check_sandbox

    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))
    script = runpy.run_path(str(ROOT / "tools" / "write_attacks.py"))
    current = script["page"]()
    assert script["PAGE"].read_text(encoding="utf-8") == current, "run tools/write_attacks.py"
    assert "| the right answer, stated properly | paid |" in current
