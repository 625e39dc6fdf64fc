"""`coati serve --engine vllm`: vLLM's own server, with a model that coati finds."""

import argparse
import json
import os
import sys
from pathlib import Path

from coati.config.generation import check_vllm
from coati.errors import UserError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the highest rank of adapters that vLLM may be told
KEY = "VLLM_API_KEY"


def become_server(folders: dict[str, Path], options: argparse.Namespace, token: str | None):
    """Replaces this process by vLLM's server, which says itself when it is ready.

    Args:
        folders: of the models, or of adapters, by their names.
        options: those of `coati serve`.
        token: that clients must send; it is told by a variable, which other users of the machine don't see.

    Raises:
        UserError: vLLM isn't installed, or can't do what is wanted.
    """
    check_vllm("engine")
    if len(folders) > 1:
        raise UserError(f"--engine vllm serves one model, not {len(folders)}: start a server for each")
    if options.port == 0:
        raise UserError("--engine vllm needs a --port other than 0")
    for flag in ("max_queue", "max_body"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag} is for --engine coati: leave it out")
    [(name, folder)] = folders.items()
    variables = os.environ | ({KEY: token} if token else {})
    os.execvpe(sys.executable, server_command(name, folder, options), variables)


def server_command(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """The words that start vLLM's server.

    Args:
        folder: of the model, or of an adapter, whose base is served beside it under the name NAME-base.

    Raises:
        UserError: an adapter of a rank that vLLM doesn't take.
    """
    import torch

    from coati.models.lora import base_of_adapter, is_adapter

    dtype = options.dtype
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"  # as `--engine coati`
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    if is_adapter(folder):
        rank = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        highest = next((one for one in RANKS if one >= rank), None)
        if highest is None:
            raise UserError(
                f"the adapter in {folder} has rank {rank}, and vLLM takes up to {RANKS[-1]}: merge it first"
            )
        words += [str(base_of_adapter(folder)), "--served-model-name", f"{name}-base"]
        words += ["--enable-lora", "--max-lora-rank", str(highest), "--lora-modules", f"{name}={folder}"]
    else:
        words += [str(folder), "--served-model-name", name]
    words += ["--host", options.host, "--port", str(options.port), "--dtype", dtype]
    words += ["--max-num-seqs", str(options.slots)]
    return words + (["--max-model-len", str(options.max_length)] if options.max_length else [])
