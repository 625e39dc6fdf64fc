"""Responses that models draw for `coati label`, and pairs of which a reward model is least sure."""

import json
from itertools import combinations

import pytest
import torch

import coati.responses
from coati.cli import main
from coati.config import configure
from coati.config.generation import GenerationConfig
from coati.data import load_rows
from coati.errors import UserError
from coati.label import drawing
from coati.label.items import read_prompts
from coati.label.store import OWNER, Click, Store
from coati.models import RewardModel

SHORT = ["--max_new_tokens", "6", "--people", "ana"]


@pytest.fixture
def prompts(tmp_path, tiny_world):
    """Ten prompts, the first of them twice."""
    rows = [row for _, row in load_rows(tiny_world["prompts"])][:10]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return tmp_path / "prompts.jsonl"


@pytest.fixture
def label(prompts, monkeypatch):
    """Runs the command up to where it would serve, and returns the file's store."""
    monkeypatch.setattr("coati.label.command.serve", lambda *arguments: None)

    def run(*words, name="labels.sqlite", arguments=SHORT):
        path = prompts.with_name(name)
        assert main(["label", *map(str, words), "--labels", str(path), *arguments]) == 0
        return Store.open(path)

    return run


def reward_model(folder, tiny_world, seed):
    """A reward model that prefers something, untrained."""
    torch.manual_seed(seed)
    model = RewardModel(tiny_world["policy"])
    torch.nn.init.normal_(model.value_head.weight)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder.parent / tiny_world["tokenizer"] / name).read_bytes())
    return folder


def test_two_models_draw_and_the_export_says_which_response_is_whose(label, prompts, tiny_world, capsys):
    models = ["--model", f"first={tiny_world['policy']}", "--model", f"second={tiny_world['teacher']}"]
    store = label(prompts, *models)
    assert "10 items, 10 of them new" in capsys.readouterr().out
    asked = [prompt.prompt for prompt in read_prompts(prompts)]
    found = [item.prompt for item in store.items()]
    assert sorted(found) == sorted(asked) and found != asked
    assert all([one.model for one in item.responses] == ["first", "second"] for item in store.items())
    assert [item.prompt for item in label(prompts, *models, name="again.sqlite").items()] == found
    [ana] = [person for person in store.people() if person.name != OWNER]
    shown = store.next(ana)
    store.label(ana, Click("a-click-of-hers", shown.id, "a"))
    output = prompts.with_name("rows.jsonl")
    assert main(["label", "export", str(store.path), "--output", str(output), "--with_models"]) == 0
    [(_, row)] = load_rows(str(output))
    [item] = [item for item in store.items() if item.prompt == row["prompt"]]
    texts = {one.model: one.text for one in item.responses}
    assert (texts[row["chosen_model"]], texts[row["rejected_model"]]) == (row["chosen"], row["rejected"])


def test_what_was_drawn_before_a_stop_is_not_drawn_again(label, prompts, tiny_world, monkeypatch):
    """And what is drawn after it is what would have been drawn without it."""
    words = [prompts, "--model", tiny_world["policy"], "--responses", 3]
    expected = label(*words, name="whole.sqlite").items()
    real, calls = coati.responses.draw, []

    def stops(opened, asked, seeds, sampling):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(asked))
        return real(opened, asked, seeds, sampling)

    def counts(opened, asked, seeds, sampling):
        calls.append(len(asked))
        return real(opened, asked, seeds, sampling)

    monkeypatch.setattr(drawing, "BATCH", 7)
    monkeypatch.setattr(coati.responses, "draw", stops)
    with pytest.raises(KeyboardInterrupt):
        label(*words)
    store = Store.open(prompts.with_name("labels.sqlite"))
    assert calls == [7, 7] and len(store.drawn()) == 14 and store.items() == []
    monkeypatch.setattr(coati.responses, "draw", counts)
    assert label(*words).items() == expected
    assert calls == [7, 7, 7, 7, 2]
    label(*words)
    assert sum(calls) == 30


def test_new_prompts_are_drawn_and_old_ones_stay_as_they_are(label, prompts, tiny_world):
    before = label(prompts, "--model", tiny_world["policy"]).items()
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": [{"role": "user", "content": "red lamp"}], "id": "new"}) + "\n")
    after = label(prompts, "--model", tiny_world["teacher"]).items()
    assert len(before) > 5 and after[: len(before)] == before
    drawn = {item.key: {one.model for one in item.responses} for item in after[len(before) :]}
    assert drawn["new"] == {"teacher"}


