"""Sessions of labeling: `coati label` serves responses of models, somebody labels them, and the rows are exported."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from coati.label.store import OWNER
from examples.feedback.labeler import label_all
from examples.stages import ROOT, environment, run

PERSON = "labeler"
COATI = [sys.executable, "-m", "coati.cli"]


def compare(
    prompts: Path, labels: Path, models: Mapping[str, Path], flags: Mapping[str, Any], by_hand: bool, threads: int
) -> dict[str, Any]:
    """Serves the models' responses to the prompts until all pairs are labeled, by a person or the simulated one.

    Args:
        labels: the file of labels, which is continued if it is there.
        models: by name. One alone responds twice to each prompt.
        flags: further flags of `coati label`.

    Returns:
        What the owner's page shows then, see `coati.label.application.overview_of`.
    """
    words = [str(prompts), "--labels", str(labels), "--people", PERSON, "--port", "0"]
    words += [word for name, path in models.items() for word in ("--model", f"{name}={path}")]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with served(words, threads) as links:
        if by_hand:
            print(f"label at {links[PERSON]}; it goes on when all pairs are labeled", flush=True)
        else:
            label_all(links[PERSON])
        return finished_overview(links[OWNER])


@contextmanager
def served(words: list[str], threads: int) -> Iterator[dict[str, str]]:
    """The links by name of a `coati label` process, which ends with the block."""
    print("$ coati label", *words, flush=True)
    variables = environment() | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [*COATI, "label", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        yield read_links(process)
    finally:
        process.terminate()
        process.wait()


def read_links(process: subprocess.Popen) -> dict[str, str]:
    """What the process prints before it serves."""
    links: dict[str, str] = {}
    for line in process.stdout:
        if line.startswith("Each link is a secret"):
            return links
        if link := re.fullmatch(r"(\S+) +(http://\S+/)\n", line):
            links[link[1]] = link[2]
        else:
            print(line, end="", flush=True)
    sys.exit("error: coati label did not serve its page; its message is above")


def finished_overview(link: str) -> dict[str, Any]:
    """The owner's overview, once nothing is left to label: a pair that the person skips is left to nobody."""
    with httpx.Client(base_url=link, timeout=60, trust_env=False) as browser:
        while True:
            overview = browser.get("overview.json").raise_for_status().json()
            skipped = sum(person["skipped"] for person in overview["people"])
            if overview["progress"]["labels"] + skipped >= overview["progress"]["wanted"]:
                return overview
            time.sleep(2)


def export(labels: Path, rows: Path):
    """Preference rows of the pairs that have a winner."""
    run([*COATI, "label", "export", str(labels), "--output", str(rows)])
