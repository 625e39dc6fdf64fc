"""The prompt that a teacher reads in place of the student's."""

from dataclasses import replace

import pytest

from coati.config import configure
from coati.data import DataConfig, build_dataset
from coati.data.records import parse_record
from coati.data.teaching import Teaching, fields_of
from coati.errors import UserError
from coati.trainers.config import DistillConfig

DEMONSTRATION = "{prompt}\n\nAn example of a response:\n{response}\n\nNow respond in your own words."
EXPECTED = "what is 1+1?\n\nAn example of a response:\nit is 2\n\nNow respond in your own words."
ASKED, SAID = {"role": "user", "content": "what is 1+1?"}, {"role": "assistant", "content": "it is 2"}


@pytest.fixture
def tokenizer(tokenizer_for):
    return tokenizer_for("chatml")


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def last_message(row: dict, template: str) -> str:
    [record] = parse_record(row, "prompt")
    taught = Teaching(template).add_to(record)
    assert taught.prompt == record.prompt and taught.teacher_prompt[:-1] == record.prompt[:-1]
    return taught.teacher_prompt[-1]["content"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "what is 1+1?", "completion": "it is 2"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"question": "what is 1+1?", "answer": "it is 2"},
        {"instruction": "what is 1+1?", "output": "it is 2"},
        {"messages": [ASKED, SAID]},
        {"conversations": [{"from": "human", "value": "what is 1+1?"}, {"from": "gpt", "value": "it is 2"}]},
        {"system": "Be kind.", "prompt": "what is 1+1?", "response": "it is 2", "completion": "no"},
    ],
)
def test_the_demonstration_is_the_rows_response_in_any_format(row):
    assert last_message(row, DEMONSTRATION) == EXPECTED


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{hint}", "count {it}"),
        ("{hint} {prompt} {hint}", "count {it} 1+1? count {it}"),
        ("{{{level}}} {steps}", "{3} one\ntwo"),
        ("{ok}{said}", "Trueit is 2"),
        ("{prompt}", "1+1?"),
    ],
)
def test_braces_name_any_field(template, expected):
    row = {"prompt": "1+1?", "hint": "count {it}", "level": 3, "steps": ["one", "two"], "ok": True, "said": [SAID]}
    assert last_message(row, template) == expected


def test_the_conversation_before_the_last_message_is_kept(tokenizer, config, write_jsonl):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}, SAID, ASKED]
    source = write_jsonl([{"prompt": turns, "hint": "two"}])
    [plain] = build_dataset([source], "prompt", tokenizer, config)
    [taught] = build_dataset([source], "prompt", tokenizer, config, teaching=Teaching("{prompt} ({hint})"))
    assert (taught.input_ids, taught.text, taught.columns) == (plain.input_ids, plain.text, plain.columns)
    [expected] = build_dataset(
        [write_jsonl([{"prompt": [*turns[:-1], ASKED | {"content": "what is 1+1? (two)"}]}], "o.jsonl")],
        "prompt",
        tokenizer,
        config,
    )
    assert taught.teacher_ids == expected.input_ids and len(taught) == len(taught.teacher_ids) > len(taught.input_ids)


def test_another_template_is_another_data_set(tokenizer, config, write_jsonl):
    source = write_jsonl([{"prompt": "1+1?", "completion": "2"}])
    templates = (None, "{prompt}", "{prompt} {response}")
    data = [build_dataset([source], "prompt", tokenizer, config, teaching=t and Teaching(t)) for t in templates]
    assert len({one.key for one in data}) == 3
    assert [one[0].teacher_ids == one[0].input_ids for one in data] == [False, True, False]


def test_the_response_is_used_where_the_prompt_names_it(tokenizer, config, write_jsonl):
    """A dialogue's last response is no part of a prompt, which is said; of this prompt it is one."""
    source = write_jsonl([{"messages": [ASKED, SAID]}])
    for template, unused in (("{prompt}", True), (DEMONSTRATION, False)):
        report = build_dataset([source], "prompt", tokenizer, config, teaching=Teaching(template)).report
        assert any("last response" in problem.reason for problem in report.unused) == unused


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "b", "completion": "c"}, "no field `hint`, which teacher_prompt names"),
        ({"prompt": "b", "hint": None}, "no field `hint`"),
        ({"prompt": "b", "hint": {"a": 1}}, "`hint` has a role"),
        ({"prompt": "b", "hint": []}, "`hint` is empty"),
        ({"prompt": "b", "hint": "  "}, "teacher_prompt gives an empty prompt"),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
                    {"role": "tool", "content": "x"},
                ],
                "hint": "h",
            },
            "ends with a tool's message",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_its_line(row, words, tokenizer, config, write_jsonl):
    source = write_jsonl([{"prompt": "a", "hint": "b"}, row])
    with pytest.raises(UserError, match=rf"line 2: .*{words}"):
        build_dataset([source], "prompt", tokenizer, config, teaching=Teaching("{hint}"))
    kept = build_dataset([source], "prompt", tokenizer, replace(config, bad_rows="drop"), teaching=Teaching("{hint}"))
    assert len(kept) == 1 and kept.report.bad_rows == 1


def test_a_teachers_prompt_has_the_length_of_a_row(tokenizer, config, write_jsonl):
    source = write_jsonl([{"prompt": "a", "hint": "b"}, {"prompt": "a", "hint": "b c d " * 30}])
    teaching, short = Teaching("{prompt} {hint}"), replace(config, max_length=40, max_prompt_length=30)
    data = build_dataset([source], "prompt", tokenizer, short, teaching=teaching)
    assert len(data) == 1 and "the teacher's prompt is longer than --max_length 40 tokens" in str(data.report)
    cut = build_dataset([source], "prompt", tokenizer, replace(short, too_long="truncate_prompt"), teaching=teaching)
    assert len(cut[1].teacher_ids) == 40 and cut[1].input_ids == cut[0].input_ids


@pytest.mark.parametrize(
    "template",
    ["{prompt.text}", "{prompt[0]}", "{prompt!r}", "{prompt:>9}", "{}", "{0}", "{prompt", "hint}", "no field"],
)
def test_braces_hold_a_name_alone(template):
    with pytest.raises(ValueError, match=r"teacher_prompt .*alone in braces"):
        fields_of(template)
    with pytest.raises(UserError, match=r"teacher_prompt .*alone in braces"):
        configure(DistillConfig, teacher_prompt=template)
