"""Process reward model: `colossalai run --nproc_per_node 2 examples/train_prm.py --config F.yaml`, as `coati prm`."""

from coati.commands import train

if __name__ == "__main__":
    train("prm")
