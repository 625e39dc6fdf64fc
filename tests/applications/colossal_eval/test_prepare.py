"""Published layouts to task files: every layout, every mistake, and the shared data."""

import csv
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.errors import UserError
from colossal_eval.benchmarks.datasets_hub import hub_rows
from colossal_eval.benchmarks.gaokao_bench import split_numbered, split_options
from colossal_eval.benchmarks.prepared_folder import read_questions, read_summary
from colossal_eval.benchmarks.subjects import ACROSS, SUBJECTS, TOTALS
from colossal_eval.prepare import PrepareConfig, main, prepare
from tests.applications.colossal_eval.conftest import (
    DATA,
    make_agieval,
    make_gsm8k,
    make_mmlu,
    write_csv,
    write_jsonl,
)

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data sets are not at {DATA}")


def convert(name, data, tmp_path, **settings):
    return prepare(PrepareConfig(benchmark=name, data=str(data), output=str(tmp_path / "out"), **settings))


def complaint(name, data, tmp_path, **settings) -> str:
    with pytest.raises(UserError) as error:
        convert(name, data, tmp_path, **settings)
    assert not list((tmp_path / "out").glob("*")), "something was left behind"
    return str(error.value)


def test_published_totals_are_those_of_the_papers():
    assert (TOTALS["mmlu"], len(SUBJECTS["mmlu"])) == (14042, 57)
    assert (TOTALS["cmmlu"], len(SUBJECTS["cmmlu"])) == (11582, 67)
    assert len(ACROSS["cmmlu"]["China specific"]) == 15 and set(ACROSS["cmmlu"]["China specific"]) <= set(
        SUBJECTS["cmmlu"]
    )
    assert (TOTALS["gaokao_bench"], len(SUBJECTS["ceval"])) == (1781, 52)


def test_mmlu_keeps_words_that_look_like_gaps(tmp_path):
    rows = [["NA\nor not?", "NA", "None", "nan", "null", "B"]]
    for split in ("dev", "test"):
        write_csv(tmp_path / "mmlu" / "data" / split / f"anatomy_{split}.csv", rows)
    folder = convert("mmlu", tmp_path / "mmlu", tmp_path)
    [question] = read_questions(folder / "test" / "anatomy.jsonl")
    assert question.choices == ["NA", "None", "nan", "null"]
    assert (question.question, question.answers, question.category) == ("NA\nor not?", ["B"], "other")


def test_every_malformed_row_is_named_by_file_and_line(tmp_path):
    root = make_mmlu(tmp_path / "mmlu")
    path = root / "test" / "anatomy_test.csv"
    write_csv(path, [["two\nlines", *"1234", "A"], ["few", "1", "A"], ["letter", *"1234", "E"], ["", *"1234", "A"]])
    told = complaint("mmlu", root, tmp_path)
    assert "3 malformed rows" in told
    for line, reason in ((3, "3 cells, not 6"), (4, "'E' is none of A, B, C, D"), (5, "the question is empty")):
        assert f"{path}:{line}: " in told
        assert reason in told
    folder = convert("mmlu", root, tmp_path, bad_rows="drop")
    assert len(list(read_questions(folder / "test" / "anatomy.jsonl"))) == 1
    assert read_summary(folder)["dropped"] == 3


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda root: (root / "test" / "virology_test.csv").unlink(), "test/virology_test.csv is missing"),
        (lambda root: (root / "dev" / "virology_dev.csv").unlink(), "dev/virology_dev.csv is missing"),
        (lambda root: (root / "dev" / "virology_dev.csv").write_text(""), "holds no rows; expected question,A,B,C,D"),
        (lambda root: (root / "test" / "cooking_test.csv").write_text("a"), "'cooking' is no published subject"),
        (lambda root: (root / "test").rename(root / "tests"), "expected dev/SUBJECT_dev.csv and test/SUBJECT_test.csv"),
        (lambda root: (root / "dev" / "virology_dev.csv").write_bytes(b"\xff\xfe"), "can't be read as UTF-8 csv"),
    ],
)
def test_a_wrong_layout_is_refused_and_what_was_expected_is_said(spoil, expected, tmp_path):
    root = make_mmlu(tmp_path / "mmlu")
    spoil(root)
    assert expected in complaint("mmlu", root, tmp_path)