def test_responses_that_are_the_same_are_left_out(label, prompts, tiny_world, capsys):
    arguments = [str(prompts), "--model", tiny_world["policy"], "--labels", str(prompts.with_name("x.sqlite"))]
    assert main(["label", *arguments, *SHORT, "--temperature", "0"]) == 2
    told = capsys.readouterr()
    assert "0 items, 0 of them new; 10 left out whose" in told.out and "has no pairs" in told.err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--model", "{policy}"], "name their file"),
        (["{prompts}", "--responses", "2"], "name them with --model"),
        (["{prompts}", "--model", "{policy}", "--responses", "1"], "nothing to compare"),
        (["{prompts}", "--model", "{policy}", "--uncertain", "{prompts}"], "leave out --model"),
        (["{prompts}", "--model", "none"], "--model none is no folder"),
        (["{prompts}", "--model", "{policy}", "--temperature", "-1"], "temperature"),
        (["{prompts}", "--model", "a={policy}", "--model", "a={policy}"], "two models are called a"),
        (["{empty}", "--model", "{policy}"], "has no prompts"),
        (["{twice}", "--model", "{policy}"], "twice.jsonl:2: the id '1' is there already"),
    ],
)
def test_a_mistake_is_one_sentence_and_makes_no_file(words, fault, prompts, tiny_world, capsys):
    places = {"prompts": prompts, "policy": tiny_world["policy"]}
    for name, text in (("empty", ""), ("twice", '{"prompt": "a", "id": 1}\n' * 2)):
        places[name] = prompts.with_name(f"{name}.jsonl")
        places[name].write_text(text)
    labels = prompts.with_name("labels.sqlite")
    assert main(["label", *(word.format(**places) for word in words), "--labels", str(labels), *SHORT]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and fault in error
    assert not labels.exists()


def test_a_prompt_that_leaves_no_room_is_named(tiny_world):
    opened = coati.responses.open_policy(tiny_world["policy"])
    sampling = configure(GenerationConfig, max_new_tokens=200)
    asked = [{"role": "user", "content": "red blue " * 100}]
    with pytest.raises(UserError, match=r"reads 128 tokens.*'red blue"):
        coati.responses.draw(opened, [asked], [[1, 2]], sampling)
    short = [{"role": "user", "content": "red"}]
    [text] = coati.responses.draw(opened, [short], [[1, 2]], sampling)  # as much as there is room for
    assert text


def test_the_pairs_come_first_of_which_the_reward_model_is_least_sure(label, prompts, tiny_world, tmp_path):
    """With another one, those that are left get another order."""
    models = [reward_model(tmp_path / f"reward{seed}", tiny_world, seed) for seed in (1, 2)]
    store = label(prompts, "--model", tiny_world["policy"], "--responses", 3, "--reward_model", models[0])
    [ana] = [person for person in store.people() if person.name != OWNER]
    for model in models:
        score = coati.responses.open_scorer(str(model))
        scores = {item.key: score(item.messages, [one.text for one in item.responses]) for item in store.items()}
        with store.connection() as db:
            rows = db.execute("SELECT pairs.*, key FROM pairs JOIN items ON items.id = item").fetchall()
        margins = {row["id"]: abs(scores[row["key"]][row["first"]] - scores[row["key"]][row["second"]]) for row in rows}
        assert {row["id"]: row["margin"] for row in rows} == pytest.approx(margins)
        if model == models[0]:  # the first pairs of an item's three are chosen by it
            least = [min(abs(a - b) for a, b in combinations(of_item, 2)) for of_item in scores.values()]
            assert sorted(margins.values()) == pytest.approx(sorted(least))
            shown = store.next(ana)
            assert shown.pair == min(margins, key=margins.get)
            store.label(ana, Click("a-click-of-hers", shown.id, "tie"))
            label("--reward_model", models[1])
    assert store.next(ana).pair == min(set(margins) - {shown.pair}, key=margins.get)


def test_a_score_is_that_of_the_tokens_up_to_eos(tiny_world, tmp_path):
    from transformers import AutoTokenizer

    folder = reward_model(tmp_path / "reward", tiny_world, 3)
    messages = [{"role": "user", "content": "Is the lamp red?"}]
    [found] = coati.responses.open_scorer(str(folder))(messages, ["no blue"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    ids = tokenizer("<bos>User: Is the lamp red?\nAssistant: no blue<eos>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        assert found == pytest.approx(RewardModel(str(folder)).eval()(torch.tensor([ids])).item())


def test_a_file_from_before_models_could_draw_takes_what_they_draw(tmp_path):
    path = tmp_path / "labels.sqlite"
    with Store.prepare(path).transaction() as db:
        db.execute("DROP TABLE drawn")
    store = Store.prepare(path)
    assert store.drawn() == {}
    store.add_drawn([("a prompt", "first", 0, "a response")])
    assert Store.prepare(path).drawn() == {("a prompt", "first", 0): "a response"}
