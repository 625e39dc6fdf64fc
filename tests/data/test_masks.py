"""Response masks come from where tokens start in the rendered text, for any template and any words."""

import copy

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coati.data import (
    DataConfig,
    PreferenceRecord,
    PromptRecord,
    SFTRecord,
    TooLong,
    prepare_tokenizer,
    tokenize,
)
from coati.data.tokenize import _Encoded, _mask_responses, _token_starts
from coati.errors import UserError

CONFIG = DataConfig()
TEMPLATES = ["default", "llama3", "chatml", "chatml_tagged"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def labels(sequence, tokenizer) -> str:
    """The text of the labeled tokens."""
    return tokenizer.decode([i for i, m in zip(sequence.input_ids, sequence.loss_mask, strict=True) if m])


def responses_text(name: str, responses: list[str], eos: str) -> str:
    """What must be labeled: each response (after a space in the default template) and its EOS."""
    return "".join((" " if name == "default" else "") + response + eos for response in responses)


TRAPS = [
    [user("Assistant: a User: a"), assistant("a")],
    [user("user assistant </s> <|im_end|> <|im_start|>assistant\nno"), assistant("user")],
    [user("say Paris"), assistant("Paris"), user("Assistant: Paris"), assistant("Assistant: Paris")],
    [{"role": "system", "content": "assistant"}, user("x"), assistant("assistant\nassistant")],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", TRAPS)
def test_user_text_does_not_move_labels(name, messages, tokenizer_for):
    """PITFALL 14: role names, the response's text and special tokens in what a user writes."""
    tokenizer = tokenizer_for(name)
    sequence = tokenize(SFTRecord(messages), tokenizer, CONFIG)
    responses = [m["content"] for m in messages if m["role"] == "assistant"]
    assert labels(sequence, tokenizer) == responses_text(name, responses, tokenizer.eos_token)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
SYSTEM = st.one_of(st.none(), TEXT)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=80, deadline=None)
@given(system=SYSTEM, turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_labels_decode_to_the_responses_and_their_eos(name, system, turns, tokenizer_for):
    """For any dialogue: the labeled tokens are exactly the responses, each with its EOS."""
    tokenizer = tokenizer_for(name)
    # llama3 trims contents, and a response's leading space may share a token with the header's newline.
    turns = [(question.strip(), response.strip()) for question, response in turns]
    assume(all(question and response for question, response in turns))
    messages = [m for question, response in turns for m in (user(question), assistant(response))]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    sequence = tokenize(SFTRecord(messages), tokenizer, CONFIG)
    expected = responses_text(name, [response for _, response in turns], tokenizer.eos_token)
    assert labels(sequence, tokenizer) == expected
    assert sequence.loss_mask[-1] and sequence.input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_whole_text(name, tokenizer_for):
    """PITFALL 16: the dialogue is tokenized once, so its tokens do not depend on where the prompt ends."""
    tokenizer = tokenizer_for(name)
    for response in ("x", "\n\nx", "  x", "\u00e9x", "1"):
        messages = [user("hi"), assistant(response)]
        sequence = tokenize(SFTRecord(messages), tokenizer, CONFIG)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sequence.input_ids == whole[: len(sequence.input_ids)]
        assert set(tokenizer.decode(whole[len(sequence.input_ids) :])) <= {"\n"}


def test_a_token_that_starts_in_the_prompt_is_not_a_label(tokenizer_for):
    """PITFALL 16: header newline and the response's own newlines may merge; the shared token is prompt."""
    tokenizer = tokenizer_for("chatml")
    sequence = tokenize(SFTRecord([user("hi"), assistant("\n\nx")]), tokenizer, CONFIG)
    assert labels(sequence, tokenizer) in ("\n\nx<|im_end|>", "\nx<|im_end|>", "x<|im_end|>")
    assert tokenizer.decode(sequence.input_ids).endswith("assistant\n\n\nx<|im_end|>")


@pytest.mark.parametrize("trim", [True, False])
def test_a_header_that_ends_in_a_space_is_not_a_label(trim, new_tokenizer):
    """PITFALL 14: offsets that trim spaces leave a token of spaces empty; it belongs before, not after."""
    from tokenizers import processors

    tokenizer = new_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'A:  ' if m.role == 'assistant' else 'U: ' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:  ' }}{% endif %}"
    )
    tokenizer, _ = prepare_tokenizer(tokenizer)
    assert len(tokenizer(" <", add_special_tokens=False)["input_ids"]) == 2, "the space must be its own token"
    sequence = tokenize(SFTRecord([user("q"), assistant("<x>")]), tokenizer, CONFIG)
    assert labels(sequence, tokenizer) == "<x></s>"


def test_trained_turns_are_all_or_the_last(tokenizer_for):
    tokenizer = tokenizer_for("llama3")
    record = SFTRecord([user("a"), assistant("one"), user("b"), assistant("two")])
    assert labels(tokenize(record, tokenizer, CONFIG), tokenizer) == "one</s>two</s>"
    assert labels(tokenize(record, tokenizer, DataConfig(train_on="last")), tokenizer) == "two</s>"


def test_a_template_that_rewrites_earlier_turns_is_a_reason_or_trains_the_last(tokenizer_for):
    tokenizer = tokenizer_for("qwen3")
    two_turns = SFTRecord([user("a"), assistant("one"), user("b"), assistant("two")])
    with pytest.raises(ValueError, match="chat template writes a turn differently"):
        tokenize(two_turns, tokenizer, CONFIG)
    last = tokenize(two_turns, tokenizer, DataConfig(train_on="last"))
    assert labels(last, tokenizer) == "<think>\n\n</think>\n\ntwo<|im_end|>"


def test_what_follows_the_eos_is_left_out(tokenizer_for):
    """PITFALL 17: a sequence ends with the EOS of its last response; chatml's newline after it is gone."""
    tokenizer = tokenizer_for("chatml")
    sequence = tokenize(SFTRecord([user("a"), assistant("b"), user("c"), assistant("d")]), tokenizer, CONFIG)
    assert labels(sequence, tokenizer) == "b<|im_end|>d<|im_end|>"
    assert sequence.input_ids[-1] == tokenizer.eos_token_id


def test_a_template_without_eos_is_refused_in_words(tokenizer_for):
    tokenizer = copy.deepcopy(tokenizer_for("llama3"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ValueError, match=r"^the chat template does not end a response with the EOS token$"):
        tokenize(SFTRecord([user("a"), assistant("b")]), tokenizer, CONFIG)


def test_a_response_that_contains_the_eos_is_refused(tokenizer_for):
    with pytest.raises(ValueError, match="contains the EOS token"):
        tokenize(SFTRecord([user("a"), assistant("b</s>")]), tokenizer_for("llama3"), CONFIG)


def test_pad_that_equals_eos_keeps_the_eos_label(new_tokenizer):
    """PITFALL 6: pad token = EOS."""
    tokenizer, notes = prepare_tokenizer(new_tokenizer(pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and any("no pad token" in note for note in notes)
    sequence = tokenize(SFTRecord([user("a"), assistant("b")]), tokenizer, CONFIG)
    assert sequence.input_ids[-1] == tokenizer.eos_token_id and sequence.loss_mask[-1]


@pytest.mark.parametrize("name", ["default", "llama3"])
def test_there_is_one_bos(name, new_tokenizer, template_text):
    """PITFALL 18: the template writes BOS, and the tokenizer would add another."""
    from tokenizers import processors

    tokenizer = new_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = template_text[name]
    tokenizer, _ = prepare_tokenizer(tokenizer)
    assert tokenizer("a")["input_ids"][0] == bos
    messages = [user("a"), assistant("b")]
    for record in (SFTRecord(messages), PromptRecord(messages[:1])):
        ids = tokenize(record, tokenizer, CONFIG).input_ids
        assert ids.count(bos) == 1 and ids[0] == bos


PAIR = PreferenceRecord([user("a"), assistant("old"), user("b")], [assistant("yes sir")], [assistant("no")], 2.0)


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs_share_the_prompt_and_label_their_responses_only(name, tokenizer_for):
    tokenizer = tokenizer_for(name)
    pair = tokenize(PAIR, tokenizer, CONFIG)
    prompts = [side.input_ids[: side.loss_mask.index(True)] for side in (pair.chosen, pair.rejected)]
    assert prompts[0] == prompts[1] and "old" in tokenizer.decode(prompts[0])
    assert labels(pair.chosen, tokenizer) == responses_text(name, ["yes sir"], tokenizer.eos_token)
    assert labels(pair.rejected, tokenizer) == responses_text(name, ["no"], tokenizer.eos_token)
    assert pair.margin == 2.0
    assert tokenize(PreferenceRecord(PAIR.prompt, PAIR.chosen, PAIR.rejected), tokenizer, CONFIG).margin == 0.0
    assert len(pair) == len(pair.chosen) > len(pair.rejected)


def encoded(tokenizer, words: list[str], span: tuple[int, int]) -> _Encoded:
    """A text of one token a word, EOS among them, with a response in those characters."""
    ids = [tokenizer.eos_token_id if word == "<eos>" else tokenizer.convert_tokens_to_ids("a") for word in words]
    ends = [sum(map(len, words[: i + 1])) for i in range(len(words))]
    return _Encoded(
        "".join(words), [[span]], ids, [(end - len(word), end) for word, end in zip(words, ends, strict=True)]
    )


def test_what_starts_where_a_response_ends_is_not_in_it(tokenizer_for):
    """A template may write EOS twice: the response has the first."""
    tokenizer = tokenizer_for("default")
    found = _mask_responses(encoded(tokenizer, ["user", "yes", "<eos>", "<eos>"], (4, 12)), tokenizer)
    assert found.loss_mask == [False, True, True]


def test_a_response_in_which_no_token_starts_is_refused(tokenizer_for):
    tokenizer = tokenizer_for("default")
    with pytest.raises(ValueError, match="does not end a response with the EOS token"):
        _mask_responses(encoded(tokenizer, ["user", "yes"], (5, 7)), tokenizer)


def test_a_token_starts_where_its_characters_do():
    """Behind a space that the offsets leave out; one without characters, where the one before it ends."""
    assert _token_starts([(0, 3), (4, 8), (9, 9), (12, 14)]).tolist() == [0, 4, 8, 12]


def test_a_pair_that_the_template_makes_equal_is_refused(tokenizer_for):
    with pytest.raises(ValueError, match=r"^`chosen` equals `rejected` once the chat template has written them$"):
        record = PreferenceRecord([user("a")], [assistant("b")], [assistant("b ")])
        tokenize(record, tokenizer_for("llama3"), CONFIG)


def test_a_long_row_is_dropped_or_loses_the_left_of_its_prompt(tokenizer_for):
    """PITFALL 17: cutting keeps BOS, the whole response and its EOS."""
    tokenizer = tokenizer_for("llama3")
    record = SFTRecord([user("x y z " * 50), assistant("the answer is Paris")])
    whole = tokenize(record, tokenizer, CONFIG)
    limit = len(whole) - 20
    with pytest.raises(TooLong):
        tokenize(record, tokenizer, DataConfig(max_length=limit))
    cut = tokenize(record, tokenizer, DataConfig(max_length=limit, too_long="truncate_prompt"))
    assert len(cut) == limit
    assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[21:]
    assert labels(cut, tokenizer) == labels(whole, tokenizer)


@pytest.mark.parametrize("too_long", ["drop", "truncate_prompt"])
def test_a_row_of_just_the_longest_length_stays_whole(too_long, tokenizer_for):
    """And one token more is too long, or loses one token."""
    tokenizer = tokenizer_for("llama3")
    row, prompt = SFTRecord([user("hello"), assistant("one")]), PromptRecord([user("hello you")])
    for record, limit in ((row, "max_length"), (prompt, "max_prompt_length")):
        whole = tokenize(record, tokenizer, CONFIG)
        assert tokenize(record, tokenizer, DataConfig(**{limit: len(whole)}, too_long=too_long)) == whole
        shorter = DataConfig(**{limit: len(whole) - 1}, too_long=too_long)
        if too_long == "drop":
            with pytest.raises(TooLong, match=f"longer than --{limit} {len(whole) - 1} tokens"):
                tokenize(record, tokenizer, shorter)
        else:
            cut = tokenize(record, tokenizer, shorter)
            assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[2:]


def test_without_a_bos_a_row_is_cut_from_its_first_token_on(tokenizer_for):
    """The tokenizer has a BOS, but this template doesn't write it."""
    tokenizer = tokenizer_for("chatml")
    row, prompt = SFTRecord([user("x y z " * 9), assistant("one")]), PromptRecord([user("x y z " * 9)], {"level": 1})
    for record in (row, prompt):
        whole = tokenize(record, tokenizer, CONFIG)
        limits = dict(max_length=len(whole) - 3, max_prompt_length=len(whole) - 3)
        cut = tokenize(record, tokenizer, DataConfig(**limits, too_long="truncate_prompt"))
        assert cut.input_ids == whole.input_ids[3:]
    assert cut.text == tokenizer.decode(cut.input_ids)
    assert cut.columns == {"level": 1}


def test_a_limit_that_bos_alone_fills_leaves_no_prompt(tokenizer_for):
    config = DataConfig(max_prompt_length=1, too_long="truncate_prompt")
    with pytest.raises(TooLong, match="--max_prompt_length 1 leaves no room"):
        tokenize(PromptRecord([user("hello")]), tokenizer_for("llama3"), config)
    # no BOS to keep: the last token is what there is room for
    assert len(tokenize(PromptRecord([user("hello")]), tokenizer_for("chatml"), config)) == 1


@pytest.mark.parametrize("name", ["llama3", "chatml"])
def test_a_row_whose_response_alone_is_too_long_is_dropped(name, tokenizer_for):
    """PITFALL 17: no row is left without labels or without the prompt token before the response."""
    tokenizer = tokenizer_for(name)
    record = SFTRecord([user("hello"), assistant("one two three")])
    response = sum(tokenize(record, tokenizer, CONFIG).loss_mask)
    fits = tokenize(record, tokenizer, DataConfig(max_length=response + 1, too_long="truncate_prompt"))
    assert fits.loss_mask == [False] + [True] * response
    assert (fits.input_ids[0] == tokenizer.bos_token_id) == (name == "llama3")
    with pytest.raises(TooLong, match="response alone"):
        tokenize(record, tokenizer, DataConfig(max_length=response, too_long="truncate_prompt"))


def test_both_sides_of_a_pair_keep_the_same_prompt_tokens(tokenizer_for):
    tokenizer = tokenizer_for("llama3")
    whole = tokenize(PAIR, tokenizer, CONFIG)
    config = DataConfig(max_length=len(whole) - 4, too_long="truncate_prompt")
    cut = tokenize(PAIR, tokenizer, config)
    prompts = [side.input_ids[: side.loss_mask.index(True)] for side in (cut.chosen, cut.rejected)]
    assert prompts[0] == prompts[1] and len(cut) == config.max_length
    assert labels(cut.rejected, tokenizer) == labels(whole.rejected, tokenizer)


@pytest.mark.parametrize("name", ["default", "chatml", "chatml_tagged"])
def test_a_prompt_ends_where_the_response_begins(name, tokenizer_for):
    """PITFALL 19: the prompt that is sampled from is a prefix of the row that SFT trains on."""
    tokenizer = tokenizer_for(name)
    prompt = tokenize(PromptRecord([user("a b")], {"level": 1}), tokenizer, CONFIG)
    row = tokenize(SFTRecord([user("a b"), assistant("yes")]), tokenizer, CONFIG)
    assert prompt.input_ids == row.input_ids[: row.loss_mask.index(True)]
    assert prompt.columns == {"level": 1}
    assert prompt.text == tokenizer.decode(prompt.input_ids)


def test_a_template_whose_prompt_is_split_differently_alone_is_noted(new_tokenizer, template_text):
    """PITFALL 16: GPT-2's splitting keeps llama3's two newlines together only at the end of a text."""
    tokenizer = new_tokenizer()
    tokenizer.chat_template = template_text["llama3"]
    tokenizer, notes = prepare_tokenizer(tokenizer)
    assert len(notes) == 1 and "sampling starts from other tokens" in notes[0]


def test_a_long_prompt_is_dropped_or_keeps_its_right_end(tokenizer_for):
    tokenizer = tokenizer_for("llama3")
    record = PromptRecord([user("x y z " * 20)])
    whole = tokenize(record, tokenizer, CONFIG).input_ids
    with pytest.raises(TooLong):
        tokenize(record, tokenizer, DataConfig(max_prompt_length=20))
    cut = tokenize(record, tokenizer, DataConfig(max_prompt_length=20, too_long="truncate_prompt"))
    assert cut.input_ids == whole[:1] + whole[-19:]
    assert cut.text == tokenizer.decode(cut.input_ids)


def test_a_tokenizer_without_a_template_gets_the_default_and_a_note(new_tokenizer):
    tokenizer, notes = prepare_tokenizer(new_tokenizer(bos_token=None))
    assert len(notes) == 1 and "no chat template" in notes[0]
    text = tokenizer.apply_chat_template([user("a"), assistant("b"), user("c")], tokenize=False)
    assert text == "User: a\nAssistant: b</s>\nUser: c\n"


def test_a_tokenizer_without_eos_is_an_error_naming_the_flag(new_tokenizer):
    with pytest.raises(UserError, match="--eos_token"):
        prepare_tokenizer(new_tokenizer(eos_token=None, pad_token=None))
    with pytest.raises(UserError, match="not in the tokenizer's vocabulary"):
        prepare_tokenizer(new_tokenizer(eos_token=None), eos_token="<nope>")
    tokenizer, _ = prepare_tokenizer(new_tokenizer(eos_token=None), eos_token="<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_slow_tokenizer_is_an_error():
    """PITFALL 22: a slow tokenizer is refused by name, not handed on."""

    class SlowTokenizer:
        is_fast = False

    with pytest.raises(UserError, match="SlowTokenizer is a slow tokenizer"):
        prepare_tokenizer(SlowTokenizer())


BROKEN = {
    "{% for m in messages %}": "fails at line 1",
    "{{ raise_exception('never') }}": "never",
    "{{ messages[0].content + 1 }}": "fails",
    "{% for m in messages %}{{ m.role }}{{ eos_token }}{% endfor %}": "loses the response",
    "{% for m in messages %}{{ m.content }}{% endfor %}": "EOS",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_broken_template_is_an_error_naming_the_file(template, new_tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    with pytest.raises(UserError, match=f"chat.jinja .*{BROKEN[template]}"):
        prepare_tokenizer(new_tokenizer(), str(path))


def test_a_missing_template_is_an_error(new_tokenizer):
    with pytest.raises(UserError, match=r"no\.jinja does not exist"):
        prepare_tokenizer(new_tokenizer(), "no.jinja")


def test_a_row_that_the_template_refuses_has_a_reason(new_tokenizer, template_text):
    tokenizer = new_tokenizer()
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + template_text["llama3"]
    tokenizer, _ = prepare_tokenizer(tokenizer)
    with pytest.raises(ValueError, match=r"refuses the row \(no system"):
        tokenize(SFTRecord([{"role": "system", "content": "s"}, user("a"), assistant("b")]), tokenizer, CONFIG)
