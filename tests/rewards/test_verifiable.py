"""Rewards by rule: what each reads as the answer, what it takes for right, and which settings it refuses."""

import json
import time
import unicodedata
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.config import configure
from coati.errors import UserError
from coati.rewards.answers import extract_number
from coati.rewards.config import MathRewardSettings, ScoringConfig, load_rewards
from coati.rewards.verifiable import GSM8KVerifier, fenced, final_part, normalize
from coati.trainers.config import GRPOConfig, PPOConfig
from tests.conftest import ROOT
from tests.rewards.samples import make_verifier, samples


def verdict(
    name: str, response: str, answer="", prompt: str = "", settings: dict | None = None, cut: bool = False, **row
) -> float:
    """What a verifier gives a response, which `cut` says was cut at its greatest length."""
    verifier = make_verifier(name, **settings or {})
    columns = {key: [value] for key, value in {"answer": answer, **row}.items()}
    [score] = verifier.score(samples([prompt], [response], "length" if cut else "eos", **columns))
    return score


def check(name: str, table: list[tuple], **settings):
    """The rows of a table that come out wrong: (response, answer, expected score)."""
    wrong = [row for row in table if verdict(name, row[0], row[1], settings=settings) != row[2]]
    assert wrong == []


def test_math_answers():
    pytest.importorskip("math_verify")
    check(
        "math",
        [
            (r"So it is $\frac{1}{2}$.", "1/2", 1),
            (r"\boxed{0.5}", r"\frac12", 1),
            (r"The answer is \boxed{\frac{2}{4}}", r"$\frac12$", 1),
            (r"\boxed{\frac{1}{3}}", r"\frac12", 0),
            ("18", "Thus 9 * 2 = <<9*2=18>>18\n#### 18", 1),
            (r"So \boxed{3}. Wait, I must " + "take what was left and add it once more, " * 3 + r"\boxed{4}", "4", 1),
            (r"\boxed{1} and \boxed{2}", r"\{1, 2\}", 1),
            (r"\boxed{5\text{ cm}}", "5", 1),
            (r"\boxed{5}", r"5 \text{ cm}", 1),
            (r"\boxed{1{,}234}", "1234", 1),
            (r"\boxed{3\sqrt{2}}", r"\sqrt{18}", 1),
            (r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
            (r"\boxed{\{1,2\}}", r"\{2,1\}", 1),
            (r"\boxed{50\%}", r"\frac{1}{2}", 1),
            (r"<think>\boxed{7}</think><answer>8</answer>", "8", 1),
            ("18", "$18", 1),
            ("I don't know", "8", 0),
            ("", "8", 0),
            ("9", ["8", "9"], 1),
        ],
    )


@pytest.mark.parametrize(("right", "seconds"), [("7", 0), (r"\sqrt{7}", 1)])
def test_math_that_takes_for_ever_is_wrong_in_seconds(monkeypatch, right, seconds):
    """Where the right answer is a number, no algebra is done at all."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr("coati.rewards.verifiable.SECONDS_OF_ALGEBRA", 1)
    started = time.monotonic()
    assert verdict("math", r"\boxed{2^{99999999999}}", right) == 0
    assert seconds <= time.monotonic() - started < 10


def test_gsm8k_answers():
    check(
        "gsm8k",
        [
            ("Steps.\n#### 18", "#### 18", 1),
            ("#### 17\nWait.\n#### 18", "#### 18", 1),
            ("#### $1,234.00.", "1234", 1),
            ("#### 50%", "50", 1),
            ("A: 18", "#### 18", 1),
            ("It is 3, so the total is 18 dollars.", "18", 1),
            ("The answer is 18, since 9 + 9 = 18 and not 20.", "18", 1),
            ("#### 3/4", "0.75", 1),
            ("#### -5", "-5", 1),
            ("#### 5", "-5", 0),
            ("#### none", "18", 0),
            ("", "18", 0),
            ("<answer>18</answer> or 19", "18", 1),
            ("18", 18, 1),
        ],
    )
    with pytest.raises(ValueError, match="no number in 'twelve'"):
        verdict("gsm8k", "12", "twelve")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "{}.", "{}.00", "{:,} apples", "{}%"]))
def test_a_number_is_read_however_it_is_written(number, form):
    assert extract_number("2 and 2 make four.\n#### " + form.format(number)) == number
    assert verdict("gsm8k", "#### " + form.format(number + 1), f"#### {number}") == 0


@pytest.mark.skipif(not (ROOT.parent / "shared/data/gsm8k").is_dir(), reason="no ../shared/data here")
def test_gsm8k_verdicts_are_those_of_the_data_set():
    """4,000 solutions that OpenAI labeled."""
    rows = [json.loads(line) for line in (ROOT.parent / "shared/data/gsm8k/model_solutions.jsonl").open()]
    solutions = [(row["ground_truth"], s) for row in rows for s in row.values() if isinstance(s, dict)]
    answers = [truth for truth, _ in solutions]
    made = samples([""] * len(solutions), [s["solution"] for _, s in solutions], answer=answers)
    scores = GSM8KVerifier().score(made)
    labels = [float(s["is_correct"]) for _, s in solutions]
    assert len(labels) == 4000 and 0.2 < sum(labels) / 4000 < 0.6
    assert sum(map(float.__eq__, scores, labels)) / 4000 >= 0.99


def test_choices():
    check(
        "choice",
        [
            ("The answer is B", "B", 1),
            ("答案：B", "B", 1),
            ("(B)", "B", 1),
            ("A good question. The answer is B", "B", 1),  # PITFALL 42
            ("A good question. The answer is B", "A", 0),
            ("The answer is A. No, the answer is C.", "C", 1),
            ("故选 AC", ["A", "C"], 1),
            ("ABCD", "A", 0),  # PITFALL 43
            ("A or B", "A", 0),
            ("I. The answer is H", "(H)", 1),
            ("", "A", 0),
        ],
    )
    with pytest.raises(ValueError, match="no capital letter"):
        verdict("choice", "B", "2")


def test_exact_answers():
    check(
        "exact",
        [
            ("The Eiffel Tower!", "eiffel  tower", 1),
            ("ｆｕｌｌ width", "full width", 1),
            ("<answer> Paris. </answer>", "paris", 1),
            ("Paris, I think", "paris", 0),
            ("答案。", "答案", 1),
            ("", "the", 0),
            ("the", "A", 0),
            ("!", "?", 0),
            ("b", ["a", "b"], 1),
        ],
    )


@given(st.text(max_size=20))
def test_normalizing_empties_only_what_is_blank(text):
    assert bool(normalize(text)) == bool(unicodedata.normalize("NFKC", text).split())
    assert verdict("exact", text.upper().lower(), f" {text.lower()} ") == 1


def test_regular_expressions():
    check("regex", [("x=1", "", 1), ("x=\n1", "", 1), ("y", "", 0)], pattern=r"x=.?\d")
    table = [("Answer: 3\nAnswer: Four", "four", 1), ("Answer: 3", "4", 0), ("4", "4", 0)]
    check("regex", table, pattern=r"Answer: ([^\n]*)")


def test_formats():
    good = "<think>\nwell\n</think>\n<answer>4</answer>\n"
    check(
        "format",
        [
            (good, "", 1),
            ("so " + good, "", 0),
            (good + good, "", 0),
            ("<answer>4</answer><think>well</think>", "", 0),
            ("<think>well</think>", "", 0),
            ("<think>a<think>b</think></think><answer></answer>", "", 0),
            ("<think><answer>4</answer></think>", "", 0),
            ("<think></think>\n<answer>4</answer>", "", 0),
            ("<think>well</think>\n<answer> \n</answer>", "", 0),
            (good.replace("\n<answer>", " 4 <answer>"), "", 0),
            ("", "", 0),
        ],
    )
    opened = good.removeprefix("<think>")
    assert verdict("format", opened, prompt="User: 2+2?\n<think>\n") == 1
    assert verdict("format", opened, prompt="User: 2+2?") == 0
    assert verdict("format", "<a.b>x</a.b>", settings={"tags": ["a.b"]}) == 1


def test_what_was_cut_off_might_have_gone_on():
    """ "Paris" might have become "Paris, Texas"; what stands in closed tags, or before the end, is finished."""
    pattern = {"pattern": "Answer: ([^\n]*)"}
    assert verdict("exact", "Paris", "Paris") == 1 and verdict("exact", "Paris", "Paris", cut=True) == 0
    assert verdict("exact", "<answer>Paris</answer> and", "Paris", cut=True) == 1
    assert verdict("regex", "Answer: 18", "18", settings=pattern) == 1
    assert verdict("regex", "Answer: 18", "18", settings=pattern, cut=True) == 0
    assert verdict("regex", "Answer: 18\nSo", "18", settings=pattern, cut=True) == 1
    assert verdict("regex", "x=1", settings={"pattern": "x="}, cut=True) == 1


def test_reasoning_gym_reads_no_text_that_was_cut_off(monkeypatch):
    """Whatever the task's scorer would give it."""
    monkeypatch.setattr("coati.rewards.verifiable.scorer_of", lambda task: (lambda answer, entry: 1.0, False))
    row = dict(answer="18", metadata={"source_dataset": "chain_sum"})
    assert verdict("reasoning_gym", "18", **row) == 1
    assert verdict("reasoning_gym", "18", cut=True, **row) == 0
    assert verdict("reasoning_gym", "<answer>18</answer> so", cut=True, **row) == 1


@pytest.fixture
def schema(tmp_path):
    (tmp_path / "schema.json").write_text(
        '{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}'
    )
    return str(tmp_path / "schema.json")


def test_json_by_a_schema(schema):
    pytest.importorskip("jsonschema")
    table = [
        ('{"n": 1}', "", 1),
        ('Here:\n```json\n{"n": 1}\n```\n', "", 1),
        ('```\n{"n": 1}\n```', "", 1),
        ('<answer>{"n": 1}</answer>', "", 1),
        ('{"n": "1"}', "", 0),
        ("{}", "", 0),
        ('{"n": 1', "", 0),
        ("[" * 100000, "", 0),
        ("", "", 0),
    ]
    check("json", table, json_schema=schema)


def test_a_schema_elsewhere_is_not_fetched(tmp_path):
    pytest.importorskip("jsonschema")
    (tmp_path / "s.json").write_text('{"$ref": "http://127.0.0.1:9/other.json"}')
    with pytest.raises(Exception, match="Unresolvable"):
        verdict("json", "1", settings={"json_schema": str(tmp_path / "s.json")})


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "number_sorting", "sudoku", "color_cube_rotation"])
def test_any_task_of_reasoning_gym(task):
    gym = pytest.importorskip("reasoning_gym")
    entry = json.loads(json.dumps(gym.create_dataset(task, size=1, seed=3)[0]))
    row = dict(answer=entry["answer"], metadata=entry["metadata"], settings={"allow_code_execution": True})
    assert verdict("reasoning_gym", f"<think>?</think><answer> {entry['answer']} </answer>", **row) == 1
    assert verdict("reasoning_gym", "no idea", **row) < 0.5


