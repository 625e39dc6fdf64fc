"""GRPO and its relatives: `colossalai run --nproc_per_node 2 examples/train_grpo.py --config FILE.yaml`."""

from coati.trainers.config import GRPOConfig
from coati.trainers.main import main


def load_trainer():
    from coati.trainers.grpo import GRPOTrainer

    return GRPOTrainer


if __name__ == "__main__":
    main(GRPOConfig, load_trainer, "GRPO")
