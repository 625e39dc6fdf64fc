"""The report's tables, and all of them as markdown."""

from __future__ import annotations

from dataclasses import dataclass, field

from colossal_eval.results.summaries import title


@dataclass
class Section:
    """A table under a title, with a sentence before it and lines after it."""

    title: str
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    lines: list[str] = field(default_factory=list)


def with_error(score: dict, digits: int = 2, scale: int = 1) -> str:
    """A score as "25.31 ± 0.38", times `scale`; without an error where there is none."""
    text = f"{scale * score['value']:.{digits}f}"
    return text if score["stderr"] is None else f"{text} ± {scale * score['stderr']:.{digits}f}"


def percent(score: dict) -> str:
    """A score in percent."""
    return with_error(score, scale=100)


def difference_cells(difference: dict) -> list[str]:
    """Two models' names, their difference in percent, and its p-value, marked where it is below 0.05."""
    first, second = difference["models"]
    p = difference["p_value"]
    return [f"{second} - {first}", percent(difference), f"{p:.2g}{' *' if p < 0.05 else ''}"]


def sections(rows: list[dict], models: list[str], published: list[dict] | None) -> list[Section]:
    """The report's parts, from `summaries.report_rows` and `published_figures.compare_published`."""

    def cells(row: dict, *path: str) -> list[str]:
        found = [row["models"][model] for model in models]
        for key in path:
            found = [value[key] for value in found]
        return [percent(value) for value in found]

    main = [[title(r), r["metric"], f"{r['n']:,}", f"{100 * r['random']:.2f}", *cells(r, "mean")] for r in rows]
    note = "In percent ± standard error; `random` is the average score of blind guessing."
    parts = [
        Section("Scores", ["benchmark", "metric", "n", "random", *models], main, note),
        Section("Mean of subjects", ["benchmark", *models], [[title(r), *cells(r, "macro")] for r in rows]),
    ]
    if len(models) > 1:
        lines = [[title(row), *difference_cells(difference)] for row in rows for difference in row["differences"]]
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
    """What the models make of texts, from `summaries.text_rows`."""
    note = "Perplexity per byte ± standard error over documents; 256 is a uniform guess. Differences: nats per byte."
    lines, compared = [], []
    for row in rows:
        cells = [with_error(score, 3) for score in row["models"].values()]
        lines.append([row["name"], f"{row['n']:,}", f"{row['bytes']:,}", *cells])
        for difference in row["differences"]:
            first, second = difference["models"]
            value, p = difference["value"], difference["p_value"]
            compared.append(f"{row['name']}: {second} - {first} = {value:+.4f} nats per byte, p = {p:.2g}")
    return Section("Texts", ["text", "documents", "bytes", *models], lines, note, compared)


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
        text += [f"## {part.title}", part.note, markdown_table(part.header, part.rows) if part.rows else ""]
        text.append("\n".join(f"- {line}" for line in part.lines))
    return "\n\n".join(paragraph for paragraph in text if paragraph) + "\n"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns but the first are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
