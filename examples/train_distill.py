"""Distillation: `colossalai run --nproc_per_node 2 examples/train_distill.py --config FILE.yaml`; `coati distill`."""

from coati.commands import train

if __name__ == "__main__":
    train("distill")
