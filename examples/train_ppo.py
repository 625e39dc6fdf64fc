"""PPO: `colossalai run --nproc_per_node 2 examples/train_ppo.py --config FILE.yaml`, as `coati ppo`."""

from coati.commands import train

if __name__ == "__main__":
    train("ppo")
