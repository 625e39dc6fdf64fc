"""Writes the table of attacks in docs/rewards.md: `python tools/write_attacks.py`.

What each verifier pays for each is found out by `coati.check_reward`, on its built-in prompts. A test holds that the
committed page is what this writes.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "rewards.md"
MARKED = re.compile(r"(<!-- attacks -->\n).*?(<!-- end of attacks -->)", re.DOTALL)
SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
PATTERN = "Answer: ([^\n]*)"
STYLES = ("boxed", "marked", "stated", "anywhere")


def page() -> str:
    return MARKED.sub(lambda found: f"{found[1]}\n{table()}\n{found[2]}", PAGE.read_text(encoding="utf-8"))


def table() -> str:
    """A row for each attack, a column for each verifier."""
    from coati.rewards.attacks import ATTACKS

    columns = {name: findings_of(entry) for name, entry in entries().items()}
    rows = [["Response", *columns], ["---"] * (1 + len(columns))]
    for attack in ATTACKS:
        cells = [cell(findings.get(attack.name)) for findings in columns.values()]
        if any(cells):
            rows.append([attack.about.replace("<", "\\<").replace("__", r"\_\_"), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def entries() -> dict[str, dict]:
    """Verifiers by the column's title."""
    found: dict[str, dict] = {f"`math` {style}": {"type": "math", "answer_style": style} for style in STYLES}
    found |= {f"`{name}`": {"type": name} for name in ("gsm8k", "choice", "exact")}
    found["`regex`"] = {"type": "regex", "pattern": PATTERN}
    found |= {"`format`": {"type": "format"}, "`json`": {"type": "json"}}
    found["`python`"] = {"type": "python", "allow_code_execution": True}
    return found


def findings_of(entry: dict) -> dict:
    """By the attack's name."""
    from pydantic import TypeAdapter

    from coati.check_reward import check_reward, load
    from coati.rewards.config import AnyReward

    with tempfile.TemporaryDirectory() as folder:
        if entry["type"] == "json":
            schema = Path(folder) / "schema.json"
            schema.write_text(json.dumps(SCHEMA), encoding="utf-8")
            entry = entry | {"json_schema": str(schema)}
        settings = TypeAdapter(AnyReward).validate_python(entry)
        return {finding.attack: finding for finding in check_reward(settings, load(settings)).findings}


def cell(finding) -> str:
    """What an attack gets."""
    if finding is None:
        return ""
    paid = "no" if finding.paid == 0 else "paid" if finding.paid == finding.tried else "some"
    return {"wrong": f"**{paid}**", "by choice": f"{paid}\\*"}.get(finding.verdict, paid)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
