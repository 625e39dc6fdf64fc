"""Models from a folder train: transformers hands them out in evaluation mode."""

from coati.config import configure
from tests.conftest import settings_for, trainer_classes


def test_gradient_checkpointing_and_dropout_are_on_for_models_from_a_folder(tiny_world, runtime, tmp_path):
    for algorithm in ("sft", "reward", "ppo"):
        config_class, trainer_class = trainer_classes(algorithm)
        changes = dict(model=tiny_world["policy"], model_config=None, gradient_checkpointing=True, steps=1)
        settings = settings_for(algorithm, tiny_world, output_dir=str(tmp_path / algorithm), **changes)
        trainer = trainer_class(configure(config_class, **settings), runtime)
        for engine in trainer.engines.values():
            layers = [m for m in engine.module.modules() if getattr(m, "gradient_checkpointing", None) is not None]
            assert layers and all(layer.training and layer.gradient_checkpointing for layer in layers)
