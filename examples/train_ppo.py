"""PPO: `colossalai run --nproc_per_node 2 examples/train_ppo.py --config FILE.yaml`."""

from coati.trainers.config import PPOConfig
from coati.trainers.main import main


def load_trainer():
    from coati.trainers.ppo import PPOTrainer

    return PPOTrainer


if __name__ == "__main__":
    main(PPOConfig, load_trainer, "PPO")
