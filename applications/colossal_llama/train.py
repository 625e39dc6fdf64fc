"""Continued pre-training in stages: `colossalai run --nproc_per_node 2 applications/colossal_llama/train.py --config
FILE.yaml`."""

from coati.trainers.main import main
from colossal_llama.pretraining.stage_plan import parse_stages
from colossal_llama.pretraining.stage_settings import PretrainConfig


def load_trainer():
    from colossal_llama.pretraining.pretrain_trainer import StagedPretraining

    return StagedPretraining


if __name__ == "__main__":
    main(PretrainConfig, load_trainer, "continued pre-training", parse_stages)
