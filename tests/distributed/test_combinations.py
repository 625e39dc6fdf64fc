"""Plugins, precisions, splits and features together: none ends in a traceback."""

import json

import pytest

from tests.distributed import combinations, forks

pytestmark = pytest.mark.distributed
CLOSE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "every"])
def outcomes(tmp_path_factory, request):
    """Of every combination; those that are quick, or all, are trained."""
    folder = tmp_path_factory.mktemp("combinations")
    ranks = forks.start(combinations.work, folder, 2, str(folder / "outcomes.json"), request.param)
    try:
        assert forks.wait(ranks, 900) == [0, 0], (folder / "log.txt").read_text()[-6000:]
    finally:
        forks.end(ranks)
    found = json.loads((folder / "outcomes.json").read_text())
    return dict(zip(combinations.COMBINATIONS, found, strict=True))


def test_each_combination_is_refused_with_a_way_out_or_trains_as_one_process_does(outcomes):
    trained = {names: outcome["losses"] for names, outcome in outcomes.items() if "losses" in outcome}
    for names, losses in trained.items():
        _, precision, _, feature = names
        expected = trained["ddp", "fp32", "whole", feature]
        assert losses == pytest.approx(expected, rel=CLOSE[precision]), names
        assert losses[1] < losses[0], names
    for names, outcome in outcomes.items():
        if "refused" in outcome:
            assert ": use " in outcome["refused"] and "\n" not in outcome["refused"], names


def test_what_is_refused_is_what_the_documentation_says(outcomes):
    """docs/plugins.md: gemini computes in low precision, trains all weights and stands alone; so on."""
    trains = {names for names, outcome in outcomes.items() if "refused" not in outcome}
    for plugin, precision, split, feature in outcomes:
        together = split == "whole" or plugin in ("ddp", "zero1", "zero2")
        together &= split != "tensor x sequence" and (plugin, split) != ("zero2", "pipeline")
        possible = together and (plugin != "gemini" or (precision != "fp32" and feature != "lora"))
        assert ((plugin, precision, split, feature) in trains) == possible, (plugin, precision, split, feature)
