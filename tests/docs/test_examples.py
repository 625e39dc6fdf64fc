"""What documentation claims is executed: the doctests of coati, and every example's settings."""

import doctest
import importlib
import runpy
from pathlib import Path

import pytest

from coati.config import parse_config

ROOT = Path(__file__).resolve().parents[1]
WITH_DOCTEST = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "coati").rglob("*.py"))
    if ">>> " in path.read_text()
]
STARTS = ("sft", "reward", "preference", "ppo", "grpo")
SETTINGS = sorted(p for p in (ROOT / "examples").rglob("*.yaml") if p.stem.startswith(STARTS))


def test_there_are_settings_of_every_algorithm():
    assert {path.stem.partition("_")[0] for path in SETTINGS} == set(STARTS)


def test_the_worked_example_of_the_losses_is_among_them():
    """PITFALL 9: the doctest that shows the mean of means to be another number."""
    assert "coati.losses" in WITH_DOCTEST


@pytest.mark.parametrize("name", WITH_DOCTEST)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_code_that_pages_quote_is_the_code_of_now():
    script = runpy.run_path(str(ROOT / "tools" / "write_quotes.py"))
    pages = script["pages_with_quotes"]()
    assert pages
    for page in pages:
        assert script["filled"](page.read_text()) == page.read_text(), "run tools/write_quotes.py"


def config_class(path: Path):
    """By the file's name: sft*.yaml, reward*.yaml, preference*.yaml, ppo*.yaml, grpo*.yaml."""
    if path.stem.startswith("preference"):
        from coati.trainers.preference import PreferenceConfig

        return PreferenceConfig
    if path.stem.startswith("sft"):
        from coati.trainers.sft import SFTConfig

        return SFTConfig
    if path.stem.startswith("reward"):
        from coati.trainers.reward import RewardConfig

        return RewardConfig
    if path.stem.startswith("grpo"):
        from coati.trainers.grpo import GRPOConfig

        return GRPOConfig
    from coati.trainers.ppo import PPOConfig

    return PPOConfig


@pytest.mark.parametrize("path", SETTINGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_example_settings_parse_and_fit_together(path):
    """Keys are fields, values have the right types, and sizes fit on the number of processes that the file is for."""
    config = parse_config(config_class(path), ["--config", str(path)])
    config.check(
        world_size=8 if "8gpu" in path.stem else 2 if path.parent.name != "configs" or "quickstart" in path.parts else 1
    )
