"""The report's charts side by side in one SVG file, for pages that can't hold a report."""

from html import escape

from coati.tracking.charts import COLORS, HEIGHT, WIDTH, Line, line_chart
from coati.tracking.style import STYLE

GAP, ROW, TITLE = 16, 18, 22


def figure(
    charts: dict[str, list[Line]],
    legend: list[str],
    note: str = "",
    columns: int = 3,
    axes: dict[str, str] | None = None,
) -> str:
    """A standalone SVG: a legend, one entry a color (dashed where they begin again), then the charts by title in rows.

    Args:
        note: a last line of the legend.
        axes: by title, what the horizontal axis counts, if not steps.
    """
    top = 8 + ROW * (len(legend) + bool(note))
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    width, height = columns * (WIDTH + GAP), top + rows * (HEIGHT + TITLE + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"><style>{STYLE}</style>'
    ]
    for i, name in enumerate(legend):
        y = 12 + ROW * i
        style = f"c{i % COLORS}" + " dashed" * (i >= COLORS)
        parts.append(f'<line class="curve {style}" x1="10" x2="30" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="38" y="{y + 4}">{escape(name)}</text>')
    parts.append(f'<text x="10" y="{16 + ROW * len(legend)}">{escape(note)}</text>')
    for i, (title, lines) in enumerate(charts.items()):
        x, y = (i % columns) * (WIDTH + GAP), top + (i // columns) * (HEIGHT + TITLE + GAP)
        parts.append(f'<text x="{x + 10}" y="{y + 14}" style="font-weight:600">{escape(title)}</text>')
        chart = line_chart(lines, axis=(axes or {}).get(title, "step")).split(">", 1)[1].removesuffix("</svg>")
        parts.append(f'<g transform="translate({x} {y + TITLE})">{chart}</g>')
    return "".join(parts) + "</svg>\n"
