"""The report's style sheet: system fonts, light and dark by the reader's preference."""

_LIGHT = ("#2563c9", "#d2691e", "#15803d", "#a21caf", "#0e7490", "#b91c1c", "#6d5dd3", "#7c6a0a")
_DARK = ("#7aa7ff", "#f2a15f", "#5fd38d", "#e08af0", "#5cc8dc", "#ff8a8a", "#b0a4ff", "#d8c35a")


def _palette(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{i}:{color};" for i, color in enumerate(colors))


COLORS = (
    ":root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1c2330;--muted:#667085;--rule:#e3e7ee;"
    f"--good:#15803d;--bad:#b91c1c;{_palette(_LIGHT)}}}"
    "@media(prefers-color-scheme:dark){:root{--page:#12151b;--card:#1a1f28;--text:#e4e8ef;--muted:#98a2b3;"
    f"--rule:#2c3340;--good:#5fd38d;--bad:#ff8a8a;{_palette(_DARK)}}}}}"
)
STYLE = (
    COLORS
    + "".join(f".c{i}{{--line:var(--c{i})}}" for i in range(len(_LIGHT)))
    + """
*{box-sizing:border-box}
body{margin:0 auto;padding:40px 32px 64px;max-width:1240px;background:var(--page);color:var(--text);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header>p{margin:0;color:var(--muted);font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{margin:2px 0 20px;font-size:30px;line-height:1.2;font-weight:650}
h2{margin:0 0 14px;font-size:20px;font-weight:650}
h3{margin:20px 0 8px;font-size:15px;font-weight:600}
section{margin-top:44px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:9px 14px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
tr:last-child>td,tr:last-child>th{border-bottom:0}
th{font-weight:600;color:var(--muted);font-size:13px}
.overview,.samples,.settings,figure,.figures>div{background:var(--card);border:1px solid var(--rule);
 border-radius:10px}
table.overview,table.samples,table.settings{border-collapse:separate;border-spacing:0;overflow:hidden}
.overview td{font-variant-numeric:tabular-nums}
.overview td:first-child{font-weight:600}
.status{font-size:12px;font-weight:600;padding:2px 9px;border-radius:99px;border:1px solid currentColor;
 color:var(--muted)}
.status.finished{color:var(--good)}.status.failed{color:var(--bad)}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:12px;margin:0}
.figures>div{padding:12px 16px}
dt{color:var(--muted);font-size:13px}dd{margin:2px 0 0;font-size:21px;font-weight:600;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 12px;font-size:13px;color:var(--muted)}
.legend span{display:inline-flex;align-items:center;gap:7px}
.key{width:20px;border-top:2.5px solid var(--line,var(--muted))}.key.dashed{border-top-style:dashed}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:14px}
figure{margin:0;padding:12px 12px 6px}
figcaption{display:flex;align-items:baseline;gap:8px;padding:0 4px 6px;font-size:14px}
figcaption b{font-weight:600;overflow-wrap:anywhere}
figcaption small{color:var(--muted)}
figcaption span{margin-left:auto;color:var(--muted);font-variant-numeric:tabular-nums;font-size:13px;
 white-space:nowrap}
.warning{margin:0 4px 6px;color:var(--bad);font-size:13px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--muted);font-size:10.5px;font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--rule)}
.curve{fill:none;stroke:var(--line);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.curve.raw{stroke-width:1;opacity:.38}
.curve.dashed{stroke-dasharray:5 4}
.bar{fill:var(--line);opacity:.85}
.dot circle{fill:transparent}.dot.shown .mark,.dot:hover .mark{fill:var(--line)}
details{margin-top:16px}
summary{cursor:pointer;font-weight:600;font-size:14px;padding:4px 0 10px}
.samples td{width:28%}.samples td.n,.samples th.n{width:8%;text-align:right;font-variant-numeric:tabular-nums}
.samples td div{white-space:pre-wrap;overflow-wrap:anywhere;max-height:11em;overflow-y:auto}
.samples .turn{margin:0 0 6px;padding:4px 9px;border-left:3px solid var(--rule);color:var(--muted)}
.samples .turn small{display:block;font-size:11px}.samples .turn b{float:right;font-weight:600}
.samples .turn.assistant{border-left-color:var(--c0);color:var(--text)}
.samples .gap{color:var(--muted);font-style:italic;text-align:center}
.settings th{width:30%;font-family:ui-monospace,Menlo,Consolas,monospace;font-weight:500;font-size:12.5px}
.settings td{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12.5px;overflow-wrap:anywhere}
.settings th,.settings td{padding:5px 14px}
.settings .differs td{color:var(--c1);font-weight:600}
footer{margin-top:44px;color:var(--muted);font-size:13px}
"""
)
