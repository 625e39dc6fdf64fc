"""A python function as a reward."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from coati.errors import UserError
from coati.rewards.base import Reward, columns_of

GIVEN = ("truncated", "input_ids", "response_mask")  # columns that every sample has
OF_RESPONSES = ("response", "responses", "completion", "completions", "output", "outputs")


class FunctionReward(Reward):
    """Wraps `function(prompts, responses, **columns)`, which returns one number per response, or None to skip it.
    It may name the columns that it takes instead: `function(prompts, responses, answer)`.

    Columns are lists with a value per response: the data's other fields, None where a row lacks one; `truncated`,
    whether the response was truncated at its maximum length; and the token ids of prompt and response, `input_ids`,
    with `response_mask`, True on those that were sampled.

    A function with the attribute `per_response = True` looks at each response alone, and is given one at a time.

    Args:
        location: where another process finds the function.

    Raises:
        UserError: the function takes no prompts and responses, in that order, or is a coroutine's.
    """

    def __init__(self, function: Callable, name: str | None = None, location: str | None = None):
        self.function, self.worker_spec = function, location
        self.name = name or getattr(function, "__name__", "function")
        self.per_response = getattr(function, "per_response", False)
        self.signature = signature_of(function)
        if not takes_prompts_and_responses(self.signature) or inspect.iscoroutinefunction(function):
            raise UserError(f"{self._described()}: give it these parameters, in this order, and no `async`")
        texts = self.signature.bind_partial([], []).arguments
        columns = [p for p in self.signature.parameters.values() if p.name not in texts]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in columns)
        self.takes = {p.name for p in columns if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.needs = {p.name for p in columns if p.name in self.takes and p.default is p.empty}

    def check(self, rows):
        columns = {*GIVEN}.union(*rows)
        if lacking := self.needs - columns:
            raise UserError(
                f"{self._described()}: it asks for {', '.join(sorted(lacking))}, but the columns are "
                f"{', '.join(sorted(columns))}"
            )

    def score(self, samples):
        """What the function returns."""
        columns = columns_of(samples)
        columns["input_ids"] = [sample.tokens for sample in samples]
        columns["response_mask"] = [sample.response_mask for sample in samples]
        for name in self.needs - columns.keys():  # other rows of the data have it, see `check`
            columns[name] = [None] * len(samples)
        if not self.takes_all:
            columns = {name: values for name, values in columns.items() if name in self.takes}
        return self.function([s.prompt for s in samples], [s.response for s in samples], **columns)

    def _described(self) -> str:
        return (
            f"reward function {self.name}{self.signature} is called as {self.name}(prompts, responses, **columns), "
            "with two lists of texts and the data's columns"
        )


def signature_of(function: Callable) -> inspect.Signature:
    """What a function takes; some builtins don't say, and are taken for reward functions."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return inspect.signature(lambda prompts, responses, **columns: None)


def takes_prompts_and_responses(signature: inspect.Signature) -> bool:
    """Whether a function takes both, in this order; TRL's may be `f(completions, **kwargs)`."""
    try:
        signature.bind_partial([], [])
    except TypeError:
        return False
    names = [*signature.parameters]
    return names[0] not in OF_RESPONSES and "prompts" not in names[1:]


def load_function(location: str) -> Reward:
    """The function that `location` names as a reward, see `import_function`; it may be a `Reward` already.

    Raises:
        UserError: no such file, module or function.
    """
    function = import_function(location, "reward function")
    if isinstance(function, Reward):
        return function
    return FunctionReward(function, location.rpartition(":")[2], location)


def import_function(location: str, kind: str):
    """The function, or `Reward`, at `path/to/file.py:name` or `package.module:name`.

    Args:
        kind: what errors call it.

    Raises:
        UserError: no such file, module or function.
    """
    source, _, name = location.rpartition(":")
    if not source or not name:
        raise UserError(f"{kind} {location!r}: write it as FILE.py:function or module:function")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's own code may fail in any way
        raise UserError(f"{kind} {location!r}: importing {source} failed: {error!r}") from error
    function = getattr(module, name, None)
    if not callable(function) and not isinstance(function, Reward):
        raise UserError(f"{kind} {location!r}: {source} has no {name!r}, or that can't be called")
    return function


def _import_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"coati_reward_{path.stem}_{abs(hash(str(path.resolve())))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module
