"""A python function as a reward."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from coati.errors import UserError


class FunctionReward:
    """Wraps `function(prompts, responses, **columns)`, which returns one number a response.

    A function with the attribute `per_response = True` looks at each answer alone, and is given one at a time.

    Args:
        place: where another process finds the function.
    """

    def __init__(self, function: Callable, name: str | None = None, place: str | None = None):
        self.function, self.name, self.place = function, name or function.__name__, place
        self.per_response = getattr(function, "per_response", False)

    def score(self, prompts, responses, **columns):
        return self.function(prompts, responses, **columns)


def load_function(place: str):
    """The function that `place` names as a reward, see `import_function`; an object with `name` and `score` is one
    already.

    Raises:
        UserError: no such file, module or function.
    """
    function = import_function(place, "reward function")
    if hasattr(function, "score") and hasattr(function, "name"):
        return function
    return FunctionReward(function, place.rpartition(":")[2], place)


def import_function(place: str, kind: str):
    """The function, or an object with `score`, at `path/to/file.py:name` or `package.module:name`.

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
    if not callable(function) and not hasattr(function, "score"):
        raise UserError(f"{kind} {place!r}: {source} has no {name!r}, or it isn't a function")
    return function


def _import_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"coati_reward_{path.stem}_{abs(hash(str(path.resolve())))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module
