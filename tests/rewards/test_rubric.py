"""Rubrics: criteria judged one by one, and what they add up to."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.errors import UserError
from coati.judges import client
from coati.rewards import Scorer, ScoringConfig, load_rewards
from coati.rewards.config import RubricRewardSettings
from coati.rewards.rubric import Criterion, parse_criteria, read_rubric, rubric_score
from tests.rewards.judge_server import serving
from tests.rewards.samples import of_reward, rewards_of, scored

RUBRIC = """
- {criterion: says red, weight: 2, name: red}
- {criterion: says blue}
- {criterion: says never, weight: -1.5, name: rude}
- {criterion: says please, veto: true, weight: 0}
"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.001)


def words(text: str, count: int = 0) -> str:
    """A judge that looks whether the response has the criterion's last word."""
    word = re.search(r"^Criterion: says (\w+)$", text, re.MULTILINE)[1]
    response = re.search(r"\[response (\w+)\]\n(.*)\n\[end of response \1\]", text, re.DOTALL)[2]
    return f"It is about {word}.\nMet: {'yes' if word in response else 'no'}"


def scorer_of(server, **settings) -> Scorer:
    entry = {"type": "rubric", "model": "m", "endpoint": server.url, "timeout": 30.0, "attempts": 1} | settings
    return load_rewards(rewards_of(entry), ScoringConfig(reward_workers=0, reward_failure_score=-1.0))


def close(scorer: Scorer):
    for reward, _ in scorer.rewards.values():
        reward.judge.close()


def test_criteria_of_a_file_are_judged_one_by_one(tmp_path):
    (tmp_path / "rubric.yaml").write_text(RUBRIC)
    with serving(words) as server:
        scorer = scorer_of(server, rubric=str(tmp_path / "rubric.yaml"))
        responses = ["red please", "red blue please", "red blue never please", "red blue", "never please"]
        found = scored(scorer, [""] * 5, responses)
        close(scorer)
    assert of_reward("rubric", found) == [2 / 3, 1.0, 0.5, 0.0, 0.0]
    assert found[0].details == {"rubric/red": 1.0, "rubric/2": 0.0, "rubric/rude": 0.0, "rubric/4": 1.0}
    assert len(server.heard) == 20 and scorer.has_details
    assert "4 questions per response" in scorer.rewards["rubric"][0].about


def test_criteria_of_the_data_are_those_of_the_row():
    rubrics = [[{"criterion": "says red", "weight": None}, {"criterion": "says blue", "weight": 3}], None]
    with serving(words) as server:
        scorer = scorer_of(server, rubric_column="extra.rubric")
        scorer.check([{"extra": {"rubric": rubrics[0]}}, {}])
        found = scored(scorer, [""] * 2, ["blue", "blue"], extra=[{"rubric": r} for r in rubrics])
        close(scorer)
    assert of_reward("rubric", found) == [0.75, None] and len(server.heard) == 2
    assert found[0].details == {} and not scorer.has_details


def test_a_criterion_without_a_verdict_is_a_failure(tmp_path):
    (tmp_path / "rubric.json").write_text(json.dumps([{"criterion": "says red"}, {"criterion": "says blue"}]))
    with serving(lambda text, count: words(text) if "says red" in text or "odd" not in text else "?") as server:
        scorer = scorer_of(server, rubric=str(tmp_path / "rubric.json"))
        found = scored(scorer, [""] * 2, ["red", "odd red"])
        close(scorer)
    assert of_reward("rubric", found) == [0.5, -1.0]
    assert [sample.failed["rubric"] for sample in found] == [False, True] and found[1].details == {}


criteria = st.builds(Criterion, st.just("x"), st.floats(-9, 9), st.booleans())
judged = st.lists(st.tuples(criteria, st.booleans()), min_size=1, max_size=9)


@given(judged)
def test_the_score_is_that_of_a_slow_loop(pairs):
    best = reached = 0.0
    for criterion, is_met in pairs:
        best += criterion.weight if criterion.weight > 0 else 0.0
        reached += criterion.weight if is_met else 0.0
    if best < 1e-6:
        return
    expected = max(0.0, min(1.0, reached / best))
    for criterion, is_met in pairs:
        expected = 0.0 if criterion.veto and not is_met else expected
    assert rubric_score(*zip(*pairs, strict=True)) == pytest.approx(expected, abs=1e-9)


def test_a_pitfall_costs_where_it_is_met():
    criteria = [Criterion("good", 2.0), Criterion("bad", -1.0)]
    cases = [(True, False), (True, True), (False, False), (False, True)]
    assert [rubric_score(criteria, met) for met in cases] == [1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], r"holds '\[\]': write a list"),
        ({"criterion": "x"}, "write a list"),
        (["x"], "criterion 1 is 'x': write"),
        ([{"criterion": "x"}, {"text": "y"}], "criterion 2 is .*: write"),
        ([{"criterion": " "}], "criterion 1 is"),
        ([{"criterion": "x", "wieght": 1}], "unknown field 'wieght'"),
        ([{"criterion": "x", "weight": "much"}], "the weight 'much'"),
        ([{"criterion": "x", "weight": True}], "the weight True"),
        ([{"criterion": "x", "weight": float("nan")}], "the weight nan"),
        ([{"criterion": "x", "veto": "yes"}], "the veto 'yes'"),
        ([{"criterion": "x"}, {"criterion": "y", "veto": True, "weight": -1}], "a veto and a weight below 0"),
        ([{"criterion": "x", "weight": -1}, {"criterion": "y", "weight": 0}], "no criterion has a weight above 0"),
        ([{"criterion": "x", "name": 2}, {"criterion": "y"}], "two criteria are called '2'"),
    ],
)
def test_wrong_criteria_are_named(value, says):
    with pytest.raises(UserError, match=f"here.*{says}"):
        parse_criteria(value, "here")


def test_wrong_files_and_rows_are_named(tmp_path):
    with pytest.raises(UserError, match=r"rubric .*none.yaml can't be read"):
        read_rubric(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("[")
    with pytest.raises(UserError, match=r"rubric .*bad.yaml can't be read"):
        read_rubric(str(tmp_path / "bad.yaml"))
    with serving(words) as server:
        scorer = scorer_of(server, rubric_column="rubric")
        with pytest.raises(UserError, match=r"reads the column 'rubric', which the prompts' rows don't have \(but a\)"):
            scorer.check([{"a": 1}])
        with pytest.raises(UserError, match=r"column 'rubric', criterion 1 is 'polite'"):
            scorer.check([{"rubric": ["polite"]}])
        close(scorer)


@pytest.mark.parametrize("given", [{}, dict(rubric="a.yaml", rubric_column="b")])
def test_criteria_are_in_one_place(given):
    with pytest.raises(UserError, match="give either rubric or rubric_column"):
        RubricRewardSettings(model="m", **given)


def test_a_prompt_must_name_criterion_and_response():
    with pytest.raises(UserError, match=r"lacks \{criterion\}"):
        RubricRewardSettings(model="m", rubric_column="b", prompt="{response}").make("cpu")
