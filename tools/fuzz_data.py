"""Draws rows and dialogues, and looks for masks that are wrong and for parts of a row that vanish.

    .venv/bin/python tools/fuzz_data.py [EXAMPLES]

Two things must hold, for every family of templates in tests/data/families.py:

- What is masked in is exactly what the template wrote for the assistant. A second writer in plain Python says what that
  is, and which dialogues a template can't label.
- Nothing of a row is dropped without being counted. Every text and number of a row is one of a kind: it is found in the
  sample, in the columns for rewards, or named in the report, or the row is refused in one line.

tests/data/test_fuzz.py runs a few examples of each. A failure is shrunk to a small one.
"""

import itertools
import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coati.data import DataConfig, PromptRecord, SFTRecord, parse_record, prepare_tokenizer, tokenize
from coati.data.records import one_record_per_response
from coati.data.tokenize import tokenize_many
from tests.data.families import FAMILIES, Family, Refused

# What people write that could be mistaken for the template's own.
TRAPS = [
    "",
    "assistant",
    "Assistant:",
    "user\n",
    "<think>",
    "<|im_start|>",
    "<｜User｜>",
    "[INST]",
    "{",
    '"',
    "\\n",
    "é",
]
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
RESPONSES = ("completion", "response", "output", "solution", "answer")
ARGUMENTS = {
    "qwen3": [{}, {"enable_thinking": False}],
    "llama3": [{}, {"date_string": "28 Nov 2026"}],
    "deepseek_v3_1": [{}, {"thinking": True}],
    "gpt_oss": [{}, {"reasoning_effort": "high"}],
}
# Fields that say something of the row instead of being a part of it.
VERDICTS = ("weight", "train", "training", "label", "margin", "score_chosen", "score_rejected")


@cache
def tokenizer_of(name: str):
    tokenizer, _ = prepare_tokenizer(FAMILIES[name].tokenizer())
    return tokenizer


class Stamps:
    """Makes each text and number one of a kind, and remembers which texts the assistant wrote to be learned."""

    def __init__(self):
        self.numbers = itertools.count(1000000)  # a stamp has 9 characters, as ids of calls must have for Mistral
        self.learned: set[str] = set()
        self.others: set[str] = set()

    def text(self, draw, *, learned: bool = False) -> str:
        stamp = f"w{next(self.numbers)}q"
        (self.learned if learned else self.others).add(stamp)
        before, after = draw(st.sampled_from(TRAPS)), draw(st.sampled_from(TRAPS))
        return f"{before} {stamp} {after}".strip()

    def number(self) -> int:
        return 70000000 + next(self.numbers)


# --- dialogues


@st.composite
def dialogues(draw, tools: bool = True, extras: bool = True):
    """Messages as records hold them, tool descriptions or None, and the stamps."""
    stamps, messages = Stamps(), []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": stamps.text(draw)})
    described = [describe(draw, stamps)] if tools and draw(st.booleans()) else None
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": stamps.text(draw)})
        for _ in range(draw(st.integers(0, 2)) if tools else 0):
            learned = draw(st.booleans())
            calls = [call(draw, stamps, learned) for _ in range(draw(st.integers(1, 2)))]
            said = stamps.text(draw, learned=learned) if draw(st.booleans()) else ""
            messages.append({"role": "assistant", "content": said, "tool_calls": calls} | weigh(learned))
            for made in calls:
                found = {"role": "tool", "content": stamps.text(draw)}
                messages.append(found | ({"tool_call_id": made["id"]} if "id" in made else {}))
        learned = draw(st.integers(0, 3)) > 0
        answer = {"role": "assistant", "content": stamps.text(draw, learned=learned)} | weigh(learned)
        if extras and draw(st.booleans()):
            name = draw(st.sampled_from(["reasoning_content", "thinking", "name", "in content"]))
            thought = stamps.text(draw, learned=learned)
            if name == "in content":
                answer["content"] = f"<think>\n{thought}\n</think>\n\n{answer['content']}"
            else:
                answer[name] = thought
        messages.append(answer)
    return messages, described, stamps


def weigh(learned: bool) -> dict:
    return {} if learned else {"weight": 0}


def call(draw, stamps: Stamps, learned: bool) -> dict:
    arguments = {name: stamps.text(draw, learned=learned) for name in draw(st.sets(st.sampled_from("abc"), max_size=2))}
    function = {"name": stamps.text(draw, learned=learned).replace(" ", "_"), "arguments": arguments}
    made = {"type": "function", "function": function}
    return made | ({"id": f"w{next(stamps.numbers)}q"} if draw(st.booleans()) else {})


