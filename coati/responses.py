"""Responses that models draw, and the scores that a reward model gives them: for `coati label`."""

from collections.abc import Callable, Sequence

import torch

from coati.config.generation import GenerationConfig
from coati.data import prepare_tokenizer
from coati.data.messages import Messages
from coati.data.templates import ChatTemplate, template_errors
from coati.errors import UserError
from coati.models.opened import OpenedModel, longest_sequence, open_model
from coati.rollout import PolicyGenerator, Request
from coati.rollout.prompts import eos_ids, response_texts
from coati.run_layout import model_folder


def open_policy(path: str) -> OpenedModel:
    """The model that a path names, on the GPU if there is one, its tokenizer ready for prompts.

    Args:
        path: a model's folder, an adapter's, a run's or a checkpoint's.

    Raises:
        UserError: it can't be opened.
    """
    opened = open_model(model_folder(path, "--model"), _dtype(), _device())
    prepare_tokenizer(opened.tokenizer, learns_responses=False)
    return opened


def draw(
    opened: OpenedModel, asked: Sequence[Messages], seeds: Sequence[Sequence[int]], sampling: GenerationConfig
) -> list[str]:
    """A response to each prompt.

    Args:
        opened: of `open_policy`.
        seeds: of each response: the same seed gives the same response beside any others.

    Raises:
        UserError: the chat template refuses a prompt, or a prompt leaves the model no room for a response.
    """
    tokenizer = opened.tokenizer
    requests = []
    for messages, seed in zip(asked, seeds, strict=True):
        ids = _encode(tokenizer, messages, add_generation_prompt=True)
        room = opened.max_length - len(ids)
        if room < 1:
            raise UserError(
                f"{opened.folder} reads {opened.max_length} tokens, and the prompt that begins with "
                f"{messages[0]['content'][:60]!r} has {len(ids)}; shorten or remove it"
            )
        requests.append(Request(ids, seed, min(sampling.max_new_tokens, room)))
    generator = PolicyGenerator.of_actor(opened.actor, tokenizer)
    completions = generator.generate(requests, sampling)
    ends = eos_ids(tokenizer, opened.actor)
    return [text.strip() for text in response_texts(tokenizer, [one.ids for one in completions], ends)]


def open_scorer(path: str, flag: str = "--reward_model") -> Callable[[Messages, Sequence[str]], list[float]]:
    """What scores responses to a prompt with the reward model that a path names, which reads them as its tokenizer's
    chat template writes them.

    Args:
        flag: that named the path, for messages.

    Raises:
        UserError: it can't be opened, or is no reward model; the scorer: the template refuses the prompt, or the model
            reads no text that is so long.
    """
    from transformers import AutoTokenizer

    from coati.models import RewardModel

    folder = model_folder(path, flag)
    tokenizer, _ = prepare_tokenizer(AutoTokenizer.from_pretrained(str(folder)), learns_responses=False)
    model = RewardModel(str(folder)).eval().to(_device())
    model.check_head(folder)
    longest = longest_sequence(model, tokenizer)

    @torch.no_grad()
    def score(messages: Messages, texts: Sequence[str]) -> list[float]:
        scores = []
        for text in texts:  # one by one, so that a score doesn't depend on the texts beside it
            ids = _encode(tokenizer, [*messages, {"role": "assistant", "content": text}])
            if len(ids) > longest:
                raise UserError(
                    f"{folder} reads {longest} tokens, and a response to the prompt that begins with "
                    f"{messages[0]['content'][:60]!r} has {len(ids)} with it; remove the row"
                )
            scores.append(model(torch.tensor([ids], device=_device())).item())
        return scores

    return score


def _encode(tokenizer, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
    """Token ids of the messages as the chat template writes them, of a response up to its EOS."""
    try:
        text = ChatTemplate(tokenizer).render(messages, add_generation_prompt)
    except template_errors() as error:
        start = messages[0]["content"][:60]
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} can't write the prompt that begins with {start!r}: {error}"
        ) from None
    if not add_generation_prompt and tokenizer.eos_token in text:
        text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype() -> torch.dtype | None:
    """float32 on a CPU, else that of the files."""
    return torch.float32 if _device().type == "cpu" else None
