"""The entry point of the example scripts: parse, launch, train; errors in words."""

import os
import sys

from coati.config import parse_config
from coati.errors import UserError


def main(load_trainer, description: str):
    """Runs one training script.

    Args:
        load_trainer: returns `(config class, trainer class)`; called late, since importing torch takes seconds and the
            user should see a line first.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main and "--help" not in sys.argv and "-h" not in sys.argv:
        print(f"{description}: loading torch, transformers and colossalai ...", flush=True)
    runtime = None
    try:
        config_class, trainer_class = load_trainer()
        config = parse_config(config_class, description=description)
        from coati.parallel import launch
        from coati.parallel.launch import shutdown

        runtime = launch(config.seed)
        trainer_class(config, runtime).train()
        shutdown()
    except UserError as error:
        if runtime.first_to_fail() if runtime else is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        os._exit(2)  # without waiting for ranks that sit in a collective call
    except Exception:
        if runtime is None or runtime.first_to_fail():
            raise
        os._exit(1)  # another rank failed first and said why; this is only its echo
