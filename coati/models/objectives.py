"""What a reward model's folder says of its objectives, and how they count in one score."""

from collections.abc import Mapping
from pathlib import Path

from coati.errors import UserError


def stored_objectives(source: str | Path) -> list[str]:
    """The names of a reward model's outputs, by its config.json; none for any other model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return []
    return list(getattr(config, "objectives", None) or [])


def objective_weights(source: str | Path, given: Mapping[str, float] | None) -> dict[str, float] | None:
    """The weight of each of a reward model's objectives in its score, 0 for those that are not named; None for a model
    of one score.

    Args:
        source: its folder; given: weights by objective, None for none.

    Raises:
        UserError: several objectives without weights, weights without objectives, or the weight of another one.
    """
    objectives = stored_objectives(source)
    named = ", ".join(objectives)
    if given is None:
        if len(objectives) > 1:
            raise UserError(
                f"the reward model in {source} has the objectives {named}, and one score is wanted: say how they count "
                f"(of a reward of type model objectives: {{{objectives[0]}: 1.0}}), or give a model of one score"
            )
        return None
    if not objectives:
        raise UserError(f"{source} is a model of one score: leave out objectives, which weigh several")
    if unknown := [name for name in given if name not in objectives]:
        raise UserError(
            f"the reward model in {source} has no objective {unknown[0]!r}, but {named}: correct objectives"
        )
    return {name: given.get(name, 0.0) for name in objectives}
