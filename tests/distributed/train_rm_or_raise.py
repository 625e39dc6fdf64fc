"""examples/train_rm.py, but a process that gets SIGUSR1 raises an exception."""

import signal

from coati.trainers.config import RewardConfig
from coati.trainers.main import main
from examples.train_rm import load_trainer


def fail(number, frame):
    raise RuntimeError("the test asked for this error")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, fail)
    main(RewardConfig, load_trainer, "reward model")
