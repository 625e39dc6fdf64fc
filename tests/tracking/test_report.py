"""The HTML report: complete, sorted, escaped, self-contained."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from coati.errors import UserError
from coati.tracking import Tracker, TrackingConfig, write_report
from coati.tracking.charts import Line, line_chart, number, running_mean
from coati.tracking.explorer import PAGE

EVIL = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
SETTINGS = {"parallel": {"plugin": "gemini"}, "learning_rate": 0.00012345, "secret": EVIL}


class Page(HTMLParser):
    """The page's tags with attributes, visible text, and the cells of its tables."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.open, self.text, self.scripts = [], [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "line", "circle", "path", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            return
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def record(run_dir, algorithm, steps=60, status="finished", samples=True):
    tracker = Tracker(run_dir, TrackingConfig(), algorithm=algorithm, settings=SETTINGS)
    main = {"sft": "loss", "reward": "accuracy", "ppo": "reward/mean"}[algorithm]
    for step in range(1, steps + 1):
        tracker.log({main: step / 10, "extra": 5.0, EVIL: math.nan if step == 2 else 1.0}, step)
        if samples and step in (1, 30, steps):
            rewards = [-1.0, 2.0, 0.5] if step == steps else [0.1, 0.2, 0.3]
            tracker.log_samples(
                [
                    {"prompt": f"prompt {i} {EVIL}", "response": f"said {EVIL} at {step}", "reward": reward}
                    for i, reward in enumerate(rewards)
                ],
                step,
            )
    tracker.finish(status)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("quickstart")
    record(root / "1-sft", "sft", samples=False)
    record(root / "2-reward", "reward", samples=False)
    record(root / "3-ppo" / "seed1", "ppo")
    record(root / "3-ppo" / "seed2", "ppo", status="interrupted")
    (root / "summary.json").write_text(json.dumps({"positivity_after": 0.9921, "note": EVIL}))
    html = write_report([root], root / "out" / "report.html").read_text()
    return html, Page(html)


def test_report_shows_every_stage_and_its_result(page):
    rows = page[1].rows
    assert rows[1][:5] == ["Supervised fine-tuning", "1-sft", "60", "1", "gemini"]
    assert rows[1][6:] == ["loss 0.1 → 6", "finished"]
    assert rows[2][0] == "Reward model" and rows[2][6] == "accuracy 0.1 → 6"
    assert [row[1] for row in rows[3:5]] == ["3-ppo/seed1", "3-ppo/seed2"]
    assert [row[7] for row in rows[3:5]] == ["finished", "interrupted"]
    assert rows[3][6] == "reward/mean 0.1 → 6"


def test_report_is_well_formed_and_draws_a_chart_for_each_metric(page):
    html, parsed = page
    assert [tag for tag in parsed.open if tag not in ("html", "body")] == []
    # Three metrics in each of three stages; seeds share their charts.
    assert html.count("<svg ") == 9
    assert "3-ppo/seed2 reward/mean, step 60: 6" in html
    assert "2 not finite" in html
    assert "positivity after" in parsed.text and "0.9921" in parsed.text


def test_report_escapes_what_a_model_wrote(page):
    html, parsed = page
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"img", "iframe", "object", "embed", "link"}
    assert EVIL not in html and EVIL in parsed.text
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]