def test_asked_for_subjects_must_be_there(tmp_path):
    root = make_mmlu(tmp_path / "mmlu")
    assert "no subject 'astronomy'" in complaint("mmlu", root, tmp_path, subjects=["anatomy", "astronomy"])
    folder = convert("mmlu", root, tmp_path, subjects=["anatomy"])
    assert list(read_summary(folder)["subjects"]) == ["anatomy"]


def test_a_subset_is_said_in_a_line(tmp_path, capsys):
    convert("mmlu", make_mmlu(tmp_path / "mmlu"), tmp_path)
    told = capsys.readouterr().out
    assert "mmlu: 12 of 14,042 published rows, 2 of 57 subjects" in told
    assert "anatomy 6 (published 135), virology 6 (published 166)" in told


def test_an_output_that_is_there_is_refused(tmp_path):
    root = make_mmlu(tmp_path / "mmlu")
    convert("mmlu", root, tmp_path)
    with pytest.raises(UserError, match="is there already"):
        convert("mmlu", root, tmp_path)


def test_the_command_ends_with_status_2_and_one_line(tmp_path, capsys):
    assert main(["--benchmark", "mmlu", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --data")
    assert main(["--benchmark", "nlu", "--data", str(tmp_path)]) == 2
    assert main(["--benchmark", "mmlu", "--data", str(tmp_path), "--bad_rows", "skip"]) == 2


def test_cmmlu_and_ceval_are_read_by_their_headers(tmp_path):
    row = ["0", "问", "甲", "乙", "丙", "丁", "C"]
    for split in ("dev", "test"):
        write_csv(tmp_path / "cmmlu" / split / "agronomy.csv", [["", "Question", *"ABCD", "Answer"], row])
    for split in ("dev", "val"):
        header = ["id", "question", *"ABCD", "answer"]
        write_csv(tmp_path / "ceval" / split / f"law_{split}.csv", [[*header, "explanation"], [*row, "因为"]])
    for name, subject in (("cmmlu", "agronomy"), ("ceval", "law")):
        [question] = read_questions(convert(name, tmp_path / name, tmp_path) / "test" / f"{subject}.jsonl")
        assert (question.choices, question.answers, question.language) == (["甲", "乙", "丙", "丁"], ["C"], "zh")
    write_csv(tmp_path / "cmmlu" / "test" / "agronomy.csv", [["Question", *"ABCD", "Answer"], row[1:]])
    with pytest.raises(UserError, match=r"agronomy.csv:1 has the columns .*expected ,Question,A,B,C,D,Answer"):
        prepare(PrepareConfig(benchmark="cmmlu", data=str(tmp_path / "cmmlu"), output=str(tmp_path / "other")))


def test_agieval_keeps_several_answers_and_finds_its_files(tmp_path):
    folder = convert("agieval", make_agieval(tmp_path / "agi"), tmp_path)
    questions = list(read_questions(folder / "test" / "gaokao-physics.jsonl"))
    assert [(q.kind, q.answers) for q in questions] == [
        ("single_choice", ["B"]),
        ("multi_choice", ["A", "C"]),
        ("single_choice", ["A"]),
    ]
    assert questions[0].choices == ["一", "二", "三", ""]
    [shot] = read_questions(folder / "dev" / "gaokao-physics.jsonl")
    assert (shot.choices, shot.labels, shot.answers) == ([], ["A", "B", "C", "D"], ["D"])
    assert shot.question.endswith("D. 四")
    [cloze] = read_questions(folder / "test" / "gaokao-mathcloze.jsonl")
    assert (cloze.kind, cloze.answers) == ("cloze", ["$5$"])


def test_agieval_says_what_is_missing_or_twice_there(tmp_path):
    root = make_agieval(tmp_path / "agi")
    shots = root / "data" / "few_shot_prompts.csv"
    text = shots.read_text(encoding="utf-8")
    shots.write_text(text.replace("{", "__import__('os')", 1), encoding="utf-8")
    assert f"{shots}:2 (gaokao-physics): the example is no Python literal" in complaint("agieval", root, tmp_path)
    shots.unlink()
    assert "has no few_shot_prompts.csv" in complaint("agieval", root, tmp_path)
    shots.write_text(text, encoding="utf-8")
    write_jsonl(root / "data" / "v1_1" / "gaokao-physics.jsonl", [{}])
    assert "name the folder of one version" in complaint("agieval", root, tmp_path)


@pytest.mark.parametrize(
    "layout", ["Data/Objective_Questions", "data/Multiple-choice_Questions", "Objective_Questions"]
)
def test_gaokao_is_read_in_both_layouts(layout, tmp_path):
    entry = {"question": "1. 选？\nA. 甲\nB．乙 C. 丙 D. 丁", "answer": ["B"], "index": 0}
    several = {
        "question": "读文。完成 3～4 题\n3．一？A．甲 B．乙 C．丙 D．丁\n4．二？A．1 B．2 C．3 D．4",
        "answer": ["A", "D"],
    }
    path = tmp_path / "gaokao" / layout / "2010-2022_Geography_MCQs.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"keyword": "x", "example": [entry, several, several | {"answer": ["A", "B", "C"]}]}))
    folder = convert("gaokao_bench", tmp_path / "gaokao", tmp_path)
    questions = list(read_questions(folder / "test" / f"{path.stem}.jsonl"))
    assert [q.id.split("/")[1] for q in questions] == ["0", "1.0", "1.1"]
    assert questions[2].passage == "读文。完成 3～4 题"
    assert (questions[2].question, questions[2].choices, questions[2].answers) == ("二？", ["1", "2", "3", "4"], ["D"])
    assert "2010-2022_Geography_MCQs 1" in read_summary(folder)["notes"][-1]
    path.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object with a list 'example'"):
        prepare(PrepareConfig(benchmark="gaokao_bench", data=str(tmp_path / "gaokao"), output=str(tmp_path / "other")))


words = st.text("甲乙丙x 1+=", min_size=1, max_size=8).filter(lambda text: text.strip() == text)


@given(words, st.lists(words, min_size=4, max_size=4), st.sampled_from(["．", ".", "、"]))
def test_options_are_found_again(stem, options, mark):
    text = stem + "\n" + "\n".join(f"{letter}{mark} {option}" for letter, option in zip("ABCD", options, strict=True))
    assert split_options(text) == (stem, options)


@given(words, st.integers(1, 60), st.integers(2, 5))
def test_numbered_questions_are_found_again(passage, first, count):
    parts = [f"问{i}？\nA．a{i} B．b C．c D．d" for i in range(count)]
    text = passage + "\n" + "\n".join(f"{first + i}．{part}" for i, part in enumerate(parts))
    assert split_numbered(text, count) == (passage, parts)
    assert split_numbered(text, count + 1) == ("", [])


def test_gsm8k_answers_are_the_numbers(tmp_path):
    root = make_gsm8k(tmp_path / "gsm8k")
    folder = convert("gsm8k", root, tmp_path)
    questions = list(read_questions(folder / "test" / "gsm8k.jsonl"))
    assert [q.answers for q in questions] == [["0000"], ["2000"], ["4000"], ["6000"]]
    assert len(list(read_questions(folder / "dev" / "gsm8k.jsonl"))) == 8
    path = write_jsonl(root / "test.jsonl", [{"question": "?", "answer": "no mark"}, {"question": "?"}])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(benchmark="gsm8k", data=str(root), output=str(tmp_path / "other")))
    for line, reason in ((1, "#### N"), (2, "a field is missing"), (3, "no JSON object")):
        assert f"{path}:{line}: " in str(error.value)
        assert reason in str(error.value)


def test_mt_bench_questions_keep_their_turns_and_references(tmp_path):
    rows = [{"question_id": i, "category": "math", "turns": [f"ask {i}", "and then?"]} for i in (81, 82)]
    write_jsonl(tmp_path / "mt" / "question.jsonl", rows)
    answer = {"question_id": 82, "choices": [{"turns": ["so", "thus"]}]}
    write_jsonl(tmp_path / "mt" / "reference_answer" / "gpt-4.jsonl", [answer])
    first, second = read_questions(convert("mt_bench", tmp_path / "mt", tmp_path) / "test" / "mt_bench.jsonl")
    assert (first.turns, first.answers, second.answers) == (["and then?"], [], ["so", "thus"])


def test_texts_are_documents_of_files(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "story.txt").write_text("Once upon a time\n")
    path = write_jsonl(tmp_path / "texts" / "news.jsonl", [{"text": "今天"}, {"target": "two"}])
    folder = convert("texts", tmp_path / "texts", tmp_path)
    assert [q.question for q in read_questions(folder / "test" / "news.jsonl")] == ["今天", "two"]
    assert read_summary(folder)["notes"] == ["texts: 3 documents of 2 files"]
    write_jsonl(path, [{"text": "今天"}, {"title": "none"}, {"text": " "}])
    (tmp_path / "texts" / "story.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(benchmark="texts", data=str(tmp_path / "texts"), output=str(tmp_path / "other")))
    for place, reason in (("news.jsonl:2", "no text in"), ("news.jsonl:3", "text is empty"), ("story.txt:1", "utf-8")):
        assert re.search(f"{place}: .*{reason}", str(error.value))


def test_a_datasets_folder_gives_the_questions_of_the_csv_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = make_mmlu(tmp_path / "mmlu", ["anatomy"])
    hub = tmp_path / "hub"
    for split in ("dev", "test"):
        with (root / split / f"anatomy_{split}.csv").open(newline="") as file:
            rows = [dict(question=q, choices=choices, answer="ABCD".index(a)) for q, *choices, a in csv.reader(file)]
        write_jsonl(hub / "anatomy" / f"{split}.jsonl", rows)
    files = "".join(f"  - split: {split}\n    path: anatomy/{split}.jsonl\n" for split in ("dev", "test"))
    (hub / "README.md").write_text(f"---\nconfigs:\n- config_name: anatomy\n  data_files:\n{files}---\n")
    by_name = {(row.split, q.id): q for row in hub_rows("mmlu", str(hub)) for q in row.questions}
    folder = convert("mmlu", root, tmp_path)
    by_file = {(s, q.id): q for s in ("dev", "test") for q in read_questions(folder / s / "anatomy.jsonl")}
    assert by_name == by_file
    with pytest.raises(UserError, match="can't be loaded"):
        list(hub_rows("mmlu", str(tmp_path / "nothing")))


@needs_data
@pytest.mark.parametrize(
    "name, rows, questions", [("mmlu", 12698, 12698), ("cmmlu", 2084, 2084), ("agieval", 2636, 2636),
                              ("gaokao_bench", 1011, 1063), ("gsm8k", 1000, 1000), ("mt_bench", 64, 64)],
)  # fmt: skip
def test_all_of_the_shared_data_is_converted(name, rows, questions, tmp_path):
    folder = convert(name, DATA / name, tmp_path)
    found = [q for path in sorted((folder / "test").glob("*.jsonl")) for q in read_questions(path)]
    assert (read_summary(folder)["rows"], len(found)) == (rows, questions)
    assert len({q.id for q in found}) == questions
    if name == "mmlu":
        letters = Counter()
        for path in (DATA / "mmlu" / "test").glob("*.csv"):
            with path.open(newline="", encoding="utf-8") as file:
                letters.update(cells[5] for cells in csv.reader(file))
        assert letters == Counter(q.answers[0] for q in found)
        assert sum(choice in ("NA", "None", "none", "N/A", "nan") for q in found for choice in q.choices) >= 5
