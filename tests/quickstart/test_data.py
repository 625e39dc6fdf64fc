"""The quickstart's data generator, its tokenizer and its independent measure."""

import importlib.util
import json
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"


def load_script(name: str):
    """The module of a script in examples/quickstart, which is no package."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = load_script("make_data")
measure = load_script("measure")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    return make_data.make_data(tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(scope="module")
def rows(paths) -> dict[str, list[dict]]:
    return {name: read(path) for name, path in paths.items() if name != "tokenizer"}


@pytest.fixture(scope="module")
def tokenizer(paths):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(paths["tokenizer"])


def messages_of(rows: list[dict]) -> list[str]:
    return [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_have_the_documented_sizes_and_no_message_twice(rows):
    assert {name: len(file) for name, file in rows.items()} == make_data.SIZES
    for name, file in rows.items():
        assert len(set(messages_of(file))) == len(file), name


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(paths, tmp_path):
    first = file_bytes(paths["sft"].parent)
    make_data.make_data(tmp_path / "again", seed=0)
    assert file_bytes(tmp_path / "again") == first
    make_data.make_data(tmp_path / "again", seed=1)  # over the old files: nothing of them may stay
    other = file_bytes(tmp_path / "again")
    assert other.keys() == first.keys()
    assert other["sft.jsonl"] != first["sft.jsonl"]


@pytest.mark.parametrize("name", ["preference_train", "preference_eval"])
def test_every_chosen_reply_is_good_and_every_rejected_one_is_bad(rows, name):
    prompts = messages_of(rows[name])
    wrong = [row for row in rows[name] if not measure.is_good(row["prompt"], row["chosen"])]
    assert not wrong
    wrong = [row for row in rows[name] if measure.is_good(row["prompt"], row["rejected"])]
    assert not wrong
    assert measure.measure(prompts, [row["chosen"] for row in rows[name]]) == 1.0
    assert measure.measure(prompts, [row["rejected"] for row in rows[name]]) == 0.0


def test_half_of_the_sft_replies_are_good(rows):
    replies = [row["messages"][1]["content"] for row in rows["sft"]]
    assert measure.measure(messages_of(rows["sft"]), replies) == 0.5


def test_no_reply_is_good_for_every_message(rows):
    prompts = messages_of(rows["prompts_eval"])
    polite = "Thank you, we are happy to help with your"
    for topic in measure.TOPICS:
        assert measure.measure(prompts, [f"{polite} {topic}."] * len(prompts)) < 0.25
    for constant in (f"{polite} message.", f"{polite} {' and '.join(sorted(measure.TOPICS))}.", ""):
        assert measure.measure(prompts, [constant] * len(prompts)) == 0.0


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        ("Thank you for asking. Your REFUND is on its way.", True),
        ("Your refund is on its way.", False),  # not polite
        ("Thank you for asking. Your invoice is in the mail.", False),  # another topic
        ("Thank you for asking. Your refund is on its way. Go away.", False),  # rude after all
    ],
)
def test_measure_needs_politeness_and_the_topic(reply, good):
    prompt = "User: Where is the refund for my red kettle?\nAssistant:"
    assert measure.measure([prompt], [reply]) == float(good)


def test_measure_refuses_unequal_or_empty_lists():
    with pytest.raises(ValueError, match="1 and 2"):
        measure.measure(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 and 0"):
        measure.measure([], [])


def test_each_message_names_one_topic_and_all_topics_occur(rows):
    found = [measure.topics_of(message) for file in rows.values() for message in messages_of(file)]
    assert {len(topics) for topics in found} == {1}
    assert frozenset().union(*found) == measure.TOPICS


def test_evaluation_is_about_colours_and_items_that_training_never_shows(rows):
    book = make_data.yaml.safe_load(make_data.PHRASES.read_text(encoding="utf-8"))

    def pairs(*names: str) -> set[tuple[str, str]]:
        texts = " ".join(message for name in names for message in messages_of(rows[name]))
        return {(c, i) for c in book["colours"] for i in book["items"] if f"{c} {i}" in texts}

    train = pairs("sft", "preference_train", "prompts_train")
    evaluation = pairs("preference_eval", "prompts_eval")
    assert len(train) == 216 and len(evaluation) == 24
    assert not train & evaluation


def test_texts_are_short_and_survive_the_tokenizer(rows, tokenizer):
    replies = [row["messages"][1]["content"] for row in rows["sft"]]
    replies += [row[side] for row in rows["preference_train"] for side in ("chosen", "rejected")]
    messages = [message for file in rows.values() for message in messages_of(file)]
    for texts, limit in ((messages, 30), (replies, 25)):
        ids = tokenizer(texts)["input_ids"]
        assert max(map(len, ids)) <= limit
        assert tokenizer.batch_decode(ids) == texts


def test_tokenizer_has_distinct_special_tokens_and_round_trips_any_text(tokenizer):
    assert len(tokenizer) == make_data.VOCAB_SIZE
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert special == [0, 1, 2]
    assert tokenizer.chat_template is None
    text = "Grüße, 日本語 🙂\n  \ttwo  spaces , and 'quotes' ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("Hello<eos>")["input_ids"][-1] == tokenizer.eos_token_id
