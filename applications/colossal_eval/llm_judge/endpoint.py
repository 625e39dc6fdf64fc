"""An OpenAI-compatible endpoint that is asked for judgments."""

from __future__ import annotations

import os
import threading

from coati.errors import UserError
from colossal_eval.llm_judge.cases import Case
from colossal_eval.llm_judge.verdicts import read_verdict

PAUSE = 1.0  # seconds, doubled with every attempt


class Judge:
    """Asks the endpoint. Errors that pass (too many requests, a timeout, a response that is no JSON or has no verdict)
    are asked again, `attempts` times in all.

    Args:
        config: a `JudgeConfig` of judge.py.

    Attributes:
        stopped: set it to end the pauses of all threads.
    """

    def __init__(self, config):
        from openai import OpenAI

        self.config = config
        key = os.environ.get(config.api_key_variable, "none")  # local servers ask for none, but the client does
        self.client = OpenAI(base_url=config.endpoint, api_key=key, timeout=config.timeout, max_retries=0)
        self.stopped = threading.Event()

    def __call__(self, case: Case) -> tuple[dict | None, list[str]]:
        """The judgment `{"text", "verdict"}`, None if there is none, and what went wrong on the way.

        Raises:
            UserError: the endpoint refuses the key or doesn't know the judge.
        """
        import openai

        errors: list[str] = []
        for attempt in range(self.config.attempts):
            if attempt and self.stopped.wait(min(2.0**attempt, 30.0) * PAUSE):
                break
            try:
                text = self._ask(case)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise UserError(f"the endpoint refuses --judge {self.config.judge}: {error}") from error
            except (openai.OpenAIError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}"[:300])
                continue
            verdict = read_verdict(case.kind, text)
            if verdict is not None:
                return {"text": text, "verdict": verdict}, errors
            errors.append(f"no verdict in {text[-200:]!r}")
        return None, errors

    def _ask(self, case: Case) -> str:
        config = self.config
        reply = self.client.chat.completions.create(
            model=config.judge, messages=case.messages, temperature=config.temperature, max_tokens=config.max_tokens
        )
        choices = getattr(reply, "choices", None)
        if not choices or not choices[0].message.content:
            raise ValueError(f"the endpoint gave no text: {reply!r}"[:300])
        return choices[0].message.content
