"""The arithmetic example's data: right sums, no prompt in two files, tokens that are characters."""

import json
import re
import statistics
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))

from reward import correct
from sums import CHARACTERS, SIZES, make_data, worked_out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("sums"), seed=3)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_have_their_sizes_share_no_prompt_and_a_seed_gives_the_same_bytes(data, tmp_path):
    prompts = [row["prompt"] for name in SIZES for row in rows(data[name])]
    assert [len(rows(data[name])) for name in SIZES] == list(SIZES.values())
    assert len(set(prompts)) == len(prompts)
    again = make_data(tmp_path, seed=3)
    assert all(data[name].read_bytes() == again[name].read_bytes() for name in SIZES)


def test_no_file_is_harder_than_another(data):
    """Short sums are few: where files were filled one after the other, the last had none of them."""
    lengths = {name: [len(row["prompt"]) for row in rows(data[name])] for name in SIZES}
    everything = [length for values in lengths.values() for length in values]
    mean, spread = statistics.mean(everything), statistics.stdev(everything)
    for values in lengths.values():
        assert abs(statistics.mean(values) - mean) < 4 * spread / len(values) ** 0.5


def test_every_sum_and_every_answer_is_right(data):
    for row in rows(data["sft"])[:2000]:
        numbers = [int(number) for number in re.findall(r"[+-]?\d+", row["prompt"])]
        assert row["completion"] == worked_out(numbers) and sum(numbers) == int(row["answer"])
        assert row["completion"].rpartition("=")[2] == row["answer"]
    assert worked_out([9, 9, -9, 1]) == "+9=18-9=9+1=10"


def test_a_token_is_a_character_and_nothing_is_lost(data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data["tokenizer"])
    for row in rows(data["sft_eval"]):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert len(ids) == len(row["prompt"] + row["completion"])
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"]
    assert len(tokenizer) <= 16 and set(CHARACTERS) < set(tokenizer.get_vocab())


def test_the_last_number_is_what_earns():
    assert correct([""] * 4, ["85-12=73", "73", "85-12=74", "73="], ["73"] * 4) == [1.0, 1.0, 0.0, 0.0]
