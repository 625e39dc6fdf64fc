"""Families of chat templates: prompts, masks, tools, reasoning and arguments, against a second writer in Python."""

import json
import re

import pytest

from coati.config import parse_config
from coati.data import (
    DataConfig,
    PreferenceRecord,
    PromptRecord,
    SFTRecord,
    UnpairedRecord,
    build_dataset,
    parse_record,
    prepare_tokenizer,
    tokenize,
)
from coati.data.tokenize import SkippedRow, tokenize_many
from coati.errors import UserError
from tests.data.families import FAMILIES, SPECIAL
from tools.fuzz_data import tokenizer_of

CONFIG = DataConfig()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name="find", **arguments):
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text):
    return {"role": "tool", "content": text, "tool_call_id": "abcdefghi"}


SYSTEM = {"role": "system", "content": "be short"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}}}]
AGENT = [
    user("where?"),
    assistant("", tool_calls=[call(what="it")], reasoning_content="I should look"),
    result("in the box"),
    assistant("There.", reasoning_content="found"),
]


def labels(sequence, tokenizer) -> str:
    return tokenizer.decode([i for i, m in zip(sequence.input_ids, sequence.loss_mask, strict=True) if m])


def written(family, messages, tools=None, prompt=False, **arguments) -> str:
    return "".join(text for text, _ in family.write(messages, tools, prompt, **arguments))


def notes_of(record, tokenizer, config=CONFIG) -> list[str]:
    [tokenized] = tokenize_many([record], tokenizer, config)
    assert not isinstance(tokenized.sample, ValueError), tokenized.sample
    return tokenized.notes


# --- prompts


@pytest.mark.parametrize("learns_responses", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_the_template_writes_with_its_generation_prompt(name, learns_responses):
    """REPORT 7: also where the generation prompt opens a thought."""
    family = FAMILIES[name]
    tokenizer, _ = prepare_tokenizer(family.tokenizer(), learns_responses=learns_responses)
    messages = [user("hi"), assistant("hello"), user("and?")]
    sample = tokenize(PromptRecord(messages), tokenizer, CONFIG)
    template = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert sample.text == template == written(family, messages, prompt=True)
    assert sample.input_ids == tokenizer(template, add_special_tokens=False)["input_ids"]


ONLY_PROMPTS = {
    "responses without EOS": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "no responses": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}<think>",
    "refuses responses": "{{ raise_exception('no') if messages[-1].role != 'user' else messages[-1].content }}",
}


