"""Sample rows as tables and as text."""

from __future__ import annotations

from typing import Any


def table_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """`{"columns": [...], "data": [[...], ...]}` of rows, whose columns may differ: None where a row has none."""
    columns = list(dict.fromkeys(key for row in rows for key in cells_of(row)))
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}


def text_of(row: dict[str, Any]) -> str:
    """A line `column: value` for each column."""
    return "\n".join(f"{key}: {value}" for key, value in cells_of(row).items())


def cells_of(row: dict[str, Any]) -> dict[str, Any]:
    """What fits into a cell: an episode's messages don't, whose texts are in its response."""
    return {key: value for key, value in row.items() if not isinstance(value, list)}
