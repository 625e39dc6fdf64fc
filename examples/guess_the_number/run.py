"""Guess the number: a small model from random weights learns to use "Higher." and "Lower.", over several turns.

python examples/guess_the_number/run.py               # data, SFT, GRPO on two CPU processes
python examples/guess_the_number/run.py --seeds 3

SFT shows games of careless players: they guess above the bound, and heed every second time what they heard last. So the
model speaks the game's language, and finds the number in five guesses in less than one game of five. To keep within all
that it has heard, and to halve what is left, it learns from the games it plays itself.
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

HIGH, GUESSES, GAMES = 16, 5, 8000
TO_PLAY, MEASURED = 20, 32  # rows of each number; games that are measured
ABOVE, HEEDED = 40, 0.5  # careless players: their highest guess, and how much of what they heard last they heed


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
    # four halvings lead to the number: each earns 1, as the right guess does
    rows = [{"secret": secret, "high": HIGH, "narrowing": 4.0} for secret in range(1, HIGH + 1)]
    return write_data(folder, games, rows * TO_PLAY, rows * MEASURED)


def game(draw: random.Random) -> dict[str, list[dict]]:
    """A dialogue with a careless player, of up to five guesses."""
    environment = GuessTheNumber()
    messages = environment.reset({"secret": draw.randint(1, HIGH), "high": HIGH})
    low, high = 1, ABOVE  # what the last answer leaves
    for _ in range(GUESSES):
        guess = draw.randint(low, high) if draw.random() < HEEDED else draw.randint(1, ABOVE)
        if guess <= HIGH:
            low, high = (guess + 1, ABOVE) if guess < environment.secret else (1, guess - 1)
        messages.append({"role": "assistant", "content": str(guess)})
        observation = environment.step(messages[-1])
        if observation.done:
            break
        messages += observation.messages
    return {"messages": messages if messages[-1]["role"] == "assistant" else messages[:-1]}


if __name__ == "__main__":
    main()
