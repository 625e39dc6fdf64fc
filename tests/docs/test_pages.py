"""What the README, the docs and docstrings say is executed: examples, formats, errors, metrics and links.

Commands are in test_commands.py, settings in test_settings.py.
"""

import ast
import doctest
import importlib
import json
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from coati.commands import COMMANDS
from coati.config import configure
from coati.config.schema import leaves
from coati.errors import UserError
from coati.tracking import read_metrics
from coati.trainers.algorithms import ALGORITHMS
from tests.conftest import ROOT, settings_for, trainer_classes
from tests.docs.pages import PAGES, blocks, explained_errors, name_of, prose, spans, text_of

WITH_DOCTEST = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "coati").rglob("*.py"))
    if ">>> " in text_of(path)
]


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
        assert script["filled"](text_of(page)) == text_of(page), "run tools/write_quotes.py"


@pytest.mark.parametrize("page", [p for p in PAGES if ">>> " in text_of(p)], ids=name_of)
def test_examples_of_a_page_give_what_they_say(page):
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0


def test_the_worked_algorithm_trains_as_the_real_one(tiny_world, runtime, tmp_path):
    """CONTRIBUTING's DPO, for three steps; the curve is that of `coati/trainers/dpo.py`."""
    page = text_of(ROOT / "CONTRIBUTING.md")
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


KINDS = ("sft", "preference", "unpaired", "stepwise", "scored", "prompt", "tools")
# How a block's first line may go on after ```, and what holds that the block is right.
LANGUAGES = {
    "bash": "test_commands.py",
    "yaml": "test_settings.py",
    "text": "output and layouts; test_commands.py holds that there is no command among them",
    "python": "the tests below: a doctest, or a script; quoted code is that of now",
    "python quoted": "test_code_that_pages_quote_is_the_code_of_now",
    "json": "test_objects_and_changed_lines_parse",
    "diff": "test_objects_and_changed_lines_parse",
    **{f"jsonl {kind}": "test_documented_formats_parse" for kind in KINDS},
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_that_a_test_knows(page):
    """Indented blocks have none, so there are no such."""
    languages = [block.language for block in blocks(page)]
    known = [*LANGUAGES, *(f"yaml {command}" for command in COMMANDS)]
    assert [language for language in languages if language not in known] == []
    assert re.findall(r"^$\n {4,}.*", prose(page), re.MULTILINE) == []
    assert "```" not in prose(page) and "~~~" not in prose(page)


def test_every_language_is_used():
    assert set(LANGUAGES) <= {block.language for page in PAGES for block in blocks(page)}


PARSED = [block for page in PAGES for block in blocks(page) if block.language in ("json", "diff")]


@pytest.mark.parametrize("block", PARSED, ids=str)
def test_objects_and_changed_lines_parse(block):
    """The lines that a diff puts in place of others run."""
    if block.language == "json":
        json.loads(block.text)
    else:
        added = [line[1:] for line in block.text.splitlines() if line.startswith("+")]
        assert added
        exec(compile("\n".join(added), block.page, "exec"), {})


# Tests beside what these are about have its callback and prepared data, or a run with the environment.
ELSEWHERE = {
    "applications/colossal_eval/README.md": "tests/applications/colossal_eval/test_callback.py",
    "docs/environments.md": "tests/trainers/test_environments.py",
    "docs/serving.md": "tests/serve/test_server.py",
}
SCRIPTS = {name_of(page): b.text for page in PAGES for b in blocks(page, "python") if ">>> " not in b.text}


@pytest.mark.parametrize("page", [page for page in SCRIPTS if page not in ELSEWHERE])
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
    assert set(SCRIPTS) == {"docs/first-run.md", "docs/value-heads.md", *ELSEWHERE}


@pytest.mark.parametrize("kind", KINDS)
def test_documented_formats_parse(kind):
    from coati.data import parse_record

    [block] = blocks(ROOT / "docs" / "data.md", f"jsonl {kind}")
    read_as = "sft" if kind == "tools" else kind
    assert all(parse_record(json.loads(line), read_as) for line in block.text.splitlines())


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("ppo", dict(ptx_coefficient=0.1)),
        ("grpo", dict(dynamic_sampling=True, weights="token", kl_coefficient=0.1)),
    ],
    ids=("ppo", "grpo"),
)
def test_every_setting_and_metric_of_rollouts_is_explained(algorithm, changes, place, runtime, tmp_path):
    config_class, trainer_class = trainer_classes(algorithm)
    changes |= dict(steps=1, output_dir=str(tmp_path / "run"))
    changes |= dict(ptx_data=[place["sft"]]) if algorithm == "ppo" else {}
    trainer_class(configure(config_class, **settings_for(algorithm, place, **changes)), runtime).train()
    logged = {name for row in read_metrics(tmp_path / "run") for name in row} - {"step", "time"}
    logged = {re.sub("reward/.*", "reward/NAME", name) for name in logged}
    own = {path for path in leaves(config_class) if path.startswith(("algorithm.", "generation.", "scoring."))}
    settings = {path.rpartition(".")[2] for path in own} - {"type"}
    pages = {"ppo.md", "rewards.md", f"{algorithm}.md"}
    text = "".join(text_of(ROOT / "docs" / name) for name in pages)
    assert sorted(name for name in logged | settings if not re.search(f"`(--)?{re.escape(name)}`", text)) == []


def test_errors_of_others_are_explained():
    assert set(explained_errors()) >= OF_OTHERS


@pytest.mark.parametrize("tool", ["write_configuration", "write_features", "write_methods"])
def test_generated_pages_are_current(tool):
    script = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))
    assert text_of(script["PAGE"]) == script["page"](), f"run tools/{tool}.py"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_page_lists_every_setting(algorithm):
    text = text_of(ROOT / "docs" / "configuration.md")
    names = {path.rpartition(".")[2] for path in leaves(ALGORITHMS[algorithm].config)} - {"type", "rewards"}
    assert names and sorted(name for name in names if f"\n| `{name}` | " not in text) == []


@cache
def texts_in_code() -> list[str]:
    """Every text in coati's code; those of an f-string are one, with {} for its values."""
    texts = []
    for path in sorted((ROOT / "coati").rglob("*.py")):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


# What docs/troubleshooting.md explains and other programs say, or what says it.
OF_OTHERS = {"colossalai: command not found", "torchrun", "address already in use", "colossalai run"}


@pytest.mark.parametrize("error", [error for error in explained_errors() if error not in OF_OTHERS])
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
    assert f"`{refusal.value}`" in text_of(ROOT / "docs" / "plugins.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page)):
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_between_backticks_exist(page):
    """Those of files and folders of this repository, and of tests by name."""
    folders = "coati|tests|examples|docs|tools|benchmarks|applications"
    paths = [s.text.rstrip("/") for s in spans(page) if re.fullmatch(rf"({folders})/[\w./*-]+(::\w+)?", s.text)]
    missing = []
    for path in paths:
        file, _, test = path.partition("::")
        found = list(ROOT.glob(file))
        if not found or (test and f"def {test}(" not in text_of(found[0])):
            missing.append(path)
    assert missing == []


def anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
