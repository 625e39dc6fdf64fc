"""A python function as a reward."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from coati.errors import UserError
from coati.rewards.base import Reward, columns_of


class FunctionReward(Reward):
    """Wraps `function(prompts, responses, **columns)`, which returns one number per response, or None for one that it
    has no opinion on. It may name the columns that it takes instead: `function(prompts, responses, answer)`.

    Columns are lists, one entry per response: the data's other fields, `truncated`, and the token ids of prompt and
    response, `input_ids`, with `response_mask`, True on those that were sampled.

    A function with the attribute `per_response = True` looks at each answer alone, and is given one at a time.

    Args:
        place: where another process finds the function.

    Raises:
        UserError: the function takes no prompts and responses, in that order.
    """

    def __init__(self, function: Callable, name: str | None = None, place: str | None = None):
        self.function, self.name, self.worker_spec = function, name or function.__name__, place
        self.per_response = getattr(function, "per_response", False)
        try:
            self.signature = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins have none
            self.signature = inspect.signature(lambda prompts, responses, **columns: None)
        if not takes_prompts_and_responses(self.signature):
            raise UserError(
                f"reward function {self.name}{self.signature} is called as {self.name}(prompts, responses, **columns), "
                "with two lists of texts and the data's columns: give it these parameters, in this order"
            )

    def score(self, samples):
        """What the function returns.

        Raises:
            UserError: it asks for a column that isn't there.
        """
        prompts, responses = [sample.prompt for sample in samples], [sample.response for sample in samples]
        columns = columns_of(samples)
        columns["input_ids"] = [sample.tokens for sample in samples]
        columns["response_mask"] = [sample.response_mask for sample in samples]
        parameters = self.signature.parameters.values()
        given = columns
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            given = {name: values for name, values in columns.items() if name in self.signature.parameters}
        try:
            self.signature.bind(prompts, responses, **given)
        except TypeError as error:
            raise UserError(
                f"reward function {self.name}{self.signature} can't be called with the columns "
                f"{', '.join(columns) or '(none)'}: {error}"
            ) from error
        return self.function(prompts, responses, **given)


def takes_prompts_and_responses(signature: inspect.Signature) -> bool:
    """Whether a function takes both, in this order; TRL's may be `f(completions, **kwargs)`."""
    try:
        signature.bind_partial([], [])
    except TypeError:
        return False
    first, second = [*signature.parameters, "", ""][:2]
    return first not in ("responses", "completions") and second != "prompts"


def load_function(place: str) -> Reward:
    """The function that `place` names as a reward, see `import_function`; it may be a `Reward` already.

    Raises:
        UserError: no such file, module or function.
    """
    function = import_function(place, "reward function")
    if isinstance(function, Reward):
        return function
    return FunctionReward(function, place.rpartition(":")[2], place)


def import_function(place: str, kind: str):
    """The function, or `Reward`, at `path/to/file.py:name` or `package.module:name`.

    Args:
        kind: what errors call it.

    Raises:
        UserError: no such file, module or function.
    """
    source, _, name = place.rpartition(":")
    if not source or not name:
        raise UserError(f"{kind} {place!r}: write it as FILE.py:function or module:function")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's own code may fail in any way
        raise UserError(f"{kind} {place!r}: importing {source} failed: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function) and not isinstance(function, Reward):
        raise UserError(
            f"{kind} {place!r}: {source} has no {name!r}, or it is neither a function nor a coati.rewards.Reward"
        )
    return function


def _import_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"coati_reward_{path.stem}_{abs(hash(str(path.resolve())))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module
