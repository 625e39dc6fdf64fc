"""preference optimisation: `colossalai run --nproc_per_node 2 examples/train_preference.py --config FILE.yaml`."""

from coati.trainers.main import main


def load_trainer():
    from coati.trainers.preference import PreferenceConfig, preference_trainer

    return PreferenceConfig, preference_trainer


if __name__ == "__main__":
    main(load_trainer, "preference optimisation")