@pytest.mark.parametrize("template", ONLY_PROMPTS.values(), ids=ONLY_PROMPTS)
def test_a_template_that_only_writes_prompts_is_enough_where_no_response_is_learned(template, new_tokenizer):
    """REPORT 7: GRPO and PPO need no response mask."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template"):
        prepare_tokenizer(tokenizer)
    tokenizer, notes = prepare_tokenizer(tokenizer, learns_responses=False)
    assert notes == [] and tokenize(PromptRecord([user("hi")]), tokenizer, CONFIG).text.startswith("hi")


# --- reasoning

OPENS_A_THOUGHT = {"deepseek_r1": {}, "qwq": {}, "deepseek_v3_1": {"thinking": True}}


@pytest.mark.parametrize("name", OPENS_A_THOUGHT)
def test_sft_with_a_template_that_opens_a_thought_learns_what_it_writes(name):
    """REPORT 7: the response begins where the rendered dialogue leaves the prompt, and a note says that it does."""
    family, arguments = FAMILIES[name], OPENS_A_THOUGHT[name]
    tokenizer, notes = prepare_tokenizer(family.tokenizer(), arguments=arguments)
    assert len(notes) == 1 and "'<think>" in notes[0] and "sampling starts from other text" in notes[0]
    record = SFTRecord([user("hi"), assistant("<b>hello"), user("and?"), assistant("<think>")])
    sample = tokenize(record, tokenizer, DataConfig(chat_template_kwargs=arguments))
    closes = "</think>" if name == "deepseek_v3_1" else ""
    assert labels(sample, tokenizer) == "".join(closes + text + family.eos_token for text in ("<b>hello", "<think>"))


@pytest.mark.parametrize("length", range(0, 60, 3))
@pytest.mark.parametrize("name", OPENS_A_THOUGHT)
def test_reasoning_that_a_template_cuts_is_said(name, length):
    """REPORT 7: not learned, and the report names it, whichever of the two is longer."""
    tokenizer = tokenizer_of(name)
    record = SFTRecord([user("hi"), assistant("<think>\nshould I?\n</think>\n\nhello" + " there" * length)])
    assert notes_of(record, tokenizer) == [
        "the chat template leaves out or rewrites the reasoning (up to </think>) in `content` of assistant messages"
    ]
    text = labels(tokenize(record, tokenizer, CONFIG), tokenizer)
    assert "should" not in text and text.strip().startswith("hello")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma3", "mistral", "phi3", "gpt_oss"])
def test_reasoning_that_a_template_writes_is_learned_without_a_note(name):
    """REPORT 7: the row's content and the masked text are the same."""
    tokenizer = tokenizer_of(name)
    content = "<think>\nshould I?\n</think>\n\nhello"
    record = SFTRecord([user("hi"), assistant(content)])
    assert content in labels(tokenize(record, tokenizer, CONFIG), tokenizer) and notes_of(record, tokenizer) == []


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "name", "mood"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_field_of_a_message_is_used_by_the_template_or_named(name, field):
    """REPORT 8: each field with each template."""
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    record = SFTRecord([user("hi"), assistant("hello", **{field: "some odd words"})])
    used = "some odd words" in written(family, record.messages)
    assert used == ((name, field) in {("qwen3", "reasoning_content"), ("gpt_oss", "thinking")})
    assert ("some odd words" in labels(tokenize(record, tokenizer, CONFIG), tokenizer)) == used
    left = [f"the chat template leaves out or rewrites `{field}` of assistant messages"]
    assert notes_of(record, tokenizer) == ([] if used else left)


@pytest.mark.parametrize(
    "value", ["  x ", "a\nb\n\nc", 'say "x" \\ {}', "é中🙂", "</think>", "<a <b> c", 3, 0.5, True, ["x", 4], {"y": "z"}]
)
@pytest.mark.parametrize("template", ["{{ m.extra }}", "{{ m.extra | tojson }}", "{{ m.extra | string | trim }}", "-"])
def test_whatever_a_value_is_it_is_seen_whether_the_template_writes_it(value, template, new_tokenizer):
    """REPORT 8: escaped or trimmed is written; texts, numbers, lists and objects."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.extra is defined %}" + template + "{% endif %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer, _ = prepare_tokenizer(tokenizer, learns_responses=False)
    record = SFTRecord([{**user("hi"), "extra": value}, assistant("a")])
    assert bool(notes_of(record, tokenizer)) == (template == "-")


# --- tools


@pytest.mark.parametrize("train_on", ["all", "each"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "mistral", "gpt_oss"])
def test_calls_of_tools_are_learned_and_their_results_read(name, train_on):
    """REPORT 8: `tools`, `tool_calls` and messages of tools, as the second writer writes them."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    record = SFTRecord(AGENT, TOOLS)
    sequence = tokenize(record, tokenizer, DataConfig(train_on=train_on))
    text, pieces = written(family, AGENT, TOOLS), family.write(AGENT, TOOLS)
    learned = "".join(piece for piece, who in pieces if who is not None and (train_on == "all" or who == 3))
    assert labels(sequence, tokenizer) == learned
    assert text.startswith(tokenizer.decode(sequence.input_ids)) and "in the box" in text and "finds" in text
    assert ('{"what": "it"}' in learned) == (train_on == "all")


