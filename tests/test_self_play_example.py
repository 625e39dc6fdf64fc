"""The example of self-play: its data, and what a perfect player is measured at."""

import json
import random
import statistics

from coati.environments.nim import MOST, Nim
from examples.self_play.run import STONES, game, games_of_a_perfect_player, make_data


def test_games_for_sft_are_legal_and_end():
    draw = random.Random(0)
    for _ in range(50):
        messages = game(draw)
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        left = int(messages[0]["content"].removeprefix("Nim: ").split()[0])
        for said, move in zip(messages[::2], messages[1::2], strict=True):
            assert said["content"].startswith(f"Nim: {left} left")
            assert 1 <= int(move["content"]) <= min(MOST, left)
            left -= int(move["content"])
        assert left == 0


def test_the_same_seed_gives_the_same_bytes_and_rows_can_be_played(tmp_path):
    first, second = make_data(tmp_path / "a", 1), make_data(tmp_path / "b", 1)
    for name in ("games", "rows", "measured"):
        assert first[name].read_bytes() == second[name].read_bytes()
    rows = [json.loads(line) for name in ("rows", "measured") for line in first[name].read_text().splitlines()]
    assert {row["stones"] for row in rows} == set(STONES)
    for row in rows:
        Nim().reset(row)
    won = statistics.mean(games_of_a_perfect_player(first["measured"]))
    assert won > 0.9
