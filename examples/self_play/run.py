"""Self-play: a small model from random weights learns Nim from games with itself, on two CPU processes.

python examples/self_play/run.py
python examples/self_play/run.py --seeds 3 --write_docs     # and the table of docs/environments.md

SFT shows games of random players, so that the model speaks the game's language. All else it finds out by playing both
players: the moves of a game's winner are encouraged, those of its loser discouraged, compared with the same move of
other games from as many stones. It never sees the random player that it is measured against.
"""

import json
import random
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from coati.environments.nim import MOST, Nim  # noqa: E402
from coati.rollout import Observation  # noqa: E402
from coati.tracking import read_metrics, read_run, write_report  # noqa: E402
from examples.games import parser_of, train_player, write_data  # noqa: E402
from examples.stages import fill_figures  # noqa: E402

STONES, GAMES = range(2, 13), 6000
# Against the random player. From fewer stones nobody wins 95 % of the games: too many begin from a lost position.
MEASURED_STONES, MEASURED = range(9, 13), 64  # and games from each number of stones and from each side


def main():
    parser = parser_of(__doc__.splitlines()[0], "self_play")
    parser.add_argument("--write_docs", action="store_true", help="put the table into docs/environments.md too")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        folder = output / f"seed{seed}"
        data = make_data(folder / "data", seed)
        train_player(HERE, folder, data, seed, arguments.processes)
    table = figures(sorted(output.glob("seed*")))
    (output / "figures.md").write_text(table + "\n")
    print(table)
    if arguments.write_docs:
        fill_figures(ROOT / "docs" / "environments.md", table, "self-play")
    print(f"open {write_report([output], output / 'report.html')}")


def make_data(folder: Path, seed: int) -> dict[str, Path]:
    """Games for SFT, starts of games to play, games against the random player, and a tokenizer of the games' words; the
    same seed, the same bytes."""
    draw = random.Random(seed)
    games = [{"messages": game(draw)} for _ in range(GAMES)]
    against = [
        {"stones": stones, "opponent": "random", "seed": draw.randrange(2**32), "second": second}
        for stones in MEASURED_STONES
        for second in (False, True)
        for _ in range(MEASURED)
    ]
    rows = [{"stones": stones} for stones in STONES] * 20
    return write_data(folder, games, rows, against)


def game(draw: random.Random) -> list[dict]:
    """Two random players' game."""
    nim = Nim()
    messages, found = nim.reset({"stones": draw.choice(STONES)}), Observation()
    while not found.done:
        messages += [*found.messages, {"role": "assistant", "content": str(draw.randint(1, min(MOST, nim.stones)))}]
        found = nim.step(messages[-1])
    return messages


def figures(folders: list[Path]) -> str:
    """Games won against the random player, from 9 to 12 stones and from either side."""
    lines = [
        "| seed | minutes | won before | won after | by a perfect player | illegal before | after |",
        "|---" * 7 + "|",
    ]
    for folder in folders:
        rows, run = read_metrics(folder / "grpo"), read_run(folder / "grpo")
        evaluated = [row for row in rows if "eval/environment/won" in row]
        won, illegal = (
            [f"{row[f'eval/environment/{name}']:.1%}" for row in (evaluated[0], evaluated[-1])]
            for name in ("won", "illegal")
        )
        perfect = statistics.mean(games_of_a_perfect_player(folder / "data" / "measured.jsonl"))
        cells = [folder.name.removeprefix("seed"), f"{(rows[-1]['time'] - run['start']) / 60:.1f}"]
        lines.append(f"| {' | '.join([*cells, *won, f'{perfect:.1%}', *illegal])} |")
    return "\n".join(lines)


def games_of_a_perfect_player(path: Path) -> list[float]:
    """Whether it wins each of the measured games: it leaves a multiple of 4 where it can."""
    won = []
    for line in path.read_text().splitlines():
        nim, found = Nim(), Observation()
        nim.reset(json.loads(line))
        while not found.done:
            found = nim.step({"role": "assistant", "content": str(nim.stones % (MOST + 1) or 1)})
        won.append(found.metrics["won"])
    return won


if __name__ == "__main__":
    main()