def test_no_script_may_run_but_the_reports_own(page):
    """The samples are data beside it; the policy names the one script by its hash."""
    html, parsed = page
    kinds = [attributes.get("type") for tag, attributes in parsed.tags if tag == "script"]
    assert kinds == ["application/json", None]
    data, script = parsed.scripts
    assert script == (PAGE / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in html
    assert json.loads(data)["samples"][0]["response"] == f"said {EVIL} at 1"


def test_report_loads_nothing_from_outside(page):
    html, parsed = page
    loading = {"src", "href", "srcset", "data", "action", "xlink:href"}
    found = [attributes for _, attributes in parsed.tags if loading & attributes.keys()]
    assert found == [{"href": "#compare"}]
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html
    assert "prefers-color-scheme:dark" in style


def test_samples_are_paired_by_prompt_and_sorted_by_the_reward_after(page):
    """PITFALL 33: what the model said before and after is in the report, best first."""
    rows = page[1].rows
    first = next(i for i, row in enumerate(rows) if row[0] == "Prompt")
    assert rows[first][1:] == ["Response before", "Reward before", "Response after", "Reward after"]
    shown = rows[first + 1 : first + 4]
    assert [(row[0].split()[1], row[2], row[4]) for row in shown] == [
        ("1", "0.2", "2"),
        ("2", "0.3", "0.5"),
        ("0", "0.1", "-1"),
    ]
    assert all(row[1].endswith(" at 1") and row[3].endswith(" at 60") for row in shown)


def test_settings_are_shown_exactly(page):
    values = {row[0]: row[1:] for row in page[1].rows if row}
    assert values["learning_rate"] == ["0.00012345", "0.00012345"]
    assert values["parallel.plugin"] == ["gemini", "gemini"]
    assert "versions.torch" in values and "command" in values


def test_many_samples_show_the_best_and_the_worst(tmp_path):
    tracker = Tracker(tmp_path / "run", TrackingConfig(), algorithm="ppo", settings={})
    rows = [{"prompt": f"p{i}", "response": "r", "reward": float(i)} for i in range(50)]
    tracker.log_samples([*rows, {"prompt": "nan", "response": "r", "reward": math.nan}], 7)
    parsed = Page(write_report([tmp_path / "run"], tmp_path / "report.html").read_text())
    first = next(i for i, row in enumerate(parsed.rows) if row[0] == "Prompt")
    assert parsed.rows[first] == ["Prompt", "Response ", "Reward "]
    prompts = [row[0] for row in parsed.rows[first + 1 : first + 18]]
    assert prompts[0] == "p49" and prompts[7] == "p42"
    assert prompts[8] == "35 between the best and the worst are left out"
    assert prompts[9] == "p6" and prompts[16] == "nan"


def test_prompts_that_were_not_sampled_before_are_marked(tmp_path):
    tracker = Tracker(tmp_path / "run", TrackingConfig(), algorithm="sft", settings={})
    tracker.log_samples([{"prompt": "old", "response": "a"}], 1)
    tracker.log_samples([{"prompt": "new", "response": "b"}], 2)
    parsed = Page(write_report([tmp_path / "run"], tmp_path / "report.html").read_text())
    assert ["new", "not sampled", "b"] in parsed.rows


def test_an_episode_is_shown_message_by_message(tmp_path):
    """With what each turn earned, and on hover which tokens are learned."""
    messages = [
        {"role": "assistant", "content": "find('<tea>')", "reward": 0.5, "tokens": 7, "malformed_call": "no quotes"},
        {"role": "tool", "content": "found & brewed"},
        {"role": "assistant", "content": "done", "reward": 0.0, "tokens": 2},
    ]
    row = {"prompt": "p", "response": "r", "conversation": messages, "reward": 0.5}
    tracker = Tracker(tmp_path / "run", TrackingConfig(), algorithm="grpo", settings=SETTINGS)
    tracker.log_samples([row], 1)
    tracker.finish("finished")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    turns = re.findall(r"<p class='turn (\w+)' title='([^']*)'>(.*?)</p>", page, re.DOTALL)
    assert [role for role, _, _ in turns] == ["assistant", "tool", "assistant"]
    assert [about for _, about, _ in turns] == [
        "7 sampled tokens, learned",
        "not sampled, so not learned",
        "2 sampled tokens, learned",
    ]
    assert "<b>0.5</b>find(&#x27;&lt;tea&gt;&#x27;)\n(no call: no quotes)" in turns[0][2]
    assert turns[1][2].endswith("found &amp; brewed") and "<b>" not in turns[2][2]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for folder in ("a", "b"):
        record(tmp_path / folder / "ppo", "ppo", steps=1)
    html = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html").read_text()
    assert [row[1] for row in Page(html).rows[1:3]] == [str(tmp_path / name / "ppo") for name in ("a", "b")]


def test_algorithms_that_learn_from_rewards_share_charts(tmp_path):
    """Of what all of them log; beside the charts of each."""
    for name, more in (("ppo", {"value_loss": 1.0}), ("grpo", {"entropy": 2.0})):
        tracker = Tracker(tmp_path / name, TrackingConfig(), algorithm=name, settings={})
        tracker.log({"reward": 0.5} | more, 1)
        tracker.finish("finished")
    html = write_report([tmp_path], tmp_path / "report.html").read_text()
    [together] = re.findall("<section id='together'>.*?</section>", html)
    assert re.findall("<figcaption><b>(.*?)</b>", together) == ["reward"]
    assert "ppo reward, step 1: 0.5" in together and "grpo reward, step 1: 0.5" in together
    assert html.count("<svg ") == 5
    assert "id='together'" not in write_report([tmp_path / "ppo"], tmp_path / "report.html").read_text()


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_run_is_a_user_error(tmp_path, made):
    folder = tmp_path / "empty"
    if made:
        folder.mkdir()
    with pytest.raises(UserError, match="holds no run"):
        write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"other": "program"}'])
def test_a_broken_run_json_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        write_report([tmp_path], tmp_path / "report.html")


def test_a_run_without_metrics_is_shown(tmp_path):
    Tracker(tmp_path / "run", TrackingConfig(), algorithm="my_algorithm", settings={})
    parsed = Page(write_report([tmp_path / "run"], tmp_path / "report.html").read_text())
    assert parsed.rows[1][:3] == ["my_algorithm", "run", "0"] and parsed.rows[1][7] == "running"


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0, 0.0], [math.nan, math.inf], [1e-8, 3e-8], [1e38, -1e38], [-3, -3], [70000, 1.5e6]],
)
def test_a_chart_of_any_values_stays_inside_its_frame(values):
    svg = line_chart([Line("x", 0, [(step, value) for step, value in enumerate(values)])])
    assert "nan" not in svg and "inf" not in svg
    for x, y in re.findall(r'cx="(.*?)" cy="(.*?)"', svg):
        assert 50 <= float(x) <= 350 and 8 <= float(y) <= 156
    assert svg.count("<title>") == sum(map(math.isfinite, values))
    assert 2 <= svg.count('class="grid"') <= 8


def test_a_long_curve_is_thinned_without_losing_its_spike():
    points = [(step, 100.0 if step == 12_345 else step % 7 / 7) for step in range(20_000)]
    svg = line_chart([Line("x", 0, points)])
    assert len(svg) < 60_000
    assert "step 12345: 100" in svg


def test_running_mean_smooths_noise_and_leaves_even_curves_alone():
    noisy = [(step, step + (-1) ** step * 5.0) for step in range(100)]
    assert max(abs(y - x) for x, y in running_mean(noisy)[10:-10]) < 1
    assert running_mean([(step, 1 / (1 + step)) for step in range(100)]) == []
    assert running_mean(noisy[:20]) == []


def test_numbers_are_for_people():
    assert [number(value) for value in (0.98341, 70000.0, 3e-5, -2, 1e20)] == [
        "0.9834",
        "70,000",
        "3e-5",
        "-2",
        "1e+20",
    ]
