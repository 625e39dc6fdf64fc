"""The judge, driven by an endpoint of our own through all that endpoints do."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coati.errors import UserError
from coati.judges import client
from colossal_eval import answer, judge
from colossal_eval.benchmarks.prepared_folder import to_line
from colossal_eval.benchmarks.question import Question
from colossal_eval.llm_judge.cases import make_case, read_responses
from colossal_eval.llm_judge.judge_prompts import KINDS, choose_prompt, read_prompts
from colossal_eval.llm_judge.verdicts import read_verdict
from tests.applications.colossal_eval.conftest import DATA

SHARED = DATA / "mt_bench"
QUESTIONS = [
    Question("81", "writing", "writing", "en", "dialogue", "Write {a} poem.", turns=["Shorter."]),
    Question("101", "math", "math", "en", "dialogue", "What is 2 + 2?", turns=["And 3 + 3?"]),
]


class Endpoint(ThreadingHTTPServer):
    """Answers `/v1/chat/completions` with what `reply(messages, count)` says: a text, or (status, body), or a delay
    before the text; `count` is how often these messages came before."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.lock = reply, Counter(), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body["messages"])
        with self.server.lock:
            count = self.server.asked[key]
            self.server.asked[key] += 1
        found = self.server.reply(body["messages"], count)
        status, content = found if isinstance(found, tuple) else (200, completion(found))
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *words):
        """Nothing on the terminal."""


def completion(text: str) -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


