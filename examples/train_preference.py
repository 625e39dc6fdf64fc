"""Preferences: `colossalai run --nproc_per_node 2 examples/train_preference.py --config FILE.yaml`, as `coati dpo`."""

from coati.commands import train

if __name__ == "__main__":
    train("dpo")
