"""Chat templates: readying a tokenizer, rendering messages, and finding the answers in the rendered text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from coati.data.records import Messages
from coati.errors import UserError

# The space belongs to the answer: most tokenizers join it to the first word, so prompt and answer never share
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


def prepare_tokenizer(tokenizer, chat_template_path: str | None = None, eos_token: str | None = None):
    """Make sure of an EOS token, a pad token and a chat template that ends answers with EOS.

    The tokenizer is changed in place; `eos_token` must already be in its vocabulary. Its padding side and the
    special tokens that it adds are left alone: `coati.data` renders, tokenises and pads without them.

    Returns `(tokenizer, notes)`, where `notes` is one line for each thing that was supplied.
    Raises `UserError` for a slow tokenizer, a missing EOS token or a template that does not work.
    """
    notes: list[str] = []
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer without the character offsets that answer masks "
            "need; use a tokenizer with a tokenizer.json (a fast one)."
        )
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {eos_token} is not in the tokenizer's vocabulary; name a token that is.")
        # Adding it as a special token keeps text from being merged with it.
        tokenizer.add_special_tokens({"eos_token": eos_token})
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no EOS token to end answers with; name one of its tokens with --eos_token.")
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
    name = chat_template_path or "of the tokenizer"
    _check_template(tokenizer, name)
    alone = render(tokenizer, PROBE[:1], add_generation_prompt=True)
    prompt, whole = tokenizer([alone, render(tokenizer, PROBE)], add_special_tokens=False)["input_ids"]
    if whole[: len(prompt)] != prompt:
        notes.append(
            f"The chat template {name} ends a prompt in text that this tokenizer splits differently when an "
            "answer follows: sampling starts from other tokens than training sees."
        )
    return tokenizer, notes


def _check_template(tokenizer, name: str) -> None:
    import jinja2

    try:
        text, [(start, end)] = answer_spans(tokenizer, PROBE)
        render(tokenizer, PROBE[:1], add_generation_prompt=True)
    # A template can run any expression, so it can raise what expressions raise.
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        line = getattr(error, "lineno", None)
        at = f" at line {line}" if line else ""
        raise UserError(f"The chat template {name} fails{at} ({error}); correct it or give --chat_template.") from None
    if PROBE[1]["content"] not in text[start:end]:
        raise UserError(f"The chat template {name} loses the answer; correct it or give --chat_template.")
    eos = tokenizer.eos_token
    if eos not in text[start:end] and not text.startswith(eos, end):
        raise UserError(
            f"The chat template {name} does not end an answer with the EOS token {eos}, so a model could "
            "not learn to stop; name the token that ends an answer with --eos_token, or give --chat_template."
        )


def render(tokenizer, messages: Messages, add_generation_prompt: bool = False) -> str:
    """The messages as the tokenizer's chat template writes them."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def answer_spans(tokenizer, messages: Messages, first: int = 0) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and the `(start, end)` characters of each answer from `messages[first]` on.

    Spans come from the template's `{% generation %}` tags, else from rendering the dialogue up to each answer
    and through it, never from searching for text.

    Raises `ValueError` when the template does not write a longer dialogue as a continuation of a shorter one.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if GENERATION_TAG.search(tokenizer.get_chat_template()):
        text, spans = _tagged_spans(tokenizer, messages)
        if len(spans) != len(answers):
            raise ValueError("the chat template's {% generation %} tags do not surround each answer once")
        return text, [span for i, span in zip(answers, spans, strict=True) if i >= first]
    text, spans = render(tokenizer, messages), []
    for i in answers:
        if i < first:
            continue
        before = render(tokenizer, messages[:i], add_generation_prompt=True)
        through = text if i == len(messages) - 1 else render(tokenizer, messages[: i + 1])
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                "the chat template writes a turn differently once more turns follow (mark answers in it with "
                "{% generation %}, or use --train_on last)"
            )
        spans.append((len(before), len(through)))
    return text, spans


def _tagged_spans(tokenizer, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    texts, spans = rendered
    return texts[0], spans[0]
