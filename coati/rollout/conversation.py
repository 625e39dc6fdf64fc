"""Token ids of a conversation of which some messages were sampled.

What was sampled is never decoded and rendered again: other tokens may spell the same text, and a chat template may
write a message differently once others follow it. Only the messages that follow a response are rendered, and their
tokens are put after the ids that there are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from coati.data.messages import Messages
from coati.data.templates import ChatTemplate, template_errors
from coati.errors import UserError

MARK = "[[response]]"  # stands for a response where its text must not matter
PROBES: list[Messages] = [
    [{"role": "user", "content": "Is it red?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it red?"}],
]
RESPONSES = ("No, blue.", "<think>\nThe sky is.\n</think>\n\nNo, blue.")
PROBED: Messages = [{"role": "user", "content": "Say more."}]


class ConversationRenderer:
    """Renders the beginning of a conversation, and what stands between a sampled response and the next one.

    Args:
        tokenizer: with a chat template, see `coati.data.prepare_tokenizer`.
        ends: ids of the tokens that end a response.
        arguments: for the template.
        tools: descriptions of tools for the template.
    """

    def __init__(
        self,
        tokenizer,
        ends: Iterable[int],
        arguments: dict[str, Any] | None = None,
        tools: list[dict] | None = None,
    ):
        self.tokenizer, self.ends = tokenizer, set(ends)
        self.end_texts = tokenizer.convert_ids_to_tokens(sorted(self.ends))
        self.special_texts = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.template = ChatTemplate(tokenizer, tools, arguments or {})

    def start(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to where the first response begins.

        Raises:
            UserError: the template refuses the messages.
        """
        return self._ids(self._render(messages))

    def between(self, before: Messages, response: dict[str, Any], after: Messages, is_ended: bool) -> list[int]:
        """Ids that follow a sampled response, up to where the next one begins.

        Args:
            before: the messages before the response; the template may look at them, their text is not used.
            response: the message that was sampled. Its calls of tools count only by their names and ids, its text not.
            after: the messages that follow it.
            is_ended: whether the sampled ids have the token that ends a response as their last one; else the template's
                is put in front.

        Raises:
            UserError: the template refuses the messages, or loses the response or its end.
        """
        mark = MARK
        while any(mark in str(message) for message in [*before, *after]):
            mark += MARK
        stand_in = {**response, "content": mark}
        stand_in.pop("reasoning_content", None)
        if "tool_calls" in response:
            stand_in["tool_calls"] = [_with_mark(call, mark) for call in response["tool_calls"]]
        text = self._render([*before, stand_in, *after])
        _, found, rest = text.rpartition(mark)
        # some templates (gpt-oss) end earlier responses with another special token than the last one
        place = first_place(rest, self.end_texts)
        if place is None:
            place = first_place(rest, self.special_texts)
        if not found or place is None:
            what = "no token that ends a response" if found else "nothing of a response"
            raise UserError(f"the chat template writes {what} where messages follow it: give --chat_template another")
        ids = self._ids(rest[place:])
        return ids[1:] if is_ended else ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, messages: Messages) -> str:
        try:
            return self.template.render(messages, add_generation_prompt=True)
        except template_errors() as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template refuses a conversation of {roles}: {error}") from None


def check_conversations(renderer: ConversationRenderer) -> list[str]:
    """Tries short conversations before anything is sampled; returns what a user should know of the template.

    A template that writes a conversation by adding to it gives the same ids in one piece as message by message. Others
    rewrite earlier turns, for instance leave out what was thought in them: there a conversation goes on as it was
    sampled.

    Raises:
        UserError: the template can't write a message after a response, or a tool's result after its call.
    """
    if renderer.template.tools:
        call = {"id": "call00000", "type": "function", "function": {"name": "find", "arguments": {}}}
        called = {"role": "assistant", "content": MARK, "tool_calls": [call]}
        result = {"role": "tool", "name": "find", "tool_call_id": call["id"], "content": "tea"}
        renderer.between(PROBES[0], called, [result], is_ended=True)
    adds_only = [adds_to(renderer, before, text) for before in PROBES for text in RESPONSES]
    if all(adds_only):
        return []
    return ["the chat template rewrites earlier turns once more follow; what was sampled stays as it is"]


def adds_to(renderer: ConversationRenderer, before: Messages, text: str) -> bool:
    """Whether a conversation in one piece is its beginning, the response, and what stands between."""
    response = {"role": "assistant", "content": text}
    begun = renderer.start(before)
    between = renderer.between(before, response, PROBED, is_ended=True)
    in_one_piece = renderer.start([*before, response, *PROBED])
    said = in_one_piece[len(begun) : -len(between)]
    is_between = in_one_piece == [*begun, *said, *between] and said[-1] in renderer.ends
    return is_between and renderer.tokenizer.decode(said[:-1]).strip() == text


def first_place(text: str, of: Sequence[str]) -> int | None:
    """Where the first of some texts begins in another; None if none is there."""
    return min((text.index(one) for one in of if one in text), default=None)


def _with_mark(call: dict[str, Any], mark: str) -> dict[str, Any]:
    """A call with other arguments: some templates write calls and not the content beside them."""
    return {**call, "function": {**call["function"], "arguments": {"mark": mark}}}