def describe(draw, stamps: Stamps) -> dict:
    function = {"name": "find", "description": stamps.text(draw), "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


# --- the first property: masks


def expected(family: Family, messages: list[dict], tools, learned: list[int], arguments: dict) -> str | None:
    """The text to be masked in, by the second writer; None where the template can't label the dialogue."""

    def write(upto: int, prompt: bool = False):
        return family.write(messages[:upto], tools, prompt, **arguments)

    try:
        written, found = write(len(messages)), ""
        for i in learned:
            own = "".join(text for text, who in written if who == i)
            before = "".join(text for text, _ in written[: [who for _, who in written].index(i)])
            if not family.tagged:
                through = "".join(text for text, _ in write(i + 1))
                prompt = "".join(text for text, _ in write(i, prompt=True))
                if not "".join(text for text, _ in written).startswith(through) or not prompt.startswith(before):
                    return None
            if not own.replace(family.eos_token, "").strip():
                return None
            found += own
        return found
    except Refused:
        return None


def check_mask(family: Family, messages: list[dict], tools, train_on: str, arguments: dict) -> str:
    """What became of the dialogue: "labeled" or "refused"; AssertionError where the mask is wrong."""
    tokenizer = tokenizer_of(family.name)
    config = DataConfig(train_on=train_on, chat_template_kwargs=arguments, max_length=10**6)
    shown = [{name: value for name, value in m.items() if name != "weight"} for m in messages]
    records = [SFTRecord(messages, tools)]
    if train_on == "each":
        records = one_record_per_response(records[0])
    outcome = "refused"
    for record in records:
        answers = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        answers = answers if train_on == "all" else answers[-1:]
        learned = [i for i in answers if "weight" not in messages[i]]
        should_be = expected(family, shown[: len(record.messages)], tools, learned, arguments) if learned else None
        try:
            sample = tokenize(record, tokenizer, config)
        except ValueError as error:
            assert should_be is None, f"refused: {error}"
            continue
        masked = [i for i, is_label in zip(sample.input_ids, sample.loss_mask, strict=True) if is_label]
        assert tokenizer.decode(masked) == should_be
        text = "".join(text for text, _ in family.write(shown[: len(record.messages)], tools, **arguments))
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sample.input_ids == whole[: len(sample)]
        outcome = "labeled"
    return outcome


def check_prompt(family: Family, messages: list[dict], tools, arguments: dict) -> str:
    """As `check_mask`: a prompt is what the template writes with its generation prompt."""
    tokenizer, config = tokenizer_of(family.name), DataConfig(chat_template_kwargs=arguments, max_prompt_length=10**6)
    shown = [{name: value for name, value in m.items() if name != "weight"} for m in messages[:-1]]
    try:
        should_be = "".join(text for text, _ in family.write(shown, tools, True, **arguments))
    except Refused:
        should_be = None
    try:
        sample = tokenize(PromptRecord(messages[:-1], {}, tools), tokenizer, config)
    except ValueError as error:
        assert should_be is None, f"refused: {error}"
        return "refused"
    assert sample.text == should_be
    assert sample.input_ids == tokenizer(should_be, add_special_tokens=False)["input_ids"]
    return "labeled"


# --- the second property: rows


@st.composite
def rows(draw, kind: str):
    """A row in one of the formats of this kind, with other fields beside it; and the stamps."""
    messages, described, stamps = draw(dialogues())
    if kind == "preference" or (kind in ("unpaired", "prompt") and draw(st.booleans())):
        row = pair(draw, messages, stamps)
    else:
        row = demonstration(draw, messages, stamps)
    if described is not None:
        row["tools"] = draw(st.sampled_from([described, json.dumps(described), described[0]["function"]]))
    if kind == "unpaired" and "chosen" not in row:
        row["label"] = draw(st.booleans())
    other = draw(
        st.sets(st.sampled_from(["system", "history", "context", "id", "meta", "source", *PROMPTS]), max_size=3)
    )
    for name in sorted(other):
        row.setdefault(name, draw(other_field(name, stamps)))
    # Written to JSON and read, as from a file.
    return json.loads(json.dumps(dict(draw(st.permutations(list(row.items())))))), stamps


def other_field(name: str, stamps: Stamps):
    """Mostly of the right kind where the name has a meaning."""
    text = st.builds(lambda: f"w{mark(stamps)}q")
    answer = st.builds(lambda: f"w{next(stamps.numbers)}q")  # learned, but where there is a prompt
    right = {"system": text, "context": text, "input": text, "history": st.lists(st.tuples(text, answer), max_size=2)}
    anything = other_values(stamps)
    return st.one_of([right.get(name, anything)] * 4 + [anything])


def demonstration(draw, messages: list[dict], stamps: Stamps) -> dict:
    shape = draw(st.sampled_from(["list", "fields", "turns", "instances"]))
    if shape == "list":
        return {draw(st.sampled_from(["messages", "conversations", "conversation"])): spell(draw, messages, stamps)}
    if shape == "turns":
        return {"prompt": spell(draw, messages[:-1], stamps), "completion": spell(draw, messages[-1:], stamps)}
    if shape == "instances":
        instance = {"input": stamps.text(draw), "output": stamps.text(draw, learned=True)}
        return {"instruction": stamps.text(draw), "instances": [instance]}
    row = {draw(st.sampled_from(PROMPTS)): stamps.text(draw)}
    row[draw(st.sampled_from(RESPONSES))] = stamps.text(draw, learned=True)
    return row


def pair(draw, messages: list[dict], stamps: Stamps) -> dict:
    chosen, rejected = ({"role": "assistant", "content": stamps.text(draw, learned=True)} for _ in range(2))
    shape = draw(st.sampled_from(["texts", "messages", "message", "whole", "hh"]))
    asked = [{name: value for name, value in m.items() if name != "weight"} for m in messages[:-1]]
    forget(stamps, messages)
    if shape == "texts":
        texts = {"chosen": chosen["content"], "rejected": rejected["content"]}
        return {draw(st.sampled_from(PROMPTS)): stamps.text(draw), **texts}
    if shape == "messages":
        return {"prompt": spell(draw, asked, stamps), "chosen": [chosen], "rejected": [rejected]}
    if shape == "message":
        return {"conversations": spell(draw, asked, stamps), "chosen": chosen, "rejected": rejected}
    if shape == "whole":
        return {"chosen": [*asked, chosen], "rejected": [*asked, rejected]}
    opening = f"\n\nHuman: {stamps.text(draw)}\n\nAssistant: "
    return {"chosen": opening + chosen["content"], "rejected": opening + rejected["content"]}


def forget(stamps: Stamps, messages: list[dict]):
    """What is in a prompt is not learned, whoever wrote it."""
    text = json.dumps(messages)
    stamps.others |= {stamp for stamp in stamps.learned if stamp in text}
    stamps.learned -= stamps.others


def spell(draw, messages: list[dict], stamps: Stamps) -> list[dict]:
    """The messages as some data set writes them."""
    role, content = draw(st.sampled_from([("role", "content"), ("from", "content"), ("from", "value")]))
    names = {"system": ["system", "developer"], "user": ["user", "human"], "tool": ["tool", "observation"]}
    names["assistant"] = ["assistant", "gpt", "model"]
    written = []
    for message in messages:
        rest = {name: value for name, value in message.items() if name not in ("role", "content")}
        text = message["content"]
        if draw(st.integers(0, 4)) == 0:
            text = [{"type": "text", "text": text}, *draw(st.sampled_from([[], [{"type": "text", "text": "!"}]]))]
        if "weight" in rest and draw(st.booleans()):
            rest["train"] = bool(rest.pop("weight"))
        if "tool_calls" in rest:
            rest["tool_calls"] = [spell_call(draw, made) for made in rest["tool_calls"]]
        if draw(st.integers(0, 5)) == 0:
            rest["note"] = draw(other_values(stamps))
        written.append({role: draw(st.sampled_from(names[message["role"]])), content: text, **rest, "gone": None})
    return written


def spell_call(draw, made: dict) -> dict:
    name, arguments = made["function"]["name"], made["function"]["arguments"]
    function = {"name": name, "arguments": draw(st.sampled_from([arguments, json.dumps(arguments)]))}
    rest = {key: value for key, value in made.items() if key not in ("type", "function")}
    return draw(st.sampled_from([{**made, "function": function}, {**rest, **function}]))


def other_values(stamps: Stamps):
    """Texts, numbers and what holds them."""
    text = st.builds(lambda: f"w{mark(stamps)}q")
    number = st.builds(stamps.number)
    leaves = text | number | st.none()
    return leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.sampled_from("xy"), leaves, max_size=2)


