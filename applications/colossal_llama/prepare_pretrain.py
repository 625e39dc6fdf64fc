"""Packs documents into rows for continued pre-training.

    python applications/colossal_llama/prepare_pretrain.py --data zh.jsonl en.jsonl --tokenizer MODEL --output DATA

A killed run continues where it stopped when the same command is run again.
"""

import sys

from coati.config import parse_config
from coati.errors import run_command
from colossal_llama.data.preparation_settings import PrepareConfig


def main(argv: list[str] | None = None) -> int:
    """Prepare the data; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
    try:
        return run_command(lambda: _prepare(argv))
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this run stopped", file=sys.stderr)
        return 130


def _prepare(argv: list[str] | None) -> None:
    config = parse_config(PrepareConfig, argv, "packs documents into rows for continued pre-training")
    print("prepare_pretrain: loading transformers and datasets ...", flush=True)
    from colossal_llama.data.preparation import prepare

    prepare(config)


if __name__ == "__main__":
    sys.exit(main())
