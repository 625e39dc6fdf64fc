"""The entry point of the example scripts: parse, launch, train; errors in words."""

import atexit
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, TypeVar

from coati.config import parse_config
from coati.errors import RunError, UserError
from coati.tracking import check_installed
from coati.trainers.paths import check_paths
from coati.variables import GENERATOR
from coati.watch import watch_launcher

Config = TypeVar("Config")

SECONDS_FOR_RANK_0 = 10


def parse_run(
    config_class: type[Config],
    description: str,
    argv: list[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """The settings of a run, checked as far as that is quick.

    Args:
        argv: settings as flags, `sys.argv[1:]` if None.
        defaults: settings that a file and flags win over.

    Raises:
        UserError: see `parse_config`, `check_paths`, `check_installed` and the settings' own `check`.
    """
    config = parse_config(config_class, argv, description, defaults)
    check_paths(config)
    check_installed(config.tracking.trackers)
    config.check(max(1, _processes() // config.parallel.model_parallel_size))
    config.check_machine()
    return config


def main(config_class, load_trainer, description: str, parse=parse_run, **how):
    """Runs one training command.

    Exit status: 0 for a finished run or one that saved when it was asked to stop, 2 for a mistake of the user's, 1 for
    any other error. No rank waits for the others once it has failed.

    Args:
        load_trainer: returns the trainer class; called once the settings are known to be right, since importing torch
            takes seconds.
        parse: makes the config from its class and the description, out of the command line.
        **how: further arguments of `parse`.
    """
    is_generator = GENERATOR in os.environ
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" and not is_generator
    watch_launcher()
    runtime = None
    try:
        config = parse(config_class, description, **how)
        if config.parallel.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs
        if is_main:
            print(f"{description}: loading torch, transformers and colossalai ...", flush=True)
        if is_generator:
            from coati.trainers.generator import generate

            generate(config)
            end_process(0)
        trainer_class = load_trainer()
        from coati.parallel import launch
        from coati.parallel.runtime import shutdown

        runtime = launch(config.seed)
        trainer_class(config, runtime).train()
        shutdown()
        end_process(0)
    except UserError as error:
        if runtime is None and not is_main:
            # rank 0 says the same now, if it can: until then no launcher may see that a process has failed
            time.sleep(SECONDS_FOR_RANK_0)
        if runtime is None or runtime.first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        end_process(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        end_process(1)
    except Exception:
        if runtime is None or runtime.first_to_fail():  # another rank's error is only the echo of the first
            traceback.print_exc()
        end_process(1)


def _processes() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")))


def end_process(status: int):
    """Ends the process without Python's own clean-up, which can only spoil what is done by then.

    After an error a rank would wait in it for others that sit in a collective call. After success, a thread of gloo's
    that lets go of its last tensor meanwhile aborts the process, and a finished run counts as failed
    (pytorch/pytorch#190489). What was registered with `atexit` is run after success only.
    """
    if status == 0:
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # whoever read our output may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
