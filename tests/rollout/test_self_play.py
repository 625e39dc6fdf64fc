"""Rewards that are known only at an episode's end, and a game that a policy plays with itself."""

import pytest

from coati.environments.nim import Nim
from coati.rollout import Observation
from coati.rollout.environment import EpisodeFailed, check_observation
from coati.rollout.episodes import Episode
from coati.samples import Turn


def play(row, *moves):
    """What each move leads to."""
    game = Nim()
    game.reset(row)
    return [game.step({"role": "assistant", "content": move}) for move in moves]


def test_both_players_moves_are_rewarded_when_the_game_is_over():
    *before, last = play({"stones": 7}, "3", " 1\n", "3")
    assert [found.messages[0]["content"][:11] for found in before] == ["Nim: 4 left", "Nim: 3 left"]
    assert all(found.reward == 0 and not found.done for found in before)
    assert (last.reward, last.earlier_rewards, last.done) == (1.0, [1.0, -1.0], True)


@pytest.mark.parametrize("move", ["0", "4", "three", "1 or 2", "", "2"])
def test_a_move_that_is_none_loses_the_game_for_its_player(move):
    """Of one stone, two can't be taken."""
    [_, last] = play({"stones": 4}, "3", move)
    assert (last.reward, last.earlier_rewards, last.metrics) == (-1.0, [1.0], {"illegal": 1.0})


@pytest.mark.parametrize("second", [False, True])
def test_a_perfect_player_beats_a_random_one(second):
    """It leaves a multiple of four wherever it can; a random player gives it the chance sooner or later."""
    wins = []
    for stones in range(1, 31):
        game = Nim()
        [message] = game.reset({"stones": stones, "opponent": "random", "seed": stones, "second": second})
        found = Observation([message])
        while not found.done:
            left = int(found.messages[0]["content"].removeprefix("Nim: ").split()[0])
            found = game.step({"content": str(left % 4 or 1)})
            assert found.done or found.messages[0]["content"].startswith(f"Nim: {game.stones} left")
        wins.append(found.metrics["won"])
        assert found.earlier_rewards == [found.reward] * len(found.earlier_rewards)
    assert sum(wins) > 25


def test_games_of_a_row_are_alike():
    row = {"stones": 30, "opponent": "random", "seed": 3}
    games = [[found.messages for found in play(row, "1", "2", "1", "3")] for _ in range(2)]
    assert games[0] == games[1] != [found.messages for found in play(row | {"seed": 4}, "1", "2", "1", "3")]


def test_rewards_of_earlier_turns_are_added_and_must_fit():
    episode = Episode(prompt=None, environment=None, turns=[Turn(0, 1, 0.5), Turn(2, 3), Turn(4, 5)])
    episode.earn(Observation(reward=2.0, earlier_rewards=[1.0, -1.0]))
    assert [turn.reward for turn in episode.turns] == [1.5, -1.0, 2.0]
    episode.earn(Observation(reward=3.0))
    assert [turn.reward for turn in episode.turns] == [1.5, -1.0, 3.0]
    with pytest.raises(EpisodeFailed, match="earlier_rewards has 1 numbers, 2 turns were before"):
        episode.earn(Observation(earlier_rewards=[1.0]))
    for bad in (["much"], [float("nan")]):
        with pytest.raises(EpisodeFailed, match="a reward of"):
            check_observation(Observation(earlier_rewards=bad, done=True))


@pytest.mark.parametrize("stones", [0, True, 1.5])
def test_a_row_without_stones_is_refused(stones):
    with pytest.raises(ValueError, match=f"a game of {stones} stones"):
        Nim().reset({"stones": stones})


def test_a_game_that_is_cut_is_not_won():
    [found] = play({"stones": 30, "opponent": "random", "seed": 0}, "1")
    assert found.metrics == {"won": 0.0, "illegal": 0.0}
