"""SFT: `colossalai run --nproc_per_node 2 examples/train_sft.py --config FILE.yaml`, as `coati sft`."""

from coati.commands import train

if __name__ == "__main__":
    train("sft")
