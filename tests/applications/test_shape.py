"""Which way imports point in the applications: commands on top, no folder imports one that imports it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

APPLICATIONS = ROOT / "applications"
# What each folder may import of its application, besides itself
MAY_IMPORT = {
    "colossal_eval": {
        "benchmarks": set(),
        "scores": {"benchmarks"},
        "run": {"benchmarks", "scores"},
        "results": {"benchmarks", "scores", "run"},
        "llm_judge": {"benchmarks", "scores", "results"},
    },
    "colossal_llama": {
        "tokenizer": set(),
        "model": {"tokenizer"},
        "data": {"tokenizer"},
        "pretraining": {"data"},
        "example": set(),
    },
}


def paths_of(application: str) -> dict[str, Path]:
    """The files of an application by module."""
    files = (APPLICATIONS / application).rglob("*.py")
    return {".".join(path.relative_to(APPLICATIONS).with_suffix("").parts): path for path in files}


def imports(application: str) -> dict[str, set[str]]:
    """The modules of an application that each of its modules imports, at the top or inside a function."""
    paths, found = paths_of(application), {}
    for name, path in paths.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imported = {node.module for node in nodes} | {
            f"{node.module}.{alias.name}" for node in nodes for alias in node.names
        }
        found[name] = imported & paths.keys()
    return found


@pytest.mark.parametrize("application", MAY_IMPORT)
def test_no_modules_import_each_other(application):
    """Not inside functions or for type hints either; a circle raises CycleError, which names it."""
    found = imports(application)
    assert len(found) > 20 and sum(map(len, found.values())) > len(found)
    TopologicalSorter(found).prepare()


@pytest.mark.parametrize("application", MAY_IMPORT)
def test_imports_between_folders_point_one_way(application):
    top, paths, rules = APPLICATIONS / application, paths_of(application), MAY_IMPORT[application]
    assert {path.parent.name for path in paths.values() if path.parent != top} == set(rules)
    wrong = []
    for name, others in imports(application).items():
        folder = paths[name].parent
        if folder != top:
            allowed = rules[folder.name] | {folder.name}
            wrong += [f"{name} imports {other}" for other in others if paths[other].parent.name not in allowed]
    assert wrong == []
