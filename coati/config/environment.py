"""What a policy talks to over several turns."""

from typing import Literal

from coati.config.options import Settings, option, settings


@settings
class EnvironmentConfig(Settings):
    """What a policy talks to over several turns; none for one response per prompt."""

    path: str | None = option(
        None, "FILE.py:Class or module:Class of an environment, see docs/environments.md", path="function", common=True
    )
    max_turns: int = option(8, "responses per episode", ge=1)
    max_tokens: int = option(1024, "longest episode, in tokens, those of the environment included", ge=2)
    timeout: float = option(60.0, "seconds that a call of the environment may take", gt=0)
    answer_steps: int = option(
        8, "tokens that other episodes may sample, each, before generation waits for an environment's answer", ge=1
    )
    call_format: Literal["auto", "hermes", "llama3", "mistral", "pythonic", "harmony"] = option(
        "auto", "how the policy calls tools; auto: as its chat template writes calls"
    )
    max_result_characters: int = option(4000, "longest result of a tool; what is more is cut", ge=1)
    turn_rewards: bool = option(False, "a turn's reward falls on its own last token, not on the episode's")