def test_what_a_template_checks_is_used():
    """REPORT 8: Mistral's writes ids, and refuses those of another length: a mark in them changes that."""
    messages = [{name: value for name, value in m.items() if name != "reasoning_content"} for m in AGENT]
    assert notes_of(SFTRecord(messages, TOOLS), tokenizer_of("mistral")) == []
    unused = [f"the chat template leaves out or rewrites `{name}`" for name in ("tool_calls.id", "tool_call_id")]
    found = notes_of(SFTRecord(messages, TOOLS), tokenizer_of("llama3"))
    assert found == [f"{unused[0]} of assistant messages", f"{unused[1]} of tool messages"]


def test_tools_of_a_row_reach_prompts_and_pairs():
    """REPORT 8: of all kinds of records."""
    tokenizer, family = tokenizer_of("qwen2_5"), FAMILIES["qwen2_5"]
    prompt = tokenize(PromptRecord(AGENT[:3], {}, TOOLS), tokenizer, CONFIG)
    assert prompt.text == written(family, AGENT[:3], TOOLS, prompt=True)
    pair = tokenize(PreferenceRecord(AGENT[:1], AGENT[1:], [assistant("No.")], tools=TOOLS), tokenizer, CONFIG)
    calls = '<tool_call>\n{"name": "find", "arguments": {"what": "it"}}\n</tool_call><|im_end|>'
    assert labels(pair.chosen, tokenizer) == calls + "There.<|im_end|>"
    assert labels(pair.rejected, tokenizer) == "No.<|im_end|>"
    one = tokenize(UnpairedRecord(AGENT[:3], AGENT[3:], True, TOOLS), tokenizer, CONFIG)
    assert labels(one.sequence, tokenizer) == "There.<|im_end|>" and "finds" in tokenizer.decode(one.sequence.input_ids)


@pytest.mark.parametrize("name", ["phi3", "deepseek_r1", "gemma3", "qwq"])
def test_a_template_without_tools_names_them_or_refuses_the_row(name):
    """REPORT 8: no empty response is learned where a call was."""
    tokenizer = tokenizer_of(name)
    with pytest.raises(ValueError, match=r"writes nothing of a response|refuses the row"):
        tokenize(SFTRecord(AGENT, TOOLS), tokenizer, CONFIG)
    plain = SFTRecord([user("hi"), assistant("hello")], TOOLS)
    assert notes_of(plain, tokenizer) == ["the chat template leaves out or rewrites `tools`"]


def test_a_tokenizer_with_a_template_for_tools_uses_it(new_tokenizer, template_text, tmp_path, write_jsonl):
    """REPORT 8: tokenizers may have several named templates."""
    tokenizer = new_tokenizer(eos_token="<|im_end|>")
    special = "{{ tools | tojson }}" + template_text["chatml"]
    tokenizer.chat_template = {"default": template_text["chatml"], "tool_use": special}
    tokenizer, _ = prepare_tokenizer(tokenizer)
    with_tools = tokenize(SFTRecord([user("hi"), assistant("a")], TOOLS), tokenizer, CONFIG)
    without = tokenize(SFTRecord([user("hi"), assistant("a")]), tokenizer, CONFIG)
    assert tokenizer.decode(with_tools.input_ids) == json.dumps(TOOLS) + tokenizer.decode(without.input_ids)
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    assert len(build_dataset([write_jsonl([{"prompt": "a", "completion": "b"}])], "sft", tokenizer, config)) == 1


# --- weights


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
@pytest.mark.parametrize("name", ["llama3", "chatml", "chatml_tagged", "default"])
def test_a_message_of_weight_0_is_read_and_not_learned(name, off, tokenizer_for):
    """REPORT 8: its words stay in the context of the next response."""
    tokenizer = tokenizer_for(name)
    [record] = parse_record({"messages": [user("a"), assistant("wrong", **off), user("b"), assistant("right")]}, "sft")
    sequence = tokenize(record, tokenizer, CONFIG)
    assert labels(sequence, tokenizer).strip() == "right" + tokenizer.eos_token
    assert "wrong" in tokenizer.decode(sequence.input_ids) and "weight" not in tokenizer.decode(sequence.input_ids)


