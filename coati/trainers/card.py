"""The model card of a finished model: what it is, how it was made, how it is loaded."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from coati.models import Critic, RewardModel
from coati.models.base import ValueHeadModel
from coati.run_layout import CRITIC
from coati.tracking import package_versions, read_metrics
from coati.trainers.resume import UNSAID

# name: what it is, and the number of its paper on arXiv
PAPERS = {
    "reward": ("reward model on pairs (Bradley-Terry)", "2203.02155"),
    "dpo": ("direct preference optimization", "2305.18290"),
    "robust": ("DPO for noisy labels", "2403.00409"),
    "hinge": ("SLiC's hinge loss", "2305.10425"),
    "ipo": ("identity preference optimization", "2310.12036"),
    "simpo": ("SimPO", "2405.14734"),
    "orpo": ("odds ratio preference optimization", "2403.07691"),
    "cpo": ("contrastive preference optimization", "2401.08417"),
    "kto": ("KTO", "2402.01306"),
    "ppo": ("proximal policy optimization with a critic", "1707.06347"),
    "grpo": ("group relative policy optimization", "2402.03300"),
    "dr_grpo": ("Dr. GRPO's advantages", "2503.20783"),
    "rloo": ("leave-one-out advantages", "2402.14740"),
    "rloo_std": ("leave-one-out advantages", "2402.14740"),
    "reinforce++": ("REINFORCE++", "2501.03262"),
    "reinforce++-baseline": ("REINFORCE++ with a baseline", "2501.03262"),
    "remax": ("ReMax's greedy baseline", "2310.10505"),
    "gspo": ("GSPO's ratio of whole responses", "2507.18071"),
    "cispo": ("CISPO's clipped weights", "2506.13585"),
    "dynamic_sampling": ("DAPO's dynamic sampling", "2503.14476"),
}
TITLES = {"sft": "supervised fine-tuning", "pretrain": "continual pre-training"}

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
    c, module, done = trainer.config, trainer.engines[name].module, methods(trainer.algorithm, trainer.config)
    start = (c.critic_model or c.reward_model or c.model) if name == CRITIC else c.model
    is_adapter = module.has_adapter and not c.merge_lora
    is_product = name == next(iter(trainer.engines))
    header = ModelCardData(
        base_model=start if start and is_on_hub(start) else None,
        datasets=sorted({dataset_name(source) for source in c.train_data if is_on_hub(source)}) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=None if isinstance(module, ValueHeadModel) else "text-generation",
        tags=["coati", *done],
    )
    body = CARD.format(
        title=c.run_name or trainer.folder.path.resolve().name,
        kind=("An adapter of a " if is_adapter else "A ") + kind_of(module),
        start=f"`{public(start)}`" if start else "random weights",
        method=", ".join(map(linked, done)),
        use=usage(module, is_adapter, c.push_to_hub if is_product and c.push_to_hub else "FOLDER"),
        data="\n".join(f"- `{public(source)}`" for source in c.train_data),
        evaluation=table(final_metrics(trainer)),
        settings=yaml.safe_dump(public(changed_settings(c)), sort_keys=False, allow_unicode=True),
        versions=", ".join(f"{package} {version}" for package, version in package_versions().items()),
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}"))


def kind_of(module) -> str:
    """What a model is, in words."""
    return {RewardModel: "reward model", Critic: "value function (a critic)"}.get(type(module), "language model")


def methods(algorithm: str, config) -> list[str]:
    """Names of what a run did, of `PAPERS` or `TITLES`."""
    if algorithm == "preference":
        return [config.loss]
    if algorithm != "grpo":
        return [algorithm]
    names = [algorithm, config.advantage, config.policy_loss, "dynamic_sampling" if config.dynamic_sampling else ""]
    return list(dict.fromkeys(name for name in names if name in PAPERS))


def linked(method: str) -> str:
    """A method in words, with a link to its paper."""
    if method not in PAPERS:
        return TITLES.get(method, method)
    words, number = PAPERS[method]
    return f"{words} ([{number}](https://arxiv.org/abs/{number}))"


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


def table(metrics: dict[str, float]) -> str:
    """Metrics as a Markdown table."""
    if not metrics:
        return "None: the run had no evaluation data."
    return "\n".join(["| metric | value |", "|---|---|", *(f"| {k} | {v:.6g} |" for k, v in metrics.items())])


def changed_settings(config) -> dict[str, Any]:
    """The settings that differ from their defaults, without those of `UNSAID`."""
    default = vars(type(config)())
    return {name: value for name, value in vars(config).items() if value != default[name] and name not in UNSAID}


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