def test_a_task_that_evaluates_the_answer_must_be_allowed():
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("countdown", size=1, seed=3)[0]
    for refusing in (
        lambda: verdict("reasoning_gym", "1", entry["answer"], metadata=entry["metadata"]),
        lambda: make_verifier("reasoning_gym").check([{"metadata": entry["metadata"]}]),
    ):
        with pytest.raises(UserError, match=r"countdown by evaluating the answer.*allow_code_execution: true"):
            refusing()


TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
ALLOWED = dict(settings={"allow_code_execution": True, "timeout": 5.0}, tests=TESTS)
GOOD = "def add(a, b):\n    return a + b\n"
BAD = GOOD.replace("+", "-")


def test_programs(sandboxed):
    assert verdict("python", GOOD, **ALLOWED) == 1
    assert verdict("python", f"Sure!\n```python\n{GOOD}```\nThat adds.", **ALLOWED) == 1
    assert verdict("python", f"```python\n{BAD}```", **ALLOWED) == 0
    assert verdict("python", "", **ALLOWED) == 0
    with pytest.raises(ValueError, match="the row has no tests"):
        verdict("python", GOOD, **ALLOWED | dict(tests=[]))


@pytest.mark.parametrize(
    "response",
    [
        f"{GOOD}```",
        f"```python\n{GOOD}",
        f"```python3\n{GOOD}```",
        f"```py\n{GOOD}```\nIt adds.",
        f"```{{.python}}\n{GOOD}```",
        f"~~~python\n{GOOD}~~~",
        f"Here ```python\n{GOOD}```",
        f"```python\n{GOOD.rstrip()}```",
        "1. Add:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
        f"```bash\npip install x\n```\n```python\n{GOOD}```",
        f"```python\n{GOOD}```\nOutput:\n```\n3\n```",
        f"```python\n{GOOD}```\n```output\n3\n```",
        f"```python\n{GOOD}```\n```python\n>>> add(1, 2)\n3\n```",
        f"```python\n{GOOD}```\nUse it:\n```python\nfrom solution import add\nresult = add(1, 2)\n```",
        f"```python\n{BAD}```\nOops:\n```python\n{GOOD}```",
        f"<think>```python\n{BAD}```</think>\n```python\n{GOOD}```",
        f"<answer>\n{GOOD}</answer>",
        '''```python\ndef add(a, b):\n    """\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n```''',
        '''````python\ndef add(a, b):\n    """\n```\n3\n```\n    """\n    return a + b\n````''',
    ],
)
def test_a_right_program_is_found_between_its_fences(sandboxed, response):
    """REPORT 13: one fence of two, other names of the language, blocks of output and of usage after it."""
    assert verdict("python", response, **ALLOWED) == 1


