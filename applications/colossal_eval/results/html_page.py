"""The report as one HTML page with charts."""

from __future__ import annotations

from html import escape

from coati.tracking.style import STYLE
from colossal_eval.results.charts import bars, radar
from colossal_eval.results.tables import Section


def page(parts: list[Section], rows: list[dict], models: list[str]) -> str:
    """One HTML page in the style of coati's run reports, charts inside, nothing loaded from elsewhere.

    Raises:
        ImportError: matplotlib is missing.
    """
    body = []
    for i, part in enumerate(parts):
        body.append(f"<section><h2>{escape(part.title)}</h2><p>{escape(part.note)}</p>")
        if part.rows:
            body.append(_table(part))
        body.append("".join(f"<p>{escape(line)}</p>" for line in part.lines) + "</section>")
        if i == 0 and rows:
            figures = "".join(f"<figure>{chart}</figure>" for chart in (bars(rows, models), radar(rows, models)))
            body.append(f'<section><h2>Charts</h2><div class="grid">{figures}</div></section>')
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>Evaluation</h1>{''.join(body)}</body></html>\n"


def _table(part: Section) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in part.header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in part.rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="overview"><tr>{head}</tr>{body}</table>'