def test_weights_of_1_change_nothing(tokenizer_for):
    """REPORT 8: and a user's weight is said to be without effect."""
    messages = [user("a"), assistant("b", weight=1, train=True), {**user("c"), "weight": 1}, assistant("d")]
    [record] = parse_record({"messages": messages}, "sft")
    assert record.messages == [user("a"), assistant("b"), user("c"), assistant("d")]
    assert record.unused == ("`weight` of user messages (only the assistant's are learned)",)
    tokenizer = tokenizer_for("chatml")
    assert labels(tokenize(record, tokenizer, CONFIG), tokenizer) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("train_on", ["all", "last", "each"])
def test_a_row_with_nothing_to_learn_is_dropped_and_counted(train_on, tokenizer_for, tmp_path, write_jsonl):
    """REPORT 8: it is no fault of the row; with `each`, only its silent responses are left out."""
    rows = [{"messages": [user("a"), assistant("b", weight=0)]}, {"messages": [user("a"), assistant("b")]}]
    config = DataConfig(cache_dir=str(tmp_path), train_on=train_on)
    data = build_dataset([write_jsonl(rows)], "sft", tokenizer_for("chatml"), config)
    [problem] = data.report.problems
    assert len(data) == 1 and not problem.bad
    assert (problem.reason, problem.lines) == ("the responses to learn have weight 0", [1])
    [record] = parse_record(rows[0], "sft")
    with pytest.raises(SkippedRow):
        tokenize(record, tokenizer_for("chatml"), config)


def test_what_follows_the_last_learned_response_is_counted(tokenizer_for):
    """REPORT 8: it is cut, for no token of it is learned."""
    [record] = parse_record({"messages": [user("a"), assistant("b"), user("c"), assistant("d", weight=0)]}, "sft")
    tokenizer = tokenizer_for("chatml")
    assert tokenizer.decode(tokenize(record, tokenizer, CONFIG).input_ids).endswith("b<|im_end|>")
    assert notes_of(record, tokenizer) == ["the messages after the last response that is learned"]


@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0]])
@pytest.mark.parametrize("field", ["weight", "train"])
def test_a_weight_that_is_neither_0_nor_1_is_refused(field, value):
    """REPORT 8: rather than rounded."""
    with pytest.raises(ValueError, match=rf"`messages` has a `{field}` that is neither 0 nor 1"):
        parse_record({"messages": [user("a"), assistant("b", **{field: value})]}, "sft")


def test_pairs_and_labels_of_a_response_of_weight_0_are_refused():
    """REPORT 8: a reward is read at the response's end, so it must be there."""
    row = {"prompt": "a", "chosen": [assistant("b", weight=0)], "rejected": [assistant("c")]}
    with pytest.raises(ValueError, match="the last response of `chosen` has weight 0"):
        parse_record(row, "preference")
    with pytest.raises(ValueError, match="the labeled response has weight 0"):
        parse_record({"messages": [user("a"), assistant("b", weight=0)], "label": True}, "unpaired")


# --- several pieces, rewritten turns


def test_a_response_in_several_generation_tags_is_learned_whole():
    """REPORT 29: as Phi-3's training templates mark them."""
    tokenizer = tokenizer_of("phi3")
    record = SFTRecord(
        [SYSTEM, user("a"), assistant("one"), user("b"), assistant("two", weight=0), user("c"), assistant("three")]
    )
    assert labels(tokenize(record, tokenizer, CONFIG), tokenizer) == "one<|end|>three<|end|>"
    pair = PreferenceRecord([user("a"), assistant("one"), user("b")], [assistant("two")], [assistant("three")])
    assert labels(tokenize(pair, tokenizer, CONFIG).chosen, tokenizer) == "two<|end|>"