@pytest.mark.parametrize(
    "response",
    [
        f"```python\n{GOOD}```\nOops:\n```python\n{BAD}```",
        f"<think>```python\n{GOOD}```</think>\nNo.",
        f"<think>```python\n{GOOD}```</think>\n```python\n{BAD}```",
        f"<think>\n{GOOD}",
        f"```js\n{GOOD}```\n```python\n{BAD}```",
        f"```python\n{GOOD}def more(",
        "```python\nimport os\nos._exit(0)\n```",
        "```python\ndef add(a, b)\n```",
        "```python\nresult = 3\n```\n```python\n",
    ],
)
def test_a_program_that_was_dropped_or_is_unfinished_is_not_paid(sandboxed, response):
    """REPORT 13: the last one counts, and what was only thought of doesn't."""
    assert verdict("python", response, **ALLOWED) == 0


@pytest.fixture
def sandboxed():
    from coati.rewards.sandbox import check_sandbox

    try:
        check_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def test_what_is_read_of_a_response():
    read = lambda response, prompt="": final_part(*samples([prompt], [response]))[0]  # noqa: E731
    assert read("<answer>1</answer><answer>\n2</answer> 3") == "\n2"
    assert read("<answer>1") == "<answer>1"
    assert read("<think><answer>1</answer></think> 2") == " 2"
    assert read("so 1</think> 2", "<think>\n") == " 2"
    assert read("so 1", "<think>\n") == read("<think>so 1") == ""
    anything = lambda block: True  # noqa: E731
    blocks = "```bash\nls\n```\n```python\nx\n```\n```js\ny\n```"
    assert fenced(blocks, anything, "python") == "x\n"
    assert fenced("```\na\n```\n  ```Python title\n  b\n  ```", anything, "python") == "  b\n"
    assert fenced("x", anything, "python") == "x" and fenced("```python\nx", anything, "python") == "x"


