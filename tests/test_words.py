"""Code and its texts use US spelling and the words of the field, so that a search for those finds them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".sh", ".sbatch"}
CHECKED = ("coati", "applications", "tests", "tools", "benchmarks", "examples", "docs", "Makefile")
CHECKED += ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
ALLOWED = re.compile(r"parallelism|analyses|was_cancelled")  # the last: Label Studio's field
ALLOWED_FILES = (
    "examples/quickstart/phrases.yaml",  # made-up data, which results were measured on
    "tests/data/templates",  # chat templates of others
    "tests/test_words.py",
)

PER = (
    "answer|batch|character|epoch|gpu|group|iteration|layer|pass|process|prompt|question|rank|response|row|sample|token"
)
WORDS = [
    # US spelling
    (
        r"(?:token|normal|optim|initial|summar|penal|general|recogn|organ|minim|maxim|util|special|serial)is(?=[aei])",
        "-iz-",
    ),
    (r"(?:priorit|synchron|custom|categor|character|parallel|quant|random|regular|visual|linear)is(?=[aei])", "-iz-"),
    (
        r"(?:real|vector|factor|memor|emphas|capital|standard|apolog|author|final|local)is(?=e[drs]?(?![a-z])|ing|ation)",
        "-iz-",
    ),
    (r"analys(?=e[drs]?(?![a-z])|ing)", "analyz-"),
    (r"(?:col|behavi|fav|neighb|hon|hum|lab|rum|vig)our", "-or"),
    (r"(?:label|model|cancel|travel|signal|level|fuel|total)l(?=ed|ing|er)", "one l"),
    (r"(?<![a-z])(?:learnt|spelt|misspelt|burnt|dreamt)(?![a-z])", "-ed"),
    (
        r"(?<![a-z])(?:grey|towards|judgement|licence|artefact|whilst|catalogue|defence|centred?|metre|fibre)(?![a-z])",
        "the US word",
    ),
    # the field's words
    (rf"(?<![a-z])(?:bits|bytes|nats|once|one|tokens) an? (?:{PER})(?![a-z]| of| may| has| in)", "per"),
    (
        r"weights? at hand|whole on every|models? (?:that|which) (?:is|are) whole",
        "unsharded (gathered) weights, replicated models",
    ),
    (r"(?<![a-z])mend(?:s|ed|ing)?(?![a-z])", "fix"),
    (r"whole or not there", "atomic"),
    (r"(?<![a-z])for ever(?![a-z])", "forever"),
    (r"(?:policy|weights) of (?:now|then)", "current policy, current weights"),
    (r"likeliest (?:token|response)", "nucleus (top-p) mass, greedy response"),
    (r"(?:weights|them) (?:are |is |were )?(?:not )?handed over", "synced"),
    (r"gone past", "skipped"),
    (r"taken off the (?:loss|score)", "subtracted"),
    (r"(?:policy|model|actor)'s answers?|answers? of (?:a|the) (?:policy|model)", "response"),
    (r"(?:has|have) (?:no|an) opinion", "skips (a reward returns None)"),
    (r"to go on with it", "use --resume auto to continue"),
    (r"refused here", "unsupported"),
]
IN_CODE_OF_COATI = [(r"judg", "score (only an LLM judges)")]
OF_LLM_JUDGES = ("coati/judges/", "coati/run_layout.py", "coati/planner/factory.py", "coati/planner/rollouts.py")
OF_LLM_JUDGES += ("coati/trainers/factory.py",)
OF_LLM_JUDGES += tuple(f"coati/rewards/{name}.py" for name in ("__init__", "config", "judge", "rubric"))


def checked_files() -> list[Path]:
    files = []
    for start in CHECKED:
        path = ROOT / start
        files += [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.suffix in SUFFIXES]
    return [file for file in files if not str(file.relative_to(ROOT)).startswith(ALLOWED_FILES)]


def findings(text: str, words: list[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Line, what is there in lower case and what to use, for each forbidden word."""
    found, text = [], ALLOWED.sub("", text.lower())
    for pattern, instead in words:
        for match in re.finditer(pattern, text):
            found.append((text.count("\n", 0, match.start()) + 1, match[0], instead))
    return sorted(found)


def test_words_are_those_of_the_field():
    wrong = []
    for file in checked_files():
        name = str(file.relative_to(ROOT))
        of_coati = name.startswith("coati/") and not name.startswith(OF_LLM_JUDGES)
        words = WORDS + IN_CODE_OF_COATI if of_coati else WORDS
        for number, there, instead in findings(file.read_text(encoding="utf-8"), words):
            wrong.append(f"{name}:{number}: {there!r}: use {instead}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "def tokenise_many(",
        "the neighbours' colours",
        "it was LEARNT",
        "labelled rows",
        "3 nats a token",
        "mend the file",
    ],
)
def test_a_forbidden_word_is_found_in_identifiers_and_prose(line):
    assert findings(f"\n{line}\n", WORDS)[0][0] == 2


@pytest.mark.parametrize(
    "line", ["one a row of data", "a labeled row", "parallelism", "recommend", "exercise", "a promise"]
)
def test_words_that_only_look_alike_are_allowed(line):
    assert not findings(line, WORDS)
