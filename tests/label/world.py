"""What the tests of `coati label` share."""

from pathlib import Path

from coati.label.items import Item, Response
from coati.label.store import Click, Person, Store


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def items(count: int, responses: int = 2) -> list[Item]:
    """Items whose texts tell which response is which; the n-th is from the model `n`."""
    found = []
    for i in range(count):
        texts = tuple(Response(f"response {n} to {i}", f"model {n}") for n in range(responses))
        messages = [{"role": "user", "content": f"prompt {i}"}]
        found.append(Item(f"item {i}", f"prompt {i}", messages, texts))
    return found


def store_with(folder: Path, count: int, names: tuple[str, ...], overlap: int = 1, **how) -> tuple[Store, list[Person]]:
    """A file with that many items of two responses, and people."""
    store = Store.prepare(folder / "labels.sqlite", seed=3, **how)
    store.add_items(items(count))
    store.add_people(names)
    store.set_overlap(overlap)
    return store, [person for person in store.people() if not person.is_owner]


def click(name: str, shown: int, choice: str, **more) -> Click:
    return Click(f"click-{name}", shown, choice, **more)
