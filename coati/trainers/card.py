"""The model card of a finished model: what it is, how it was made, how it is loaded."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from coati.config import configure
from coati.config.parse import in_sections
from coati.config.schema import by_path
from coati.models import Critic, ObjectiveRewardModel, ProcessRewardModel, RewardModel
from coati.models.base import ValueHeadModel
from coati.run_layout import CRITIC
from coati.tracking import package_versions, read_metrics
from coati.trainers.resume import said

TITLES = {"sft": "Supervised fine-tuning", "pretrain": "Continual pre-training"}

CARD = """\
# {title}

{kind}, trained with coati from {start}. Method: {method}.

## Use

```python
{use}
```

## Data

{data}

## Evaluation

{evaluation}

## Settings

Those that differ from the defaults; what a run writes where is left out.

```yaml
{settings}```

Made with {versions}.
"""


def model_card(trainer, name: str) -> str:
    """The README.md of a finished model, on rank 0.

    Args:
        trainer: after its last step.
        name: of one of its engines.
    """
    c, module, (method, method_in_words) = trainer.config, trainer.engines[name].module, method_of(trainer)
    start, sources, hub = c.model.path, c.data.train_data, c.export.push_to_hub
    if name == CRITIC:
        start = c.algorithm.critic_model or c.reward_model or start
    is_adapter = module.has_adapter and not c.export.merge_lora
    is_product = name == next(iter(trainer.engines))
    header = ModelCardData(
        base_model=start if start and is_on_hub(start) else None,
        datasets=sorted({dataset_name(source) for source in sources if is_on_hub(source)}) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=None if isinstance(module, ValueHeadModel) else "text-generation",
        tags=["coati", method],
    )
    body = CARD.format(
        title=c.tracking.run_name or trainer.folder.path.resolve().name,
        kind=("An adapter of a " if is_adapter else "A ") + kind_of(module),
        start=f"`{public(start)}`" if start else "random weights",
        method=method_in_words,
        use=usage(module, is_adapter, hub if is_product and hub else "FOLDER"),
        data="\n".join(f"- `{public(source)}`" for source in sources),
        evaluation=metrics_table(final_metrics(trainer)),
        settings=yaml.safe_dump(public(changed_settings(c)), sort_keys=False, allow_unicode=True),
        versions=", ".join(f"{package} {version}" for package, version in package_versions().items()),
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}"))


def kind_of(module) -> str:
    """What a model is, in words."""
    names = {RewardModel: "reward model", ProcessRewardModel: "process reward model"}
    names |= {Critic: "value function (a critic)", ObjectiveRewardModel: "reward model of several objectives"}
    return names.get(type(module), "language model")


def method_of(trainer) -> tuple[str, str]:
    """The name of a run's method, and what it is, with links to its papers."""
    settings = getattr(trainer.config, "algorithm", None)
    if settings is None:
        return trainer.algorithm, TITLES.get(trainer.algorithm, trainer.algorithm)
    words = type(settings).__doc__.partition("\n")[0].rstrip(".")
    return settings.type, re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", words)


def usage(module, is_adapter: bool, place: str) -> str:
    """Code that loads a model."""
    if isinstance(module, ValueHeadModel):
        name = type(module).__name__
        return (
            f"from coati.models import {name}\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = {name}("{place}").eval()\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
            'batch = tokenizer(["PROMPT AND RESPONSE"], return_tensors="pt")\n'
            "print(model(batch.input_ids, batch.attention_mask))"
        )
    auto, package = ("AutoPeftModelForCausalLM", "peft") if is_adapter else ("AutoModelForCausalLM", "transformers")
    imports = f"from {package} import {auto}\nfrom transformers import AutoTokenizer"
    return (
        f'{imports}\n\nmodel = {auto}.from_pretrained("{place}")\ntokenizer = AutoTokenizer.from_pretrained("{place}")'
    )


def final_metrics(trainer) -> dict[str, float]:
    """The evaluation after the last step; empty without one."""
    rows = [row for row in read_metrics(trainer.folder.path) if row["step"] == trainer.steps_done]
    found = {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}
    return {name.removeprefix("eval/"): value for name, value in found.items()}


def metrics_table(metrics: dict[str, float]) -> str:
    """Metrics as a Markdown table."""
    if not metrics:
        return "None: the run had no evaluation data."
    return "\n".join(["| metric | value |", "|---|---|", *(f"| {k} | {v:.6g} |" for k, v in metrics.items())])


def changed_settings(config) -> dict[str, Any]:
    """The settings that differ from their defaults, without those of `UNSAID`."""
    method = getattr(config, "algorithm", None)
    default = by_path(configure(type(config), **({} if method is None else {"algorithm": method.type})))
    changed = {p: v for p, v in said(config).items() if p == "algorithm.type" or v != default[p]}
    return in_sections(changed)


def public(value):
    """A setting as others may read it: the home folder is `~` again, as it may have been given, and a URL has no
    user and password."""
    if isinstance(value, dict):
        return {key: public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"(?<=://)[^/@\s]*@", "", value)
    home = str(Path.home())
    return "~" + text[len(home) :] if text == home or text.startswith(home + "/") else text


def is_on_hub(source: str) -> bool:
    """Whether a model or data set of the settings, which has been loaded, is none of this machine."""
    return not Path(source).exists() and not Path(source.partition(":")[0]).exists()


def dataset_name(source: str) -> str:
    """`org/name` of a data set that is given as `org/name/config:split`."""
    return "/".join(source.partition(":")[0].split("/")[:2])
