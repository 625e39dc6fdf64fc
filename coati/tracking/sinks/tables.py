"""Sample rows as tables and as text."""

from __future__ import annotations

from typing import Any


def table_of(rows: list[dict[str, Any]]) -> dict[str, list]:
    """`{"columns": [...], "data": [[...], ...]}` of rows, whose columns may differ: None where a row has none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}


def text_of(row: dict[str, Any]) -> str:
    """A line `column: value` for each column."""
    return "\n".join(f"{key}: {value}" for key, value in row.items())
