"""What becomes of settings that have changed since the checkpoint that a run goes on from."""

from typing import Any

from coati.config.schema import by_path
from coati.errors import UserError

# What a run writes, where and how often: it trains the same
UNSAID = ("output_dir", "log_every", "data.cache_dir", "checkpoints.", "evaluation.", "tracking.", "export.")
UNSAID += ("generators.weights_folder", "generators.weights_format", "generators.keep_journal")
# Built into the checkpoint's weights
FIXED = tuple(f"model.lora_{name}" for name in ("rank", "alpha", "dropout", "target_modules", "variant"))
FIXED += ("algorithm.shared_trunk", "algorithm.objectives", "freeze")
ORDER = "rows come in another order from here on: of this epoch some may be seen again, others not at all"
OTHER_ROWS = (
    "resumed: the training data is not the checkpoint's (other rows, or files that moved): it goes on at the same "
    "place of its order, where rows may stand that were seen before"
)
RATE = "the learning rate follows the new schedule from here on"
WEIGHTS = "weights are the checkpoint's; a reference is the new one's"
MEANING = {
    "batch_size": "the data goes on at the row where it stopped",
    "seed": ORDER,
    "data.train_weights": ORDER,
    "buckets": ORDER,
    "mix": ORDER,
    "steps": RATE,
    "epochs": RATE,
    "tokens": RATE,
    "optimizer.learning_rate": RATE,
    "algorithm.critic_learning_rate": RATE,
    "optimizer.schedule": RATE,
    "optimizer.warmup": RATE,
    "optimizer.final_rate": RATE,
    "model.path": WEIGHTS,
    "model.model_config": WEIGHTS,
    "algorithm.critic_model": "weights are the checkpoint's",
    "algorithm.kl_coefficient": "from here on; with kl_target the adapted one of the checkpoint goes on",
    "algorithm.refresh_reference": "the reference is the last one that was kept, else that of the first step",
    "parallel.plugin": "weights and optimizer states are carried over, results differ by rounding",
}


def said(config) -> dict[str, Any]:
    """The settings by path, without those of `UNSAID`."""
    return {path: value for path, value in by_path(config).items() if not path.startswith(UNSAID)}


def changed_settings(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What both have and differ in: name -> (in the checkpoint, now)."""
    return {name: (stored[name], now[name]) for name in now if name in stored and stored[name] != now[name]}


def refuse_other_models(changed: dict[str, tuple[Any, Any]], folder):
    """Raises a UserError for settings that would make other weights than the checkpoint in `folder` has."""
    fixed = [_difference(name, *changed[name]) for name in FIXED if name in changed]
    if fixed:
        raise UserError(
            f"{folder} has weights of another make: {'; '.join(fixed)}. Give the values of the checkpoint, or start "
            "a new run from the model in it (--resume never, --model)"
        )


def lines_of(changed: dict[str, tuple[Any, Any]]) -> list[str]:
    """A line for each setting: what it was, what it is, what that means."""
    return [f"resumed: {_difference(n, *values)}: {MEANING.get(n, 'from here on')}" for n, values in changed.items()]


def _difference(name: str, before, now) -> str:
    return f"{name} {_words(before)} in the checkpoint, {_words(now)} now"


def _words(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
