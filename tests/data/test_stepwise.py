"""Where the steps of a response end among its tokens."""

import copy
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from coati.data import DataConfig, parse_record, prepare_tokenizer, tokenize
from coati.data.tokenize import SkippedRow
from coati.rewards.process import steps_of
from coati.samples import Sample
from coati.steps import decode_one_by_one, decode_with_starts, last_tokens, step_ends
from examples.tokenizer import byte_level_tokenizer

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
# merges of separators with what stands around them, and characters of two to four bytes
PIECES = [".\n", "\na", " / b", ";1", "1;", "b;a", "b\n\n", "a\nb"]
TEXTS = ["a. b.\n\nc; d / e 12\n3", "User: é € 😀 ab\nAssistant: é€😀. \n\n"]
alphabet = st.sampled_from([*"ab1 .;/-", "é", "€", "😀", "\n", "\u0301"])
words = st.text(alphabet, min_size=1, max_size=8)


@pytest.fixture(scope="module", params=[False, True], ids=["by words", "across words"])
def tokenizer(request):
    """Byte-level; the second has tokens such as `.\\n\\nc`, that go from one step into the next."""
    tokenizer = byte_level_tokenizer(TEXTS * 8, 340, SPECIAL)
    if request.param:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        options = dict(special_tokens=[*SPECIAL.values()], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        backend.train_from_iterator(PIECES * 8, trainers.BpeTrainer(vocab_size=320, show_progress=False, **options))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)
    return prepare_tokenizer(tokenizer)[0]


@settings(max_examples=60)
@given(
    st.lists(words.filter(str.strip), min_size=1, max_size=5), st.sampled_from(["\n", "\n\n", " / ", ";"]), st.data()
)
def test_a_label_stands_on_the_token_that_holds_the_last_character_of_its_step(tokenizer, steps, separator, data):
    """Also where a token goes beyond the step, and where a character has several tokens. A reward finds the same tokens
    in what was sampled."""
    steps = [step for step in steps if separator not in step] or ["a"]
    joined = separator.join(steps)
    labels = [data.draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in steps]
    [record] = parse_record({"prompt": "a", "steps": steps, "labels": labels}, "stepwise")
    try:
        sample = tokenize(record, tokenizer, DataConfig(step_separator=separator))
    except ValueError as error:  # a token holds the last characters of two steps; "\n", "b" and "\n\n"
        assert "two steps end within one token" in str(error) or "can't be told apart" in str(error)
        return
    ids, mask = sample.sequence.input_ids, sample.sequence.loss_mask
    places = [i for i, label in enumerate(sample.labels) if not math.isnan(label)]
    assert [sample.labels[i] for i in places] == labels and all(mask[i] for i in places)
    prompt = "<bos>User: a\nAssistant: "
    for number, place in enumerate(places):
        through = joined[: step_ends(joined, separator)[number]]
        assert tokenizer.decode(ids[: place + 1]).startswith(prompt + through)
        before = tokenizer.decode(ids[:place])
        assert len(before.rstrip("\ufffd")) < len(prompt + through)
    row = Sample(0, {}, "a", joined, ids, mask, None, "eos")
    assert steps_of(row, tokenizer, separator) == places


@settings(max_examples=60)
@given(st.text(alphabet, max_size=20), st.data())
def test_decoded_tokens_start_where_their_characters_do(tokenizer, text, data):
    """Whatever tokens a text was sampled as: here it is split into single bytes at some places."""
    ids = []
    while text:
        part = data.draw(st.integers(1, len(text)))
        ids += tokenizer(text[:part], add_special_tokens=False)["input_ids"]
        text = text[part:]
    decoded, starts = decode_with_starts(ids, tokenizer)
    assert decoded == tokenizer.decode(ids)
    assert starts == sorted(starts) and len(starts) == len(ids)
    for i, start in enumerate(starts):
        assert tokenizer.decode(ids[:i]).startswith(decoded[:start])


