"""The report's tables, as markdown and as one HTML page with charts."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

KINDS = {"single_choice": "", "multi_choice": " (several answers)", "cloze": " (cloze)", "math": ""}


@dataclass
class Section:
    """A table under a title, with a sentence before it and lines after it."""

    title: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    lines: list[str] = field(default_factory=list)


def percent(score: dict) -> str:
    """A score as "25.31 ± 0.38", in percent."""
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.2f}"
    return f"{100 * score['value']:.2f}{error}"


def title(row: dict) -> str:
    """A row's name: the benchmark, and the kind of its questions where it isn't the usual one."""
    return row["benchmark"] + KINDS[row["kind"]]


def sections(rows: list[dict], models: list[str], published: list[dict] | None) -> list[Section]:
    """The report's parts, from `report.report_rows` and `published.compare_published`."""

    def cells(row: dict, *path: str) -> list[str]:
        found = [row["models"][model] for model in models]
        for key in path:
            found = [value[key] for value in found]
        return [percent(value) for value in found]

    main = [[title(r), r["metric"], f"{r['n']:,}", f"{100 * r['random']:.2f}", *cells(r, "mean")] for r in rows]
    note = "In percent ± standard error; `random` is what blind guessing earns on average."
    parts = [
        Section("Scores", ["benchmark", "metric", "n", "random", *models], main, note),
        Section("Mean of subjects", ["benchmark", *models], [[title(r), *cells(r, "macro")] for r in rows]),
    ]
    if len(models) > 1:
        lines = [_difference(row, difference) for row in rows for difference in row["differences"]]
        header = ["benchmark", "models", "difference", "p (* < 0.05)"]
        parts.append(Section("Differences, paired by question", header, lines))
    by_category = [
        [f"{title(r)}: {name}", f"{score['n']:,}", *cells(r, "categories", name)]
        for r in rows
        for name, score in r["models"][models[0]]["categories"].items()
    ]
    parts.append(Section("Categories", ["category", "n", *models], by_category))
    metrics = [[title(r), m, *cells(r, "metrics", m)] for r in rows for m in r["models"][models[0]]["metrics"]]
    parts.append(Section("Every metric", ["benchmark", "metric", *models], metrics))
    if lines := _prompt_lines(rows, models):
        parts.append(Section("Prompts", lines=lines))
    return parts + ([_published(published)] if published else [])


def texts_section(rows: list[dict], models: list[str]) -> Section:
    """What the models make of texts, from `report.text_rows`."""
    note = "Perplexity a byte ± standard error over documents; a uniform guess has 256. Differences are in nats a byte."
    lines = []
    for row in rows:
        errors = ["" if s["stderr"] is None else f" ± {s['stderr']:.3f}" for s in row["models"].values()]
        cells = [f"{s['value']:.3f}{e}" for s, e in zip(row["models"].values(), errors, strict=True)]
        lines.append([row["name"], f"{row['n']:,}", f"{row['bytes']:,}", *cells])
    told = [
        f"{row['name']}: {d['models'][1]} - {d['models'][0]} = {d['value']:+.4f} nats a byte, p = {d['p_value']:.2g}"
        for row in rows
        for d in row["differences"]
    ]
    return Section("Texts", ["text", "documents", "bytes", *models], lines, note, told)


def _difference(row: dict, difference: dict) -> list[str]:
    first, second = difference["models"]
    p = difference["p_value"]
    return [title(row), f"{second} - {first}", percent(difference), f"{p:.2g}{' *' if p < 0.05 else ''}"]


def _prompt_lines(rows: list[dict], models: list[str]) -> list[str]:
    lines = []
    for row in rows:
        for model in models:
            if dropped := row["dropped_shots"][model]:
                lines.append(f"{title(row)}, {model}: {dropped:,} few-shot examples did not fit and were left out")
            if unasked := row["not_asked"][model]:
                lines.append(f"{title(row)}, {model}: {unasked:,} questions do not fit even alone; not asked, scored 0")
    return lines


def _published(rows: list[dict]) -> Section:
    columns = rows[0]["columns"]
    note = "Ours count four-choice questions only, as the card does. Its prompts differ, and so may the questions."
    lines = [[row["name"], *(row["figures"].get(benchmark, "-") for benchmark in columns)] for row in rows]
    return Section("Beside the published figures", ["model", *columns], lines, note)


def markdown(parts: list[Section]) -> str:
    """The sections as markdown."""
    text = ["# Evaluation"]
    for part in parts:
        text += [f"## {part.title}", part.note, _table(part) if part.rows else ""]
        text.append("\n".join(f"- {line}" for line in part.lines))
    return "\n\n".join(paragraph for paragraph in text if paragraph) + "\n"


def _table(part: Section) -> str:
    lines = [part.header, ["---"] + ["---:"] * (len(part.header) - 1), *part.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page(parts: list[Section], rows: list[dict], models: list[str]) -> str:
    """One HTML page in the style of coati's run reports, charts inside, nothing loaded from elsewhere.

    Raises:
        ImportError: matplotlib is missing.
    """
    from coati.tracking.style import STYLE
    from colossal_eval.results.charts import bars, radar

    body = []
    for i, part in enumerate(parts):
        body.append(f"<section><h2>{escape(part.title)}</h2><p>{escape(part.note)}</p>")
        if part.rows:
            body.append(_html_table(part))
        body.append("".join(f"<p>{escape(line)}</p>" for line in part.lines) + "</section>")
        if i == 0 and rows:
            figures = "".join(f"<figure>{chart}</figure>" for chart in (bars(rows, models), radar(rows, models)))
            body.append(f'<section><h2>Charts</h2><div class="grid">{figures}</div></section>')
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>Evaluation</h1>{''.join(body)}</body></html>\n"


def _html_table(part: Section) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in part.header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in part.rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="overview"><tr>{head}</tr>{body}</table>'
