"""One YAML file, several stages: settings that all share, and a list of what each changes."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from coati.config import merge, parse_settings, read_yaml, reconfigure, take_config_path
from coati.config.plugin import PluginConfig
from coati.errors import UserError
from coati.run_layout import FINAL_MODEL
from coati.trainers.paths import check_paths
from colossal_llama.pretraining.stage_settings import PretrainConfig


@dataclass
class Plan:
    """The stages of a run, each with its own output folder."""

    stages: list[PretrainConfig]

    @property
    def seed(self) -> int:
        return self.stages[0].seed

    @property
    def parallel(self) -> PluginConfig:
        return self.stages[0].parallel

    @staticmethod
    def is_finished(stage: PretrainConfig) -> bool:
        """Whether the stage has left its model and may be skipped."""
        return stage.checkpoints.resume == "auto" and (Path(stage.output_dir) / FINAL_MODEL).is_dir()


def parse_stages(config_class: type[PretrainConfig], description: str, argv: list[str] | None = None) -> Plan:
    """Reads `--config FILE.yaml` and flags, which win over it in every stage.

    The file holds settings of all stages and `stages`, a list of mappings: each has a `name` and any settings. A stage
    starts from the model that the one before left, unless it names one; it writes to OUTPUT_DIR/NUMBER-NAME.

    Raises:
        UserError: the file, a stage or a setting is wrong.
    """
    path, flags = take_config_path(sys.argv[1:] if argv is None else argv)
    if path is None:
        parse_settings(config_class, {}, flags, "", description)  # for --help
        raise UserError("give --config FILE.yaml with the list `stages`")
    shared = read_yaml(path)
    stages = shared.pop("stages", None)
    if not isinstance(stages, list) or not stages:
        raise UserError(f"--config {path}: `stages` must be a list of stages, such as `- name: warm-up`")
    configs: list[PretrainConfig] = []
    for number, stage in enumerate(stages, 1):
        origin = f"--config {path}, stage {number}"
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{origin}: give it a name of letters, digits and dashes, such as `name: warm-up`")
        settings = merge(config_class, shared, {key: value for key, value in stage.items() if key != "name"})
        config = parse_settings(config_class, settings, flags, origin, description)
        # an earlier stage may leave a later one's model
        check_paths(reconfigure(config, model=None) if configs else config)
        if configs and "model" not in stage:
            config = reconfigure(config, model=str(Path(configs[-1].output_dir) / FINAL_MODEL), model_config=None)
        config = reconfigure(config, output_dir=str(Path(config.output_dir) / f"{number}-{name}"), run_name=name)
        config.check(1)
        configs.append(config)
    return Plan(configs)
