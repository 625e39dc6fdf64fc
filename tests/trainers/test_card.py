"""The model card in the finished model's folder."""

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from coati.commands import COMMANDS
from coati.config import configure
from coati.run_layout import FINAL_MODEL
from coati.tracking import read_metrics
from coati.trainers import card
from coati.trainers.algorithms import ALGORITHMS
from tests.conftest import reward_model, settings_for, trainer_classes


def train(algorithm, world, runtime, output, /, **changes) -> Path:
    config_class, trainer_class = trainer_classes(algorithm)
    settings = settings_for(algorithm, world, output_dir=str(output), steps=1, **changes)
    trainer_class(configure(config_class, **settings), runtime).train()
    return output / FINAL_MODEL


def settings_in(text: str) -> dict:
    [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return yaml.safe_load(block)


def run_example(text: str, folder: Path) -> str:
    """What the code of a card prints, on this model."""
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code.replace("FOLDER", str(folder)), "README.md", "exec"), {})
    return said.getvalue()


def test_a_policy_says_what_it_is_and_how_it_was_made(tiny_world, runtime, tmp_path):
    folder = train("preference", tiny_world, runtime, tmp_path / "a run", beta=0.3)
    found = ModelCard.load(folder / "README.md")
    assert found.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["coati", "dpo"],
    }
    assert found.text.lstrip().startswith("# a run\n\nA language model, trained with coati from `")
    assert f"from `{tiny_world['policy']}`" in found.text
    assert "[2305.18290](https://arxiv.org/abs/2305.18290)" in found.text
    assert f"- `{tiny_world['pairs']}`" in found.text
    metrics = read_metrics(tmp_path / "a run")[-1]
    for name in ("loss", "accuracy"):
        assert f"| {name} | {metrics[f'eval/{name}']:.6g} |" in found.text
    assert "| tokens |" not in found.text  # of training
    given = settings_in(found.text)
    assert given["algorithm"] == {"type": "dpo", "beta": 0.3}
    assert (given["optimizer"]["learning_rate"], given["steps"]) == (3e-3, 1)
    assert {"seed", "output_dir", "tracking"}.isdisjoint(given) and "cache_dir" not in given["data"]
    for package in ("torch", "transformers", "peft", "coati"):
        assert re.search(rf"{package} \d", found.text)
    run_example(found.text, folder)


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_is_told_from_a_whole_model(merge, tiny_world, runtime, tmp_path):
    changes = dict(lora_rank=2, merge_lora=merge, model=tiny_world["policy"], model_config=None)
    folder = train("sft", tiny_world, runtime, tmp_path / "run", **changes)
    found = ModelCard.load(folder / "README.md")
    assert found.data.library_name == ("transformers" if merge else "peft")
    kind = "A language model" if merge else "An adapter of a language model"
    assert f"\n{kind}, trained with coati from `{tiny_world['policy']}`. Method: Supervised" in found.text
    assert ("AutoPeftModelForCausalLM" in found.text) == (not merge)
    assert "PeftModel" not in found.content.split("## Use")[0]  # peft's own card is replaced
    run_example(found.text, folder)


def test_reward_models_and_critics_are_loaded_with_their_heads(tiny_world, runtime, tmp_path):
    reward = train("reward", tiny_world, runtime, tmp_path / "reward", eval_data=[])
    text = (reward / "README.md").read_text()
    assert "\nA reward model, trained with coati from random weights." in text
    assert "None: the run had no evaluation data." in text
    assert re.match(r"tensor\(\[-?[\d.e-]+\]", run_example(text, reward))
    changes = dict(rewards=[reward_model(reward)], tokenizer=tiny_world["tokenizer"])
    train("ppo", tiny_world, runtime, tmp_path / "ppo", eval_data=[], **changes)
    critic = tmp_path / "ppo" / "critic"
    text = (critic / "README.md").read_text()
    assert f"\nA value function (a critic), trained with coati from `{reward}`." in text
    assert re.match(r"tensor\(\[\[", run_example(text, critic))


def test_the_card_is_tried_before_the_first_step(tiny_world, runtime, tmp_path, monkeypatch):
    """What fails in it would cost the finished model."""
    monkeypatch.setattr(card, "package_versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("sft", tiny_world, runtime, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_folder_that_a_run_starts_from_is_left_as_it_is(tiny_world, runtime, tmp_path):
    base = tmp_path / "base"
    (tmp_path / "base").mkdir()
    for path in Path(tiny_world["policy"]).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "README.md").write_text("theirs")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    folder = train("sft", tiny_world, runtime, tmp_path / "run", model=str(base), model_config=None)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert {path.name for path in folder.iterdir()} - {"chat_template.jinja"} == before.keys() - {"chat_template.jinja"}


def test_every_method_is_named_with_its_paper():
    for command in COMMANDS.values():
        chosen = {"algorithm": command.name} if command.defaults else {}
        if command.name == "echo":
            chosen["environment"] = "coati.environments.nim:Nim"
        config = configure(ALGORITHMS[command.algorithm].config, **chosen)
        name, words = card.method_of(SimpleNamespace(config=config, algorithm=command.algorithm))
        assert name == command.name
        assert re.search(r"\[\d{4}\.\d{5}\]\(https://arxiv", words) or name == "sft"


def test_hub_names_are_in_the_header():
    """As the hub reads it: names alone, without configs and splits."""
    sources = ["trl-lib/data:train[:100]", "org/name/config:test", "gsm8k", "trl-lib/data:test"]
    assert all(map(card.is_on_hub, sources)) and not card.is_on_hub(str(Path(__file__)))
    assert not card.is_on_hub(f"{__file__}:train[:9]")
    assert sorted(set(map(card.dataset_name, sources))) == ["gsm8k", "org/name", "trl-lib/data"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("HOME/models/a", "~/models/a"),
        ("HOME", "~"),
        ("HOMEbrew/a", "HOMEbrew/a"),
        (["HOME/a.jsonl", "org/name"], ["~/a.jsonl", "org/name"]),
        ({"x": "HOME/a"}, {"x": "~/a"}),
        ("https://me:secret@host:8000/score", "https://host:8000/score"),
        ("https://host/a@b", "https://host/a@b"),
        (3, 3),
        (None, None),
    ],
)
def test_others_read_neither_the_home_folder_nor_passwords(value, shown):
    def at_home(part):
        if isinstance(part, dict):
            return {key: at_home(entry) for key, entry in part.items()}
        if isinstance(part, list):
            return list(map(at_home, part))
        return part.replace("HOME", str(Path.home())) if isinstance(part, str) else part

    expected = at_home(shown) if "HOME" in str(shown) else shown
    assert card.public(at_home(value)) == expected
