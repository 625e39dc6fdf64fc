"""The quickstart's data teaches what its measure measures."""

import json
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

from make_data import SIZES, make_data
from measure import is_good, measure, topics_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("quickstart"), seed=3)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_have_their_sizes_and_a_seed_gives_the_same_bytes(data, tmp_path):
    for name, size in SIZES.items():
        assert len(rows(data[name])) == size
    again = make_data(tmp_path, seed=3)
    other = make_data(tmp_path / "other", seed=4)
    assert all(data[name].read_bytes() == again[name].read_bytes() for name in SIZES)
    assert all(data[name].read_bytes() != other[name].read_bytes() for name in SIZES)


def test_every_chosen_reply_is_good_and_hardly_a_rejected_one(data):
    """One rejected reply in eight has lost a few letters, which the measure sees only if it looks for them."""
    for name in ("preference_train", "preference_eval"):
        pairs = rows(data[name])
        assert all(is_good(row["prompt"], row["chosen"]) for row in pairs)
        assert measure([row["prompt"] for row in pairs], [row["rejected"] for row in pairs]) < 0.17


def test_half_of_the_demonstrations_are_good(data):
    turns = [row["messages"] for row in rows(data["sft"])]
    assert measure([t[0]["content"] for t in turns], [t[1]["content"] for t in turns]) == 0.5


def test_no_constant_reply_satisfies_the_measure(data):
    prompts = [row["prompt"] for row in rows(data["prompts_eval"])]
    replies = {row["chosen"] for row in rows(data["preference_train"])}
    assert max(measure(prompts, [reply] * len(prompts)) for reply in replies) < 0.3
    assert all(len(topics_of(prompt)) == 1 for prompt in prompts)


def test_evaluation_messages_are_new(data):
    def asked(name):
        return {row.get("prompt") or row["messages"][0]["content"] for row in rows(data[name])}

    seen = asked("sft") | asked("preference_train") | asked("prompts_train")
    assert not seen & (asked("prompts_eval") | asked("preference_eval") | asked("sft_eval"))


def test_texts_are_short_and_survive_the_tokenizer(data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer"])
    assert len(tokenizer) == 512 and len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for row in rows(data["sft"])[:500]:
        for message, limit in zip(row["messages"], (48, 40), strict=True):
            ids = tokenizer(message["content"], add_special_tokens=False).input_ids
            assert len(ids) <= limit and tokenizer.decode(ids) == message["content"]
