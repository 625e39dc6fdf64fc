"""How each benchmark is asked by default, and what a run changes of that."""

from __future__ import annotations

from dataclasses import dataclass, field

from coati.errors import UserError

METHODS = ("first_token", "generate", "choice_perplexity")


@dataclass(frozen=True)
class Setting:
    """How a benchmark is asked by default, after the Colossal-LLaMA-2 card (see `results/published_figures.py`).

    Attributes:
        shots: few-shot examples.
        methods: of questions with one right letter; other kinds are answered by generation.
        main_metric: the metric of the report's table.
        max_new_tokens: longest generated response.
    """

    shots: int = 5
    methods: tuple[str, ...] = ("first_token",)
    main_metric: str = "first_token"
    max_new_tokens: int = 32


SETTINGS = {
    "mmlu": Setting(),
    "cmmlu": Setting(),
    "ceval": Setting(),
    "agieval": Setting(methods=("first_token", "generate"), main_metric="combined"),
    "gaokao_bench": Setting(shots=0, methods=("first_token", "generate")),
    "gsm8k": Setting(main_metric="exact_match", max_new_tokens=256),
    "texts": Setting(shots=0, methods=(), main_metric="nats_per_byte"),
}


@dataclass
class TaskOptions:
    """What a run changes: None or empty keeps the benchmark's setting."""

    shots: int | None = None
    methods: list[str] = field(default_factory=list)
    max_new_tokens: int | None = None

    def check(self) -> None:
        """Raises a UserError for an unknown method."""
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise UserError(f"--methods {unknown[0]!r} is none of {', '.join(METHODS)}")