@pytest.mark.parametrize(
    ("name", "settings", "scoring", "says"),
    [
        ("maths", {}, {}, "there is no type 'maths'; it is one of model, ensemble, process, function, math"),
        ("python", {}, {}, "allow_code_execution: true"),
        ("math", {}, {"reward_workers": 0}, "reward_workers 1"),
        ("python", {"allow_code_execution": True}, {"reward_timeout": 5.0}, "must be above the timeout of the reward"),
        ("regex", {}, {}, r"rewards\[0\].pattern is missing"),
        ("regex", {"pattern": "("}, {}, "the pattern '\\(' is no regular expression"),
        ("format", {"tags": []}, {}, "needs tags"),
        ("json", {}, {}, r"rewards\[0\].json_schema is missing"),
        ("json", {"json_schema": "/nowhere.json"}, {}, "json_schema /nowhere.json .*No such file"),
        ("gsm8k", {"pattern": "x"}, {}, r"unknown setting 'rewards\[0\].pattern'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_the_start(name, settings, scoring, says):
    with pytest.raises(UserError, match=says):
        config = configure(PPOConfig, rewards=[{"type": name} | settings], **scoring)
        load_rewards(config.rewards, config.scoring)


def test_a_schema_that_is_none_is_refused(tmp_path):
    pytest.importorskip("jsonschema")
    for text in ("no json", '{"type": 3}'):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(UserError, match="can't be read as a JSON schema"):
            make_verifier("json", json_schema=str(tmp_path / "s.json"))


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("coati.rewards.config.find_spec", lambda name: None)
    expected = r"reward math needs the package math_verify: pip install 'coati\[verify\]'"
    with pytest.raises(UserError, match=expected):
        load_rewards([MathRewardSettings()], ScoringConfig())
    with pytest.raises(UserError, match=expected):  # before torch is loaded
        configure(GRPOConfig, rewards=["math"]).check_machine()
    configure(GRPOConfig, rewards=["gsm8k"]).check_machine()


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match=r"gsm8k reads the column 'solution'.*\(but answer\).*answer_column"):
        verdict("gsm8k", "1", "1", settings={"answer_column": "solution"})
    with pytest.raises(ValueError, match="the row has no 'answer'"):
        verdict("gsm8k", "1", None)


@pytest.mark.parametrize(
    ("column", "answer", "right"),
    [
        ("answer.value", {"value": "18", "unit": "eggs 3"}, "18"),
        ("answer.value", {"value": [17, 18]}, "18"),
        ("answer.a.b", {"a": {"b": 18}}, "18"),
        ("answer.text", [{"text": "17"}, {"text": "18"}], "18"),
        ("answer.0", {"0": "18"}, "18"),
        ("answer", ["17", "18"], "18"),
        ("answer", 18, "18"),
        ("answer", 18.5, "18.5"),
        ("answer", [1e-05], "0.00001"),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k", "exact"])
def test_a_dotted_column_names_the_field_with_the_right_answer(name, column, answer, right):
    """REPORT 15: of an object, or of each object in a list; a list of texts has several right answers."""
    assert verdict(name, right, answer, settings={"answer_column": column}) == 1
    assert verdict(name, "3", answer, settings={"answer_column": column}) == 0
    make_verifier(name, answer_column=column).check([{"answer": answer}])


def test_a_column_with_a_dot_in_its_name_is_itself():
    """REPORT 15."""
    settings = {"answer_column": "gold.answer"}
    assert verdict("gsm8k", "18", settings=settings, **{"gold.answer": "18", "gold": {"answer": "17"}}) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            {"value": 18, "unit": "eggs"},
            r"'answer' holds \{'value': 18.*name one of its fields: answer.value, answer.unit",
        ),
        ([{"text": "18"}], r"name one of its fields: answer.text"),
        ([["18"], ["19"]], r"holds \[\['18'\].*no text, number or list of these$"),
        (["18", None], r"holds \['18', None\]"),
        ([{}], r"holds \[\{\}\]"),
        ({}, r"holds \{\}"),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k", "math", "choice", "exact", "regex"])
def test_a_right_answer_that_is_an_object_is_refused_at_the_start(name, answer, says):
    """REPORT 15: one line before anything is generated; nothing is read out of how Python would print it."""
    pytest.importorskip("math_verify")
    settings = {"pattern": r"(\d+)"} if name == "regex" else {}
    verifier = make_verifier(name, **settings)
    with pytest.raises(UserError, match=says) as error:
        verifier.check([{"answer": "18"}, {"answer": None}, {}, {"answer": answer}])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=says):
        verdict(name, "18", answer, settings=settings)


@pytest.mark.parametrize("answer", ['{"unit": "eggs", "value": 5}', "{'value': 5}", "[5]", '["5", "6"]', "{5: 5}"])
def test_a_text_of_an_object_or_a_list_is_not_read_for_a_number(answer):
    """REPORT 15: as data sets that keep JSON in texts have it."""
    with pytest.raises(ValueError, match="no number in"):
        verdict("gsm8k", "5", answer)


def test_a_column_that_no_row_has_is_refused_at_the_start():
    """REPORT 15: what a verifier doesn't read may be missing."""
    rows = [{"solution": "1"}, {"gold": {"value": 1}}]
    for name, column in (("gsm8k", "answer"), ("exact", "gold.text"), ("choice", "solution.text")):
        with pytest.raises(UserError, match=f"reward {name} reads the column '{column}', which .* don't have"):
            make_verifier(name, answer_column=column).check(rows)
    make_verifier("gsm8k", answer_column="gold.value").check(rows)
    make_verifier("format").check(rows)
    make_verifier("regex", pattern="x").check(rows)
    make_verifier("gsm8k").check([])


def test_the_tests_of_programs_may_be_a_field(sandboxed):
    """REPORT 15."""
    settings = ALLOWED["settings"] | {"tests_column": "reward_model.ground_truth"}
    assert verdict("python", GOOD, settings=settings, reward_model={"ground_truth": TESTS}) == 1
    with pytest.raises(UserError, match=r"name one of its fields: reward_model\.ground_truth"):
        make_verifier("python", **settings | {"tests_column": "reward_model"}).check(
            [{"reward_model": {"ground_truth": TESTS}}]
        )


@pytest.mark.parametrize("metadata", [None, {}, "countdown", {"difficulty": 3}])
def test_metadata_that_name_no_task_are_refused_at_the_start(metadata):
    """REPORT 15."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match="reasoning_gym reads the field `source_dataset` of the column 'metadata'"):
        make_verifier("reasoning_gym").check([{"metadata": metadata}])
    with pytest.raises(UserError, match="reasoning_gym reads the column 'metadata'"):
        make_verifier("reasoning_gym").check([{"answer": "1"}])


def test_the_settings_reach_the_verifier():
    assert asdict(make_verifier("gsm8k", answer_column="gold")) == {"answer_column": "gold", "answer_style": "stated"}
    assert make_verifier("format", tags=["a", "b"]).format_tags == ["a", "b"]
    assert asdict(make_verifier("regex", answer_column="gold", pattern="x")) == {
        "answer_column": "gold",
        "regex_pattern": "x",
    }
