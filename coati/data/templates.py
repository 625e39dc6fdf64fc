"""Chat templates: readying a tokenizer, rendering messages, and finding the responses in the rendered text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from coati.data.messages import Messages
from coati.errors import UserError

# The space belongs to the response: most tokenizers join it to the first word, so prompt and response never share
# a token.
DEFAULT_TEMPLATE = """\
{%- if bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant:' }}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
        {{- '' if loop.last else '\\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + message.content + '\\n' }}
    {%- else %}
        {{- message.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "No, blue."}]
# What rendering sets itself.
OWN_ARGUMENTS = (
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)

Spans = list[tuple[int, int]]


class TurnRewritten(ValueError):
    """A template does not write a longer dialogue as a continuation of a shorter one."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template with what it is given besides messages: tools and further arguments."""

    tokenizer: Any
    tools: list[dict] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The jinja text; some tokenizers have another one for tools."""
        return self.tokenizer.get_chat_template(tools=self.tools)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The messages as the template writes them. Raises whatever the template's expressions raise."""
        how = dict(tokenize=False, add_generation_prompt=add_generation_prompt)
        return self.tokenizer.apply_chat_template(_shown(messages), tools=self.tools, **how, **self.arguments)

    def render_tagged(self, messages: Messages) -> tuple[str, Spans]:
        """As `render`, and the `(start, end)` characters of each pair of `{% generation %}` tags."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[_shown(messages)],
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **{"tools": self.tools, **self.tokenizer.special_tokens_map, **self.arguments},
        )
        texts, spans = rendered
        return texts[0], spans[0]


def _shown(messages: Messages) -> Messages:
    """Without what is ours."""
    return [{name: value for name, value in message.items() if name != "weight"} for message in messages]


def prepare_tokenizer(
    tokenizer,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    *,
    arguments: dict[str, Any] | None = None,
    learns_responses: bool = True,
):
    """Ensure an EOS token, a pad token and a chat template that ends responses with EOS.

    The tokenizer is changed in place; `eos_token` must already be in its vocabulary. Its padding side and the
    special tokens that it adds are left alone: `coati.data` renders, tokenizes and pads without them. `arguments` are
    for the template, as in `DataConfig.chat_template_kwargs`. Without `learns_responses` the template need only write
    prompts.

    Returns `(tokenizer, notes)`, where `notes` is one line for each thing that was supplied.
    Raises `UserError` for a slow tokenizer, a missing EOS token or a template that does not work.
    """
    notes: list[str] = []
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer without the character offsets that response masks "
            "need; use a tokenizer with a tokenizer.json (a fast one)."
        )
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {eos_token} is not in the tokenizer's vocabulary; name a token that is.")
        # Adding it as a special token keeps text from being merged with it.
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no EOS token to end responses with; name one of its tokens with --eos_token."
        )
    _leave_out_ignored_clean_up(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"The tokenizer has no pad token: {tokenizer.eos_token} is used (masks come from lengths).")
    if chat_template_path is not None:
        path = Path(chat_template_path).expanduser()
        if not path.is_file():
            raise UserError(f"The chat template {chat_template_path} does not exist; correct --chat_template.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
        notes.append("The tokenizer has no chat template: the plain 'User: ... Assistant: ...' one is used.")
    template, name = ChatTemplate(tokenizer, arguments=arguments or {}), chat_template_path or "of the tokenizer"
    _check_arguments(template, name)
    prompt = _attempt(name, lambda: template.render(PROBE[:1], add_generation_prompt=True))
    if learns_responses:
        _check_response(template, name)
        notes += _compare_with_prompt(template, name, prompt)
    return tokenizer, notes


def _leave_out_ignored_clean_up(tokenizer) -> None:
    """Many files of BPE tokenizers ask for a clean-up of spaces, which transformers ignores with a warning at the first
    text that it decodes, unless a second setting insists on it."""
    insists = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not insists:
        tokenizer.clean_up_tokenization_spaces = False


def _check_arguments(template: ChatTemplate, name: str) -> None:
    """What a template does not name would be without effect."""
    sources = template.tokenizer.chat_template
    texts = list(sources.values()) if isinstance(sources, dict) else [sources]
    for argument in template.arguments:
        if argument in OWN_ARGUMENTS:
            raise UserError(f"--chat_template_kwargs sets {argument}, which every run sets itself; leave it out.")
        if not any(re.search(rf"\b{re.escape(argument)}\b", text) for text in texts):
            raise UserError(
                f"--chat_template_kwargs sets {argument}, but the chat template {name} has no such word; correct it."
            )


def _check_response(template: ChatTemplate, name: str) -> None:
    text, [spans] = _attempt(name, lambda: response_spans(template, PROBE, [1]))
    if PROBE[1]["content"] not in "".join(text[start:end] for start, end in spans):
        raise UserError(f"The chat template {name} loses the response; correct it or give --chat_template.")
    eos = template.tokenizer.eos_token
    if eos not in text[spans[0][0] : spans[-1][1]] and not text.startswith(eos, spans[-1][1]):
        raise UserError(
            f"The chat template {name} does not end a response with the EOS token {eos}, so a model could "
            "not learn to stop; name the token that ends a response with --eos_token, or give --chat_template."
        )


def _attempt(name: str, render: Callable[[], Any]) -> Any:
    """What it renders; whatever it raises is a fault of the template."""
    try:
        return render()
    except template_errors() as error:
        line = getattr(error, "lineno", None)
        at = f" at line {line}" if line else ""
        raise UserError(f"The chat template {name} fails{at} ({error}); correct it or give --chat_template.") from None


def template_errors() -> tuple[type[Exception], ...]:
    """A template can run any expression, so it can raise what expressions raise."""
    import jinja2

    return jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError


def _compare_with_prompt(template: ChatTemplate, name: str, prompt: str) -> list[str]:
    """A note if a prompt that is sampled from is not what training sees before a response."""
    text = template.render(PROBE)
    if not text.startswith(prompt):
        opened = prompt[len(common_prefix([prompt, text])) :]
        return [
            f"The chat template {name} ends a prompt with {opened!r}, which it does not write in front of a response "
            "that it is given: sampling starts from other text than training sees."
        ]
    prompt_ids, dialogue_ids = template.tokenizer([prompt, text], add_special_tokens=False)["input_ids"]
    if dialogue_ids[: len(prompt_ids)] != prompt_ids:
        return [
            f"The chat template {name} ends a prompt in text that this tokenizer splits differently when an "
            "response follows: sampling starts from other tokens than training sees."
        ]
    return []


def response_spans(template: ChatTemplate, messages: Messages, responses: Sequence[int]) -> tuple[str, list[Spans]]:
    """The rendered text, and of each of these of the assistant's messages the `(start, end)` characters that the
    template wrote for it.

    They come from the template's `{% generation %}` tags, of which a message may have several, else from rendering the
    dialogue up to each message and through it, never from searching for text.

    Raises `TurnRewritten` where that is not possible, and `ValueError` when tags or prompts do not fit the messages.
    """
    if GENERATION_TAG.search(template.source):
        text, tagged = template.render_tagged(messages)
        spans = []
        for i in responses:
            first, end = _tags_of(template, messages, i, len(tagged))
            spans.append(tagged[first:end])
        return text, spans
    text = template.render(messages)
    return text, [[_span(template, messages, i, text)] for i in responses]


def _tags_of(template: ChatTemplate, messages: Messages, i: int, total: int) -> tuple[int, int]:
    """The first of the pairs of tags that surround message `i`, and the one after its last."""
    before = _count_tags(template, messages[:i])
    after = total if i == len(messages) - 1 else _count_tags(template, messages[: i + 1])
    if not before < after <= total:
        raise ValueError("the chat template's {% generation %} tags do not surround a response")
    return before, after


def _count_tags(template: ChatTemplate, messages: Messages) -> int:
    said = any(message["role"] == "assistant" for message in messages)
    return len(template.render_tagged(messages)[1]) if said else 0


def _span(template: ChatTemplate, messages: Messages, i: int, text: str) -> tuple[int, int]:
    is_last = i == len(messages) - 1
    prompt = template.render(messages[:i], add_generation_prompt=True)
    through = text if is_last else template.render(messages[: i + 1])
    if not text.startswith(through):
        raise TurnRewritten("the chat template writes a turn differently once more turns follow")
    if through.startswith(prompt):
        return len(prompt), len(through)
    start = len(_header(template, messages[:i], prompt, through))
    return start, len(through)


def _header(template: ChatTemplate, before: Messages, prompt: str, through: str) -> str:
    """What a prompt and the dialogue with its response both begin with, where the prompt goes on with something else.

    So it is with templates that open a thought in the prompt, `<|assistant|><think>`, and write responses without it.
    The response itself may begin like that, so another one says where it begins.
    """
    other = template.render([*before, {"role": "assistant", "content": "\ue000"}])
    shared = common_prefix([prompt, through, other])
    if not shared.startswith(template.render(before)):
        raise ValueError(
            "the chat template does not write a response after its own prompt (mark responses in it with "
            "{% generation %})"
        )
    return shared


def common_prefix(texts: Sequence[str]) -> str:
    """What all begin with, up to a tag that differs: `<think>` and `</think>` have no common token."""
    equal = takewhile(lambda characters: len({*characters}) == 1, zip(*texts, strict=False))
    return re.sub(r"<[^<>]*$", "", "".join(first for first, *_ in equal))
