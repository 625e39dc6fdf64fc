"""Continued pre-training in stages: `colossalai run --nproc_per_node 2 applications/colossal_llama/train.py --config
FILE.yaml`."""

from coati.trainers.main import main


def load_trainer():
    from colossal_llama.pretraining import PretrainConfig, StagedPretraining

    return PretrainConfig, StagedPretraining


def parse(config_class, description: str):
    from colossal_llama.stages import parse_stages

    return parse_stages(config_class, description)


if __name__ == "__main__":
    main(load_trainer, "continued pre-training", parse)