def test_text_between_the_tags_is_not_learned(new_tokenizer):
    """REPORT 29: the pieces and no more; their number may differ from one message to the next."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %}{{ m.content }}{% endgeneration %}"
        "[B]{% if m.mood %}{% generation %} {{ m.mood }}{% endgeneration %}{% endif %}{% generation %}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer, _ = prepare_tokenizer(tokenizer)
    record = SFTRecord([user("a"), assistant("b", mood="glad"), user("c"), assistant("d")])
    assert labels(tokenize(record, tokenizer, CONFIG), tokenizer) == "b glad</s>d</s>"


def test_tags_that_miss_a_response_are_refused(new_tokenizer):
    """REPORT 29: a count of tags that happens to fit is no proof."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.mood != 'sad' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer, _ = prepare_tokenizer(tokenizer)
    record = SFTRecord([user("a"), assistant("b"), user("c"), assistant("d", mood="sad")])
    with pytest.raises(ValueError, match="tags do not surround a response"):
        tokenize(record, tokenizer, CONFIG)


TURNS = [user("a"), assistant("one"), user("b"), assistant("two")]


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_the_remedies_for_rewritten_turns_help(name, tmp_path, write_jsonl):
    """REPORT 29: `each` learns every response as it is sampled, `last` the last; neither is named for pairs."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    with pytest.raises(ValueError, match=r"--train_on each, or only the last with --train_on last\)"):
        tokenize(SFTRecord(TURNS), tokenizer, CONFIG)
    pair = PreferenceRecord(TURNS[:1], TURNS[1:], [assistant("no")])
    with pytest.raises(ValueError, match=r"once more turns follow \(mark responses in it with {% generation %}\)$"):
        tokenize(pair, tokenizer, CONFIG)
    for train_on, ends in (("each", [2, 4]), ("last", [4])):
        config = DataConfig(train_on=train_on, cache_dir=str(tmp_path))
        data = build_dataset([write_jsonl([{"messages": TURNS}])], "sft", tokenizer, config)
        learned = ["".join(t for t, who in family.write(TURNS[:end]) if who == end - 1) for end in ends]
        assert [labels(sample, tokenizer) for sample in data] == learned
        assert data.report.unused == [] and list(data.report.samples.values()) == [len(ends)]


def test_with_each_a_thought_is_learned_once_and_not_called_left_out():
    """REPORT 29: Qwen3 drops it from later prompts, and its own record holds it."""
    tokenizer, config = tokenizer_of("qwen3"), DataConfig(train_on="each")
    messages = [
        user("a"),
        assistant("one", reasoning_content="hm"),
        user("b"),
        assistant("two", reasoning_content="ah"),
    ]
    from coati.data.records import one_record_per_response

    results = tokenize_many(one_record_per_response(SFTRecord(messages)), tokenizer, config)
    assert ["hm" in labels(r.sample, tokenizer) for r in results] == [True, False]
    assert [r.notes for r in results] == [[], []]


def test_a_template_that_does_not_write_responses_after_its_prompt_names_a_remedy_that_helps():
    """REPORT 29: Mistral's writes a system prompt only where a response is to follow; no --train_on changes that."""
    with pytest.raises(ValueError, match="does not write a response after its own prompt") as error:
        tokenize(SFTRecord([SYSTEM, *TURNS[:2]]), tokenizer_of("mistral"), CONFIG)
    assert "--train_on" not in str(error.value) and "{% generation %}" in str(error.value)


# --- arguments


@pytest.mark.parametrize("thinks", [True, False])
def test_arguments_reach_the_template(thinks):
    """REPORT 29: prompts and rows alike."""
    tokenizer, config = tokenizer_of("qwen3"), DataConfig(chat_template_kwargs={"enable_thinking": thinks})
    prompt = tokenize(PromptRecord([user("a")]), tokenizer, config)
    row = tokenize(SFTRecord([user("a"), assistant("b")]), tokenizer, config)
    empty = "<think>\n\n</think>\n\n"
    assert prompt.text.endswith("assistant\n" if thinks else f"assistant\n{empty}")
    assert labels(row, tokenizer) == (empty if thinks else "") + "b<|im_end|>"
    assert row.input_ids[: len(prompt)] == prompt.input_ids