@pytest.fixture
def endpoint():
    servers = []

    def start(reply) -> Endpoint:
        servers.append(Endpoint(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Questions, a reference for one, and the answers of two models."""
    monkeypatch.setattr(client, "PAUSE", 0.001)
    (tmp_path / "mt_bench" / "test").mkdir(parents=True)
    (tmp_path / "mt_bench" / "test" / "all.jsonl").write_text("".join(map(to_line, QUESTIONS)))
    for name in ("good", "bad"):
        rows = [{"id": q.id, "turns": [f"{name} answer {i}" for i in range(2)]} for q in QUESTIONS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = {"question_id": 101, "choices": [{"turns": ["4", "6"]}]}
    (tmp_path / "right.jsonl").write_text(json.dumps(right) + "\n")
    return tmp_path


SHORT = 3.0  # seconds: long for a response that comes at once, on a busy machine too


def config(place, server, names=("good", "bad"), **changes) -> judge.JudgeConfig:
    files = [str(place / f"{name}.jsonl") for name in names]
    common = dict(questions=str(place / "mt_bench"), answers=files, output=str(place / "out"), judge="m", timeout=60)
    common |= dict(endpoint=server.url, references=str(place / "right.jsonl"), progress="off")
    return judge.JudgeConfig(**common | changes)


def fair(messages, count=0) -> str:
    """Grades 8 and 3; chooses the good answer wherever it stands."""
    text = messages[1]["content"]
    if "[[A]]" in text:
        return (
            f"[[A]] would be wrong, or not: [[{'A' if text.index('good answer') < text.index('bad answer') else 'B'}]]"
        )
    return "Rating: [[8]]" if "good answer" in text else "Rating: [[3]]"


def test_ratings_and_comparisons(place, endpoint):
    report = judge.judge(config(place, endpoint(fair)))
    assert report["failed"] == 0 and report["judged"] == 2 * 2 * 2 + 2 * 2 * 2
    assert {name: found["all"]["value"] for name, found in report["ratings"].items()} == {"good": 8, "bad": 3}
    assert set(report["ratings"]["good"]) == {"all", "math", "writing"}
    [found] = report["comparisons"]
    assert (found["first"], found["second"], found["wins"]["value"], found["consistent"]) == ("bad", "good", 0.0, 1.0)
    records = [json.loads(line) for line in (place / "out" / "judgments.jsonl").open()]
    assert len(records) == 16 and all("[[" in record["text"] for record in records)
    asked = {(r["id"], r["turn"]): r["messages"][1]["content"] for r in records if r["kind"] == "single"}
    assert "Write {a} poem." in asked["81", 1] and "Shorter." not in asked["81", 1]
    assert "Shorter." in asked["81", 2] and "<reference>" not in asked["81", 2]
    assert "<reference>\n6\n</reference>" in asked["101", 2] and "<reference>\n6" not in asked["101", 1]


def test_a_judge_that_prefers_the_first_position_sees_a_tie(place, endpoint):
    report = judge.judge(config(place, endpoint(lambda messages, _: "Rating: [[5]] [[A]]")))
    [found] = report["comparisons"]
    assert found["wins"]["value"] == 0.5 and found["consistent"] == 0.0


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        (lambda: (429, '{"error": {"message": "too many requests"}}'), "RateLimitError"),
        (lambda: (500, "oops"), "InternalServerError"),
        (lambda: (200, "{not JSON"), "JSONDecodeError"),
        (lambda: (200, "[]"), "no text"),
        (lambda: (200, '{"choices": []}'), "no text"),
        (lambda: time.sleep(2 * SHORT) or "Rating: [[1]]", "TimeoutError"),
        (lambda: "I would rather not say.", "no verdict"),
        (lambda: "Rating: [[11]]", "no verdict"),
    ],
)
def test_trouble_that_passes_is_asked_again_and_never_a_score(trouble, named, place, endpoint):
    server = endpoint(lambda messages, count: trouble() if count == 0 else fair(messages))
    changes = dict(timeout=SHORT) if "Timeout" in named else {}
    report = judge.judge(config(place, server, names=["good"], **changes))
    assert (report["judged"], report["failed"]) == (4, 0)
    assert report["ratings"]["good"]["all"]["value"] == 8
    records = [json.loads(line) for line in (place / "out" / "judgments.jsonl").open()]
    assert all(len(record["errors"]) == 1 and named in record["errors"][0] for record in records)


def test_what_fails_for_good_is_counted_apart_and_asked_for_in_the_next_run(place, endpoint, capsys):
    broken = endpoint(lambda messages, _: (503, "down") if "And 3 + 3?" in messages[1]["content"] else fair(messages))
    report = judge.judge(config(place, broken, names=["good"], attempts=2))
    assert (report["judged"], report["failed"]) == (3, 1)
    assert report["ratings"]["good"]["all"] == {"value": 8.0, "stderr": 0.0, "questions": 2}
    assert max(broken.asked.values()) == 2
    assert "3 judgments, 1 failed" in (place / "out" / "report.md").read_text()
    whole = endpoint(fair)
    assert judge.judge(config(place, whole, names=["good"]))["failed"] == 0
    assert sum(whole.asked.values()) == 1 and "3 reused, 1 to ask for" in capsys.readouterr().out


def test_a_key_that_is_refused_ends_the_run_at_once(place, endpoint, monkeypatch):
    server = endpoint(lambda *_: (401, '{"error": {"message": "wrong key"}}'))
    with pytest.raises(UserError, match=r"the endpoint http://.* refuses the judge m: .*wrong key"):
        judge.judge(config(place, server, workers=1))
    assert sum(server.asked.values()) <= 2


def test_the_command_says_what_is_wrong(place, endpoint, capsys):
    server = endpoint(fair)
    (place / "short.jsonl").write_text('{"id": "81", "turns": ["one", "two"]}\n{"id": "101", "turns": ["one"]}\n')
    words = ["--questions", str(place / "mt_bench"), "--endpoint", server.url, "--output", str(place / "out")]
    words += ["--progress", "off", "--references", str(place / "right.jsonl")]
    assert judge.main([*words, "--judge", "m", "--answers", str(place / "short.jsonl")]) == 2
    assert "short responds to 1 of the 2 turns of question 101" in capsys.readouterr().err
    assert judge.main([*words, "--answers", str(place / "good.jsonl")]) == 2
    assert judge.main([*words, "--judge", "m", "--answers", str(place / "good.jsonl")]) == 0
    assert "| good | all | 8.00 ± 0.00 | 2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "prompts.jsonl:1 is not JSON"),
        ('{"name": "x"}', "prompts.jsonl:1 lacks 'type'"),
        ('{"name": "x", "type": "double", "system_prompt": "", "prompt_template": ""}', "'double' is none of"),
    ],
)
def test_wrong_prompts_name_the_line(row, words, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(row + "\n")
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / "prompts.jsonl")
    assert words in str(error.value)


def test_our_prompts_fit_every_case():
    """Nothing of a template is left in what the judge reads, but what the answers themselves have in braces."""
    templates = read_prompts()
    for question in QUESTIONS:
        for turn in (1, 2):
            for answers in ({"x": ["a1", "a2"]}, {"x": ["a1", "a2"], "y": ["b1", "b2"]}):
                for reference in (None, ["r1", "r2"]):
                    case = make_case(question, turn, answers, reference, templates)
                    text = case.messages[1]["content"]
                    assert ("r1" in text or "r2" in text) == bool(reference)
                    assert f"a{turn}" in text and "{question" not in text and "{answer" not in text
    assert {t.kind for t in templates} == set(KINDS)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/mt_bench is not on this machine")
def test_fastchats_prompts_are_read():
    path = SHARED / "judge_prompts.jsonl"
    templates = read_prompts(path)
    found = {
        (kind, turn, ref): choose_prompt(templates, kind, turn, ref).name
        for kind in KINDS
        for turn in (1, 2)
        for ref in (False, True)
    }
    assert found["single", 1, False] == "single-v1" and found["pairwise", 2, True] == "pair-math-v1-multi-turn"
    assert len(set(found.values())) == 8
    assert len(read_responses(SHARED / "reference_answer" / "gpt-4.jsonl")) == 24


@pytest.mark.parametrize(
    ("kind", "text", "verdict"),
    [
        ("single", "Rating: [[7]]", 7.0),
        ("single", "[[3]] at first, but [[8.5]]", 8.5),
        ("single", "7 of 10", None),
        ("single", "[[0]]", None),
        ("pairwise", "[[A]] no, [[B]]", "B"),
        ("pairwise", "[[tie]]", None),
    ],
)
def test_verdicts(kind, text, verdict):
    assert read_verdict(kind, text) == verdict


def test_a_model_answers_every_turn_with_the_dialogue_before_it(place, tiny_world, monkeypatch):
    read = []
    prompt = answer._prompt
    monkeypatch.setattr(
        answer,
        "_prompt",
        lambda loaded, dialogue, *rest: read.append(json.dumps(dialogue)) or prompt(loaded, dialogue, *rest),
    )
    words = ["--model", tiny_world["policy"], "--questions", str(place / "mt_bench"), "--max_new_tokens", "4"]
    assert answer.main([*words, "--output", str(place / "mine.jsonl")]) == 0
    found = read_responses(place / "mine.jsonl")
    assert {key: len(turns) for key, turns in found.items()} == {"81": 2, "101": 2}
    assert len(read) == 4 and json.dumps(found["81"][0])[1:-1] in read[2] and "Shorter." in read[2]
    assert answer.main([*words, "--output", str(place / "mine.jsonl")]) == 2  # it is there
    assert answer.main([*words[:-1], "500", "--output", str(place / "other.jsonl")]) == 2  # too long
    assert not (place / "other.jsonl").exists()
