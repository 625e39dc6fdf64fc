"""Guess the number: a small model from random weights learns to use "Higher." and "Lower.", over several turns.

python examples/guess_the_number/run.py               # data, SFT, GRPO on two CPU processes
python examples/guess_the_number/run.py --seeds 3

SFT shows games of players who guess at random and don't listen, so that the model speaks the game's language: it finds
the number in five guesses in about one game of five. What the answers mean it learns from the games it plays itself.
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from coati.environments.guess_the_number import GuessTheNumber  # noqa: E402
from coati.tracking import read_metrics, write_report  # noqa: E402
from examples.games import parser_of, train_player, write_data  # noqa: E402

HIGH, GUESSES, GAMES, MEASURED = 24, 5, 4000, 96


def main():
    arguments = parser_of(__doc__.splitlines()[0], "guess_the_number").parse_args()
    output = arguments.output.resolve()
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        folder = output / f"seed{seed}"
        data = make_data(folder / "data", seed)
        train_player(HERE, folder, data, seed, arguments.processes)
        won = [row["eval/environment/won"] for row in read_metrics(folder / "grpo") if "eval/environment/won" in row]
        print(f"seed {seed}: games won {won[0]:.1%} before, {won[-1]:.1%} after", flush=True)
    print(f"open {write_report([output], output / 'report.html')}")


def make_data(folder: Path, seed: int) -> dict[str, Path]:
    """Games for SFT, secret numbers to play for, and a tokenizer of the games' words; the same seed, the same bytes."""
    draw = random.Random(seed)
    games = [game(draw) for _ in range(GAMES)]
    rows = [{"secret": 1 + i % HIGH, "high": HIGH, "narrowing": 1.0} for i in range(HIGH * 20)]
    return write_data(folder, games, rows, rows[:MEASURED])


def game(draw: random.Random) -> dict[str, list[dict]]:
    """A dialogue with a player who guesses at random: up to five guesses, whatever the answers are."""
    environment = GuessTheNumber()
    messages = environment.reset({"secret": draw.randint(1, HIGH), "high": HIGH})
    for _ in range(GUESSES):
        messages.append({"role": "assistant", "content": str(draw.randint(1, HIGH))})
        observation = environment.step(messages[-1])
        if observation.done:
            break
        messages += observation.messages
    return {"messages": messages if messages[-1]["role"] == "assistant" else messages[:-1]}


if __name__ == "__main__":
    main()
