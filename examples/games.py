"""What the examples of games have in common: SFT on games of bad players, then GRPO on games of the model's own."""

import argparse
from pathlib import Path

from examples.smollm2.tasks import write_rows
from examples.stages import ROOT, train
from examples.tokenizer import byte_level_tokenizer

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def parser_of(title: str, name: str) -> argparse.ArgumentParser:
    """Which seeds, on how many processes, and where to.

    Args:
        name: of the example's folder under runs/.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, each with another seed")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / name, help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    return parser


def write_data(folder: Path, games: list[dict], rows: list[dict], measured: list[dict]) -> dict[str, Path]:
    """Games for SFT, rows to play, rows to measure by, and a tokenizer of the games' words: files by name."""
    files = {"games": games, "rows": rows, "measured": measured}
    paths = {name: write_rows(folder / f"{name}.jsonl", of_file) for name, of_file in files.items()}
    texts = [message["content"] for one in games for message in one["messages"]]
    texts += [f"User: {text}\nAssistant: {text}" for text in texts]
    byte_level_tokenizer(texts, 384, SPECIAL).save_pretrained(folder / "tokenizer")
    return paths | {"tokenizer": folder / "tokenizer"}


def train_player(settings: Path, folder: Path, data: dict[str, Path], seed: int, processes: int):
    """SFT and GRPO.

    Args:
        settings: the folder of sft.yaml and grpo.yaml; data: as `write_data` gives it.
    """
    common = {"seed": seed, "cache_dir": folder / "cache"}
    of_sft = {"train_data": data["games"], "tokenizer": data["tokenizer"]}
    train("sft", settings / "sft.yaml", folder / "sft", common | of_sft, processes)
    of_grpo = {"train_data": data["rows"], "eval_data": data["measured"], "model": folder / "sft" / "model"}
    train("grpo", settings / "grpo.yaml", folder / "grpo", common | of_grpo, processes)