@settings(max_examples=60)
@given(st.text(alphabet, max_size=20))
def test_tokens_as_the_tokenizer_writes_them_start_where_those_decoded_one_by_one_do(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decode_with_starts(ids, tokenizer) == decode_one_by_one(ids, tokenizer)


def test_a_character_of_several_tokens_ends_with_the_last_of_them(tokenizer):
    parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("€")[0][0]
    ids = tokenizer.convert_tokens_to_ids([*parts, "."])
    text, starts = decode_with_starts(ids, tokenizer)
    assert (text, starts) == ("€.", [0, 0, 0, 1])
    assert last_tokens(starts, [1, 2]) == [2, 3]


def test_spaces_behind_a_step_and_empty_steps_are_no_steps():
    assert step_ends("a \n\n b\n \n", "\n") == [1, 6]
    assert step_ends(" / / 1 / ", " / ") == [2, 8]  # "/", and "1 /", whose separator is not one
    assert step_ends("", "\n") == step_ends("\n \n", "\n") == []


def test_a_step_without_a_label_is_not_learned_and_a_row_without_any_is_skipped(tokenizer):
    row = {"prompt": "a", "completions": ["b1", "b2", "b1"], "labels": [None, False, None]}
    [record] = parse_record(row, "stepwise")
    sample = tokenize(record, tokenizer, DataConfig())
    assert [label for label in sample.labels if not math.isnan(label)] == [0.0]
    [record] = parse_record(row | {"labels": [None] * 3}, "stepwise")
    with pytest.raises(SkippedRow, match="no step has a label"):
        tokenize(record, tokenizer, DataConfig())


def test_labels_stay_at_their_tokens_when_the_prompt_is_truncated(tokenizer):
    row = {"prompt": "a b " * 20, "steps": ["a1", "b2"], "labels": [1, 0.25]}
    [record] = parse_record(row, "stepwise")
    whole = tokenize(record, tokenizer, DataConfig())
    short = tokenize(record, tokenizer, DataConfig(max_length=20, too_long="truncate_prompt"))
    assert len(short) == 20 < len(whole) and len(short.labels) == 20
    assert repr(short.labels[1:]) == repr(whole.labels[-19:])
    assert short.sequence.input_ids[1:] == whole.sequence.input_ids[-19:]


def test_a_token_that_goes_into_the_next_step_is_read(tokenizer):
    row = {"prompt": "a", "steps": ["b.", "a"], "labels": [0.25, 1]}
    [record] = parse_record(row, "stepwise")
    sample = tokenize(record, tokenizer, DataConfig())
    labeled = [
        (tokenizer.decode([id]), label) for id, label in zip(sample.sequence.input_ids, sample.labels, strict=True)
    ]
    joins = len(tokenizer("b.\na", add_special_tokens=False)["input_ids"]) < 4
    assert [pair for pair in labeled if pair[1] == pair[1]] == [(".\n" if joins else ".", 0.25), ("a", 1.0)]


def test_two_steps_that_end_within_one_token_are_refused(tokenizer):
    [record] = parse_record({"prompt": "a", "steps": ["b", "a"], "labels": [0, 1]}, "stepwise")
    if len(tokenizer("b;a", add_special_tokens=False)["input_ids"]) == 1:
        with pytest.raises(ValueError, match="two steps end within one token"):
            tokenize(record, tokenizer, DataConfig(step_separator=";"))
    else:
        assert len(tokenize(record, tokenizer, DataConfig(step_separator=";"))) > 3


# As the data set's README shows a row, shortened.
PRM800K = {
    "labeler": "340d89bc",
    "question": {"problem": "What is the gcd?", "ground_truth_answer": "4"},
    "label": {
        "steps": [
            {
                "completions": [{"text": "I factor.", "rating": 0, "flagged": None}],
                "human_completion": None,
                "chosen_completion": 0,
            },
            {
                "completions": [{"text": "No.", "rating": -1}, {"text": "So\n\n it is.", "rating": 1}],
                "human_completion": None,
                "chosen_completion": 1,
            },
            {
                "completions": [{"text": "I know.", "rating": -1}, {"text": "Or not.", "rating": 0}],
                "human_completion": None,
                "chosen_completion": None,
            },
            {"completions": [{"text": "After.", "rating": 1}], "human_completion": None, "chosen_completion": 0},
        ],
        "finish_reason": "found_error",
    },
}


def test_prm800k_is_read_up_to_the_first_wrong_step():
    [record] = parse_record(PRM800K, "stepwise")
    assert record.prompt == [{"role": "user", "content": "What is the gcd?"}]
    assert record.steps == ["I factor.", "So it is.", "I know."] and record.labels == [1.0, 1.0, 0.0]
    assert record.unused == ("`labeler`",)


@pytest.mark.parametrize("written", ["I write.", {"text": "I write."}])
def test_prm800k_goes_on_with_what_a_person_wrote_and_ends_where_nothing_was_chosen(written):
    row = copy.deepcopy(PRM800K)
    wrong, *_, last = row["label"]["steps"][1:]
    wrong |= {"chosen_completion": None, "human_completion": written}
    row["label"]["steps"][2]["completions"][0]["rating"] = 0
    [record] = parse_record(row, "stepwise")
    assert record.steps == ["I factor.", "I write."] and record.labels == [1.0, 1.0]
    row["label"]["steps"] = [last | {"completions": [{"text": "After.", "rating": None}]}]
    assert parse_record(row, "stepwise")[0].labels == [None]


@pytest.mark.parametrize("steps", [None, [1], [{"completions": [], "chosen_completion": 0}]])
def test_what_is_not_as_prm800k_has_it_is_refused(steps):
    with pytest.raises(ValueError, match=r"label\.steps"):
        parse_record(PRM800K | {"label": {"steps": steps}}, "stepwise")


SHEPHERD = {
    "input": "What is it? Step 1: 5+8 = 13. ки\nStep 2: 13 * 6\n= 78. ки\nStep 3: It is 7. #### 7 ки",
    "label": "What is it? Step 1: 5+8 = 13. +\nStep 2: 13 * 6\n= 78. +\nStep 3: It is 7. #### 7 -",
    "task": "GSM8K",
}


@pytest.mark.parametrize("layout", ["rows", "card"])
def test_math_shepherd_is_read_by_its_tags(layout):
    row = dict(SHEPHERD)
    if layout == "card":  # "ки ?" in the input and "ки +" in the labels
        row["input"] = row["input"].replace("ки", "ки ? \n")
        row["label"] = re.sub(r"([+-])(\n|$)", r"ки \1 \n\2", row["label"].replace("5+8", "5 + 8"))
        row["input"] = row["input"].replace("5+8", "5 + 8")
    [record] = parse_record(row, "stepwise")
    assert record.prompt[0]["content"] == "What is it?" and record.labels == [1.0, 1.0, 0.0]
    assert record.steps[1:] == ["Step 2: 13 * 6 = 78.", "Step 3: It is 7. #### 7"]
    assert record.steps[0].startswith("Step 1: 5") and record.unused == ("`task`",)


@pytest.mark.parametrize(
    "changes", [{"label": "no"}, {"label": SHEPHERD["label"][:-1]}, {"input": "Why? ки", "label": "Why? +"}]
)
def test_what_is_not_as_math_shepherd_has_it_is_refused(changes):
    with pytest.raises(ValueError, match=r"`label` has other steps|as Math-Shepherd has them"):
        parse_record(SHEPHERD | changes, "stepwise")


BENCH = {
    "id": "gsm8k-0",
    "generator": "Qwen2-7B-Instruct",
    "problem": "What is it?",
    "steps": ["I add\n\nthem.", "It is 6.", "So 6."],
    "final_answer_correct": False,
}


@pytest.mark.parametrize(
    ("label", "labels"), [(-1, [1, 1, 1]), (0, [0, None, None]), (1, [1, 0, None]), (2, [1, 1, 0])]
)
def test_process_bench_is_read_up_to_the_first_wrong_step(label, labels):
    [record] = parse_record(BENCH | {"label": label}, "stepwise")
    assert record.prompt == [{"role": "user", "content": "What is it?"}]
    assert record.steps == ["I add them.", "It is 6.", "So 6."] and record.labels == labels
    assert record.unused == ("`id`", "`generator`", "`final_answer_correct`")


@pytest.mark.parametrize("changes", [{"label": 3}, {"label": True}, {"label": "-1"}, {"steps": "x"}, {"steps": [1]}])
def test_what_is_not_as_process_bench_has_it_is_refused(changes):
    with pytest.raises(ValueError, match="as ProcessBench has them"):
        parse_record(BENCH | {"label": 0} | changes, "stepwise")
