"""supervised fine-tuning: `colossalai run --nproc_per_node 2 examples/train_sft.py --config FILE.yaml`."""

from coati.trainers.config import SFTConfig
from coati.trainers.main import main


def load_trainer():
    from coati.trainers.sft import SFTTrainer

    return SFTTrainer


if __name__ == "__main__":
    main(SFTConfig, load_trainer, "supervised fine-tuning")
