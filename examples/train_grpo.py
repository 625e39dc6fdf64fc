"""GRPO: `colossalai run --nproc_per_node 2 examples/train_grpo.py --config FILE.yaml`, as `coati grpo`."""

from coati.commands import train

if __name__ == "__main__":
    train("grpo")
