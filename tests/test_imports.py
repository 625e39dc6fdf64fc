"""The shape of the code base: which way imports point, what importing costs, what is never called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "coati").rglob("*.py"))
ALL_FILES = [p for folder in ("coati", "examples", "applications") for p in sorted((ROOT / folder).rglob("*.py"))]

# What each part may import of ours, besides itself and EVERYWHERE (docs: "imports point one way").
EVERYWHERE = {"config", "errors", "files", "listening", "transfer", "variables"}
MAY_IMPORT = {
    "config": set(),
    "losses": set(),
    "models": {"losses"},
    "data": {"losses", "models", "steps"},
    "judges": {"models", "run_layout"},
    "rewards": {"judges", "losses", "models", "samples", "steps"},
    "rollout": {"losses", "models", "data", "rewards", "samples"},
    "environments": {"data", "rewards", "rollout"},
    "label": {"data", "intervals", "responses", "run_layout", "tracking"},
    "serve": {"losses", "models", "data", "rewards", "rollout", "samples", "run_layout"},
    "parallel": {"losses", "models", "watch", "run_layout"},
    "tracking": {"run_layout"},
    "planner": {
        *("judges", "losses", "models", "data", "rewards", "rollout", "parallel", "trainers"),
        *("commands", "samples", "run_layout", "tracking"),
    },
    "trainers": {
        *("judges", "losses", "models", "data", "rewards", "rollout", "parallel", "tracking"),
        *("watch", "samples", "run_layout", "intervals"),
    },
}
# and what the modules that stand beside the parts may import, all in all
SINGLE_MAY_IMPORT = {
    "__init__": set(),
    "check_reward": {"config", "data", "errors", "models", "rewards", "samples"},
    "cli": {
        "check_reward",
        "commands",
        "config",
        "doctor",
        "errors",
        "initial",
        "label",
        "planner",
        "play",
        "run",
        "serve",
        "tracking",
    },
    "commands": {"config", "trainers"},
    "doctor": {"errors", "config", "parallel"},
    "play": {"config", "data", "errors", "models", "parallel", "rewards", "rollout"},
    "errors": set(),
    "files": set(),
    "initial": {"commands", "config", "trainers"},
    "intervals": set(),
    "listening": {"errors"},
    "responses": {"config", "data", "errors", "models", "rollout", "run_layout"},
    "run": {"variables"},
    "run_layout": {"errors", "files"},
    "steps": set(),
    "samples": set(),
    "transfer": set(),
    "variables": set(),
    "watch": {"variables"},
}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, at the top or inside a function; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported_modules(path)]
    return {name[1] for name in names if name[0] == "coati" and len(name) > 1}


def test_the_walk_sees_the_code():
    """These tests can't fail on an empty list."""
    assert len(FILES) > 30
    assert "losses" in parts_imported(ROOT / "coati" / "models" / "actor.py")
    assert any(name.startswith("colossalai") for p in FILES for name in imported_modules(p))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part):
    folder = ROOT / "coati" / part
    allowed = MAY_IMPORT[part] | {part} | EVERYWHERE
    wrong = {
        label(p): sorted(parts_imported(p) & {q.stem for q in (ROOT / "coati").iterdir()} - allowed)
        for p in folder.rglob("*.py")
    }
    assert not {p: names for p, names in wrong.items() if names}


def test_nothing_is_built_on_the_classes_that_are_there_for_trls_users():
    """`coati.models` hands them out; our own models don't know them."""
    users = {label(p) for p in FILES if any(name.startswith("coati.models.compat") for name in imported_modules(p))}
    assert {name for name in users if not name.startswith("coati/models/compat/")} == {"coati/models/__init__.py"}


@pytest.mark.parametrize("name", SINGLE_MAY_IMPORT)
def test_so_do_those_of_single_modules(name):
    ours = {q.stem for q in (ROOT / "coati").iterdir()}
    assert parts_imported(ROOT / "coati" / f"{name}.py") & ours <= SINGLE_MAY_IMPORT[name]


def test_losses_import_nothing_of_ours_at_all():
    wrong = {label(p): parts_imported(p) - {"losses"} for p in (ROOT / "coati" / "losses").glob("*.py")}
    assert not {p: names for p, names in wrong.items() if names}


def test_every_part_has_its_rule():
    folders = {p.name for p in (ROOT / "coati").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)
    assert {p.stem for p in (ROOT / "coati").glob("*.py")} == set(SINGLE_MAY_IMPORT)


def test_only_coati_parallel_imports_colossalai():
    """PITFALL 34: everything else works, and is tested, without it."""
    wrong = {label(p) for p in ALL_FILES if any(n.split(".")[0] == "colossalai" for n in imported_modules(p))}
    assert {name for name in wrong if not name.startswith("coati/parallel/")} == set()


def test_importing_coati_pulls_in_neither_torch_nor_transformers():
    """PITFALL 34: `import coati` is quick and can't break on a missing GPU library."""
    code = "import sys, coati, coati.errors, coati.config; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "coati" in loaded.split()
    assert {"torch", "transformers", "colossalai", "datasets", "wandb", "numpy"}.isdisjoint(loaded.split())


def test_importing_models_losses_and_rewards_leaves_transformers_and_colossalai_alone():
    """PITFALL 34: transformers takes 8 seconds more than torch, colossalai 7 more."""
    code = "import sys, coati.losses, coati.models, coati.rewards, coati.rollout, coati.data, coati.tracking\n"
    code += "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"transformers", "colossalai", "datasets", "wandb", "peft"}.isdisjoint(loaded.split())


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            yield node, owner, name


def test_remote_code_is_trusted_nowhere():
    """PITFALL 30: the keyword does not occur at all, so transformers' default (off) holds."""
    wrong = [label(p) for p in ALL_FILES if re.search(r"trust_remote_code\W*(=|:)\s*(?!False)", p.read_text())]
    assert wrong == []


def test_nothing_is_unpickled_or_evaluated():
    """PITFALL 30: no pickle, torch.load, torch.save, eval or exec; YAML is read safely."""
    banned = {
        ("torch", "load"),
        ("torch", "save"),
        ("", "eval"),
        ("", "exec"),
        ("yaml", "load"),
        ("yaml", "unsafe_load"),
    }
    wrong = [f"{label(p)}:{c.lineno}" for p in ALL_FILES for c, owner, name in calls(p) if (owner, name) in banned]
    modules = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    wrong += [label(p) for p in ALL_FILES if {n.split(".")[0] for n in imported_modules(p)} & modules]
    assert wrong == []


def test_no_exception_is_swallowed():
    wrong = [
        f"{label(p)}:{node.lineno}"
        for p in ALL_FILES
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(s, ast.Pass) for s in node.body))
    ]
    assert wrong == []