@pytest.mark.parametrize("form", ["flag", "file", "file and flag", "mapping"])
def test_arguments_are_given_as_a_mapping_or_as_json(form, tmp_path):
    """REPORT 29: YAML has mappings, a command line JSON; a flag wins."""
    path = tmp_path / "run.yaml"
    path.write_text("chat_template_kwargs:\n  enable_thinking: " + ("true\n" if "flag" in form else "false\n"))
    flags = ["--chat_template_kwargs", '{"enable_thinking": false}'] if "flag" in form else []
    files = ["--config", str(path)] if "file" in form else []
    given = DataConfig(chat_template_kwargs={"enable_thinking": False})
    config = given if form == "mapping" else parse_config(DataConfig, files + flags)
    assert config.template_arguments == config.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("value", ["enable_thinking=false", "[1]", "3"])
def test_arguments_that_are_no_mapping_are_refused(value):
    """REPORT 29: in Python and as a flag."""
    with pytest.raises(UserError, match=r"chat_template_kwargs is .*; it takes a mapping"):
        DataConfig(chat_template_kwargs=value)
    with pytest.raises(UserError, match=r"--chat_template_kwargs is .*; it takes a mapping"):
        parse_config(DataConfig, ["--chat_template_kwargs", value])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"enable_thinkin": False}, "no such word"), ({"tools": []}, "sets itself"), ({"tokenize": True}, "sets itself")],
)
def test_arguments_that_a_template_does_not_know_are_refused(arguments, message):
    """REPORT 29: they would be without effect."""
    with pytest.raises(UserError, match=message):
        prepare_tokenizer(FAMILIES["qwen3"].tokenizer(), arguments=arguments)


def test_other_arguments_are_other_data(tmp_path, write_jsonl):
    """REPORT 29: the cache knows them."""
    tokenizer, source = tokenizer_of("qwen3"), write_jsonl([{"prompt": "a"}])
    texts = []
    for thinks in (True, False):
        config = DataConfig(cache_dir=str(tmp_path), chat_template_kwargs={"enable_thinking": thinks})
        texts.append(build_dataset([source], "prompt", tokenizer, config)[0].text)
    assert "<think>" not in texts[0] and "<think>" in texts[1]


def test_every_special_token_of_the_families_is_one_token():
    """These tests could not see a cut token otherwise."""
    tokenizer = tokenizer_of("qwen3")
    assert all(len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1 for token in SPECIAL.split())
    used = {token for f in FAMILIES.values() for token in re.findall(r"<[|｜][^>\n]*[|｜]>", f.template)}
    assert used <= set(SPECIAL.split())


def test_a_row_that_breaks_the_template_s_own_code_has_a_reason(new_tokenizer, template_text):
    """REPORT 8: whatever its expressions raise."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].level %}{{ messages[0].level + 'x' }}{% endif %}" + template_text["llama3"]
    )
    tokenizer, _ = prepare_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="the chat template refuses the row"):
        tokenize(SFTRecord([{**user("a"), "level": 3}, assistant("b")]), tokenizer, CONFIG)


FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


@pytest.mark.parametrize("settings", [{}, {"clean_up_tokenization_spaces": True}])
def test_a_clean_up_of_spaces_that_is_ignored_is_not_warned_of(settings, new_tokenizer, monkeypatch):
    """As the files of SmolLM2 and Llama 3 ask for it."""
    from transformers import tokenization_utils_tokenizers

    from coati.rollout.prompts import response_texts

    warnings = []
    monkeypatch.setattr(tokenization_utils_tokenizers.logger, "warning_once", warnings.append)
    tokenizer, _ = prepare_tokenizer(new_tokenizer(**settings))
    text = "a , b ! it 's 1 ."
    assert response_texts(tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"]]) == [text]
    assert warnings == []


def test_a_clean_up_of_spaces_that_is_insisted_on_stays(new_tokenizer):
    tokenizer, _ = prepare_tokenizer(new_tokenizer(**{"clean_up_tokenization_spaces": True, FORCED: True}))
    assert tokenizer.clean_up_tokenization_spaces
    assert tokenizer.decode(tokenizer("a , b", add_special_tokens=False)["input_ids"]) == "a, b"
