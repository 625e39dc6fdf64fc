"""preference optimisation: `colossalai run --nproc_per_node 2 examples/train_preference.py --config FILE.yaml`."""

from coati.trainers.config import PreferenceConfig
from coati.trainers.main import main


def load_trainer():
    from coati.trainers.preference import preference_trainer

    return preference_trainer


if __name__ == "__main__":
    main(PreferenceConfig, load_trainer, "preference optimisation")
