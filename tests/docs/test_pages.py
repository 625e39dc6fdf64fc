"""What the README and the docs say is executed: their commands, examples, formats, errors, metrics and links."""

import ast
import doctest
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coati.config import configure
from coati.errors import UserError
from coati.tracking import read_metrics
from tests.conftest import ROOT, settings_for, trainer_classes, write_rows
from tests.docs.pages import PAGES, blocks, explained_errors, text_of


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_world) -> dict[str, str]:
    """The tiny world, with prompts that carry an answer for rewards by rule, and a root for documented paths."""
    root = tmp_path_factory.mktemp("documented")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(12)]
    prompts = write_rows(root / "prompts.jsonl", rows)
    return tiny_world | {"prompts": prompts, "prompts_eval": prompts, "root": str(root)}


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in p.read_text(encoding="utf-8")], ids=lambda p: p.name)
def test_examples_of_a_page_give_what_they_say(page):
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0


def test_the_worked_algorithm_trains_as_the_real_one(tiny_world, runtime, tmp_path):
    """CONTRIBUTING's DPO, for three steps; the curve is that of `coati/trainers/dpo.py`."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(page))
    worked: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), worked)
    settings = settings_for("preference", tiny_world, steps=3, eval_every=1) | dict(algorithm="dpo")
    config_class, trainer_class = trainer_classes("preference")
    trainer_class(configure(config_class, **settings | dict(output_dir=str(tmp_path / "real"))), runtime).train()
    settings = {name: value for name, value in settings.items() if name != "algorithm"}
    worked_config = configure(worked["PlainDPOConfig"], **settings | dict(output_dir=str(tmp_path / "worked")))
    worked["PlainDPOTrainer"](worked_config, runtime).train()
    real, ours = (read_metrics(tmp_path / name) for name in ("real", "worked"))
    assert len(ours) == 4
    for row, expected in zip(ours, real, strict=True):
        names = [name for name in row if name.removeprefix("eval/") in ("loss", "accuracy", "pairs")]
        assert names and {n: row[n] for n in names} == pytest.approx({n: expected[n] for n in names}, rel=1e-3)


def test_reward_examples_give_what_they_say():
    namespace = runpy.run_path(str(ROOT / "examples" / "rewards.py"))
    for name in ("brevity", "final_number"):
        [test] = doctest.DocTestFinder().find(namespace[name], name, globs=dict(namespace))
        assert doctest.DocTestRunner().run(test) == (0, 1)


SCRIPTS = {page.name: block for page in PAGES for block in blocks(page, "python") if ">>> " not in block}


@pytest.mark.parametrize("page", SCRIPTS)
def test_python_blocks_run(page, place, runtime, tmp_path, monkeypatch):
    """Blocks without prompts are whole scripts; they run with paths of the tiny world and two steps."""
    import coati.parallel
    from coati.models import RewardModel

    monkeypatch.setattr(coati.parallel, "launch", lambda: runtime)
    RewardModel(place["policy"]).save_pretrained(tmp_path / "scorer")
    real = {
        "runs/quickstart/sft/model": place["policy"],
        "runs/quickstart/reward/model": str(tmp_path / "scorer"),
        "runs/quickstart/data/sft.jsonl": place["sft"],
        "runs/quickstart/data/prompts_train.jsonl": place["prompts"],
        "runs/demo": str(tmp_path),
        "steps=20": f"steps=2, batch_size=4, cache_dir={place['cache']!r}",
        "steps=1,": f"steps=1, cache_dir={place['cache']!r},",
    }
    block = SCRIPTS[page]
    for documented, replacement in real.items():
        block = block.replace(documented, replacement)
    assert "runs/" not in block
    exec(compile(block, page, "exec"), {})
    assert list(tmp_path.glob("*/model/config.json"))


def test_there_are_scripts_for_training_and_for_value_heads():
    assert set(SCRIPTS) == {"first-run.md", "value-heads.md"}


@pytest.mark.parametrize("kind", ["sft", "preference", "unpaired", "prompt", "tools"])
def test_documented_formats_parse(kind):
    import json

    from coati.data import parse_record

    [block] = blocks(ROOT / "docs" / "data.md", f"jsonl {kind}")
    read_as = "sft" if kind == "tools" else kind
    assert all(parse_record(json.loads(line), read_as) for line in block.splitlines())


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("ppo", dict(ptx_coefficient=0.1)),
        ("grpo", dict(dynamic_sampling=True, importance_correction="truncated", kl_coefficient=0.1)),
    ],
    ids=("ppo", "grpo"),
)
def test_every_setting_and_metric_of_rollouts_is_explained(algorithm, changes, place, runtime, tmp_path):
    from coati.config.schema import leaves
    from coati.tracking import read_metrics

    config_class, trainer_class = trainer_classes(algorithm)
    changes |= dict(steps=1, output_dir=str(tmp_path / "run"))
    changes |= dict(ptx_data=[place["sft"]]) if algorithm == "ppo" else {}
    trainer_class(configure(config_class, **settings_for(algorithm, place, **changes)), runtime).train()
    logged = {name for row in read_metrics(tmp_path / "run") for name in row} - {"step", "time"}
    logged = {re.sub("reward/.*", "reward/NAME", name) for name in logged}
    own = {path for path in leaves(config_class) if path.startswith(("algorithm.", "generation.", "scoring."))}
    settings = {path.rpartition(".")[2] for path in own} - {"type"}
    pages = {"ppo.md", "rewards.md", f"{algorithm}.md"}
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in pages)
    assert sorted(name for name in logged | settings if not re.search(f"`(--)?{re.escape(name)}`", text)) == []


def test_settings_page_is_current():
    script = runpy.run_path(str(ROOT / "tools" / "write_configuration.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["page"](), "run tools/write_configuration.py"


@cache
def texts_in_code() -> list[str]:
    """Every text in coati's code; those of an f-string are one, with {} for its values."""
    texts = []
    for path in sorted((ROOT / "coati").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


@pytest.mark.parametrize("error", explained_errors())
def test_an_explained_error_exists(error):
    pieces = [piece.strip() for piece in error.split("…")]
    assert any(all(piece in text for piece in pieces) for text in texts_in_code())


@pytest.mark.parametrize(
    "settings",
    [
        dict(plugin="zero3"),
        dict(plugin="gemini", precision="fp32"),
        dict(precision="fp16"),
        dict(shard_fraction=2.0),
    ],
    ids=str,
)
def test_a_refused_combination_says_what_the_page_says(settings, monkeypatch):
    from coati.parallel import PluginConfig, check_plugin

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as refusal:
        check_plugin(PluginConfig(**settings))
    assert f"`{refusal.value}`" in (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [*PAGES, *APPLICATIONS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
