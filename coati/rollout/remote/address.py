"""How trainers find generators: each writes its address into a folder that the launcher has made, once it is ready.

`coati run --generators` makes a folder for each launch and removes it at the end, so no address outlives its process
by long. On several nodes, the folder is on a shared disk (docs/asynchronous.md).
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from coati.errors import UserError
from coati.files import atomic_write
from coati.variables import GENERATORS, GENERATORS_FOLDER


@dataclass(frozen=True)
class Address:
    """Where a generator is asked, and the token that it wants."""

    url: str
    token: str


@dataclass(frozen=True)
class Generators:
    """The generators of a run.

    Attributes:
        folder: of their addresses; count: how many there are.
    """

    folder: Path
    count: int

    @classmethod
    def from_environment(cls) -> "Generators | None":
        """Those that the launcher has told of; None if there are none.

        Raises:
            UserError: the variables are set only in part, or to nonsense.
        """
        if GENERATORS not in os.environ:
            return None
        folder, count = os.environ.get(GENERATORS_FOLDER), os.environ[GENERATORS]
        if not folder or not count.isdecimal() or count == "0":
            raise UserError(
                f"{GENERATORS} is {count!r} and {GENERATORS_FOLDER} {folder!r}: they must be a number from 1 on, and a "
                "folder that all processes see"
            )
        return cls(Path(folder), int(count))

    def announce(self, number: int, address: Address):
        """Has others find a generator; the file is for this user's eyes only."""
        with atomic_write(self.path(number)) as partial:
            partial.touch(mode=0o600)
            partial.write_text(json.dumps(asdict(address)), encoding="utf-8")

    def find(self, number: int) -> Address | None:
        """A generator's address; None while it isn't ready."""
        try:
            return Address(**json.loads(self.path(number).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def path(self, number: int) -> Path:
        return self.folder / f"{number}.json"