def mark(stamps: Stamps) -> int:
    number = next(stamps.numbers)
    stamps.others.add(f"w{number}q")
    return number


def leaves_of(value, path: tuple = ()):
    """(path, stamp) of each text and number."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves_of(inner, (*path, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves_of(inner, (*path, i))
    elif isinstance(value, str) and path[-1] not in ("role", "from", "type"):
        words = value.replace("_", " ").replace('"', " ").replace("\\", " ").split()
        yield from ((path, word) for word in words if is_stamp(word))
    elif isinstance(value, int) and not isinstance(value, bool) and path[-1] not in VERDICTS:
        yield path, str(value)


def is_stamp(word: str) -> bool:
    return word[:1] == "w" and word[-1:] == "q" and word[1:-1].isdigit()


def check_row(family: Family, kind: str, row: dict, stamps: Stamps, train_on: str) -> str:
    """What became of the row: "kept" or "refused"; AssertionError where something is lost or wrongly learned."""
    tokenizer = tokenizer_of(family.name)
    config = DataConfig(train_on=train_on, max_length=10**6, max_prompt_length=10**6)
    try:
        records = parse_record(row, kind)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    if train_on == "each":
        records = [one for record in records for one in one_record_per_response(record)]
    results = tokenize_many(records, tokenizer, config)
    for result in results:
        assert not isinstance(result.sample, ValueError) or (str(result.sample) and "\n" not in str(result.sample))
    if any(isinstance(result.sample, ValueError) for result in results):
        return "refused"  # a sample of the row is dropped and counted
    texts, learned, notes = "", "", [note for result in results for note in result.notes]
    for sample in (result.sample for result in results):
        if kind == "prompt":
            texts += sample.text + json.dumps(sample.columns, ensure_ascii=False)
            continue
        sides = [sample.chosen, sample.rejected] if kind == "preference" else [getattr(sample, "sequence", sample)]
        for side in sides:
            texts += tokenizer.decode(side.input_ids)
            learned += tokenizer.decode([i for i, m in zip(side.input_ids, side.loss_mask, strict=True) if m])
    for path, stamp in leaves_of(row):
        assert stamp in texts or is_named(path, notes), f"{path} ({stamp}) is nowhere; notes: {notes}"
    wrong = [stamp for stamp in stamps.others if stamp in learned]
    assert not wrong, f"{wrong} is learned"
    return "kept"


def is_named(path: tuple, notes: list[str]) -> bool:
    """Whether the report has a line for what is at this place of the row."""
    names = {"content" if name == "value" else str(name) for name in path}
    quoted = {name for note in notes for part in note.split("`")[1::2] for name in part.split(".")}
    general = ["the last response", "the messages after the last response"]
    # A field that became a message is named as such.
    became = {"system": "system"} | dict.fromkeys((*RESPONSES, "chosen", "rejected"), "assistant")
    general.append(f"`content` of {became.get(path[0], 'user')} messages")
    return bool(names & quoted) or any(text in note for note in notes for text in general)


# --- running them

KINDS = ("sft", "preference", "unpaired", "prompt")


def run(name: str, examples: int, **more) -> Counter:
    """Both properties for one family; how many dialogues and rows were kept and refused."""
    family, outcomes = FAMILIES[name], Counter()
    how = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), **more)
    train_on = st.sampled_from(["all", "last", "each"])
    arguments = st.sampled_from(ARGUMENTS.get(name, [{}]))

    @how
    @given(dialogues(tools=family.tools), train_on, arguments)
    def masks(dialogue, train_on, arguments):
        messages, tools, _ = dialogue
        outcomes[f"dialogues {check_mask(family, messages, tools, train_on, arguments)}"] += 1
        outcomes[f"prompts {check_prompt(family, messages, tools, arguments)}"] += 1

    @how
    @given(st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), rows(kind))), train_on)
    def nothing_is_lost(drawn, train_on):
        kind, (row, stamps) = drawn
        outcomes[f"{kind} rows {check_row(family, kind, row, stamps, train_on)}"] += 1

    masks()
    nothing_is_lost()
    return outcomes


def main():
    examples = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for name in FAMILIES:
        print(name, dict(sorted(run(name, examples).items())), flush=True)


if __name__ == "__main__":
    main()
