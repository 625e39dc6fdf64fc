"""Reward model: `colossalai run --nproc_per_node 2 examples/train_rm.py --config FILE.yaml`, as `coati reward`."""

from coati.commands import train

if __name__ == "__main__":
    train("reward")
