"""reward model: `colossalai run --nproc_per_node 2 examples/train_rm.py --config FILE.yaml`."""

from coati.trainers.config import RewardConfig
from coati.trainers.main import main


def load_trainer():
    from coati.trainers.reward import RewardTrainer

    return RewardTrainer


if __name__ == "__main__":
    main(RewardConfig, load_trainer, "reward model")
