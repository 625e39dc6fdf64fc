"""examples/train_rm.py, but a process that gets SIGUSR1 raises an exception."""

import signal

from coati.commands import train


def fail(number, frame):
    raise RuntimeError("the test asked for this error")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, fail)
    train("reward")
