"""Every setting that the documentation and the examples name exists, and takes the value that stands there."""

import re
from functools import cache
from pathlib import Path

import pytest

from coati.commands import COMMANDS
from coati.config import parse_settings, read_yaml
from coati.config.schema import entry_classes, leaves, paths_named
from coati.config.yaml12 import read_words
from coati.errors import UserError
from coati.trainers.algorithms import ALGORITHMS
from tests.conftest import ROOT
from tests.docs.pages import PAGES, Piece, blocks, explained_errors, name_of, prose, spans, text_of, words_of
from tests.docs.test_commands import program_of

# --- which settings a page is about

# The first command of each algorithm, and all commands: in this order one of the first mostly takes a setting.
FIRST = {name: next(c.name for c in COMMANDS.values() if c.algorithm == name) for name in ALGORITHMS}
EVERY = [*dict.fromkeys([*FIRST.values(), *COMMANDS])]


@cache
def settings_of(command: str) -> tuple[type, dict]:
    """The class of a command's settings, and the command's defaults."""
    if command == "pretrain":
        from colossal_llama.pretraining.stage_settings import PretrainConfig

        return PretrainConfig, {}
    if command == "evaluate":
        from colossal_eval.evaluate import EvaluateConfig

        return EvaluateConfig, {}
    return ALGORITHMS[COMMANDS[command].algorithm].config, dict(COMMANDS[command].defaults)


@cache
def commands_of(page: str) -> list[str]:
    """The commands that a page is about: those of its row in the README's table of methods; else all."""
    row = rf"^\| \[[^|]*\]\({re.escape(page)}[)#][^|]*\|([^|]*)\|"
    rows = re.findall(row, text_of(ROOT / "README.md"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    applications = {
        "applications/colossal_llama/README.md": ["pretrain"],
        "applications/colossal_eval/README.md": ["evaluate", *EVERY],  # it evaluates during training too
    }
    return named or applications.get(page) or EVERY


def problem(commands: list[str], found: dict, flags: list[str]) -> str | None:
    """Why no command takes these settings of a file and these flags; None if one does. Of several reasons the last."""
    reason = None
    for command in commands:
        config_class, defaults = settings_of(command)
        try:
            parse_settings(config_class, found, flags, "here", defaults=defaults)
        except UserError as error:
            reason = f"{command}: {error}"
        else:
            return None
    return reason


@cache
def leaves_of(command: str) -> dict:
    return leaves(settings_of(command)[0])


def is_setting(name: str, commands: list[str]) -> bool:
    return any(paths_named(name, leaves_of(command)) for command in commands)


# --- files and blocks


def named_method(found: dict) -> str | None:
    """The method that settings name."""
    algorithm = found.get("algorithm", {})
    return algorithm.get("type") if isinstance(algorithm, dict) else algorithm


def method_of(found: dict, name: str) -> str:
    """The method that a settings file is for: the one in it, or the one or the algorithm in the file's name."""
    in_name = [word for word in re.split("[_.-]", name) if word in (*COMMANDS, *FIRST)]
    return named_method(found) or FIRST.get(in_name[0], in_name[0])


# Files in YAML that are no settings of a method, and what reads them.
OTHER_FILES = {
    "examples/quickstart/phrases.yaml": "examples/quickstart/make_data.py",
    "applications/colossal_llama/stages.yaml": "tests/applications/colossal_llama/test_readme.py",
    "applications/colossal_llama/example/english.yaml": "applications/colossal_llama/example/run.py",
    "applications/colossal_llama/example/chinese.yaml": "applications/colossal_llama/example/run.py",
    "examples/smollm2/chinese.yaml": "examples/smollm2/chinese.py",
}
FILES = sorted(name_of(file) for folder in ("examples", "applications") for file in (ROOT / folder).rglob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in FILES if name not in OTHER_FILES])
def test_settings_of_an_example_parse_and_fit_together(name):
    """On as many processes as the file is for: of GPUs as its name says, of CPUs two."""
    found = read_yaml(ROOT / name)
    config_class, defaults = settings_of(method_of(found, name.rpartition("/")[2]))
    gpus = re.search(r"(\d+)gpu", name)
    config = parse_settings(config_class, found, [], name, defaults=defaults)
    config.check(int(gpus[1]) if gpus else 2)


def test_there_are_settings_of_every_algorithm():
    methods = {method_of(read_yaml(ROOT / name), name.rpartition("/")[2]) for name in FILES if name not in OTHER_FILES}
    assert {COMMANDS[method].algorithm for method in methods} == set(ALGORITHMS)


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_no_settings_is_read_by_what_is_said_to(name):
    assert name in FILES and name.rpartition("/")[2].removesuffix(".yaml") in text_of(ROOT / OTHER_FILES[name])


YAML_BLOCKS = [block for page in PAGES for block in blocks(page) if block.language.split()[:1] == ["yaml"]]


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=str)
def test_a_block_of_settings_is_taken(block):
    """By the command that `algorithm` or the block's second word names (```yaml ppo), else by one of the page's."""
    found = read_words(block.text, block.page)
    named = block.language.split()[1:] or [named_method(found)]
    assert set(named) <= {*COMMANDS, None}
    assert problem(commands_of(block.page) if named == [None] else named, found, []) is None


# --- between backticks

# What stands for a value of the reader's, and a value.
PLACEHOLDERS = {"N": "2", "NAME": "dapo"}
# What looks like settings of ours and is something else.
NOT_SETTINGS = {
    "weight: 0": "a field of a message",
    "train: false": "a field of a message",
    "algorithm: {type: echo}": "right with an environment, which a table has no room for",
}
# Flags of programs of others, beside those that commands show.
OTHER_FLAGS = {
    "--no-deps": "pip",
    "--security-opt": "docker",
    "--signal": "sbatch",
    "--kill-on-bad-exit": "srun",
    "--disable-status": "srun",
    "--shutdown-timeout": "torchrun",
    "--nproc_per_node": "colossalai run",
    "--master_port": "colossalai run",
}
# Names of other programs, in sentences about these.
OTHER_NAMES = {
    "use_bias_correction_kl": "TRL's",
    "weights_only": "torch.load's",
    "memfd_create": "of Linux",
    "arc_agi": "a task of reasoning-gym",
    "n_queens": "a task of reasoning-gym",
    "polynomial_multiplication": "a task of reasoning-gym",
    "family_config": "a function of tests/distributed/world.py",
    "model.resize_token_embeddings": "a method of transformers' models",
    "model.safetensors": "a file",
}


def code_of(*folders: str) -> str:
    return "\n".join(text_of(file) for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))


@cache
def scripts() -> str:
    """The programs that have flags of their own, beside the methods."""
    modules = "\n".join(text_of(ROOT / "coati" / name) for name in ("cli.py", "check_reward.py"))
    folders = ("applications", "examples", "tools", "benchmarks", "coati/planner", "coati/label", "coati/serve")
    return code_of(*folders) + modules


@cache
def words_in_code() -> set[str]:
    return set(re.findall(r"\w+", code_of("coati") + scripts()))


def is_in_code(name: str) -> bool:
    """Whether a name stands there, or is put together there: `length_chosen` of f"length_{side}" and "chosen"."""
    ends = [at + 1 for at, letter in enumerate(name) if letter == "_"]
    return name in words_in_code() or any({name[:at], name[at:]} <= words_in_code() for at in ends)


def filled(text: str) -> str:
    return re.sub(r"\b[A-Z]+\b", lambda word: PLACEHOLDERS.get(word[0], word[0]), text)


def mapping_of(text: str) -> dict | None:
    """What a text like `optimizer: {learning_rate: 1e-5}` or `{type: json, weight: 2}` says; None if it is none."""
    if not re.match(r"\{?[a-z_.]+: \S", text):
        return None
    try:
        found = read_words(filled(text), "here")
    except UserError:  # such as a line of Python
        return None
    return found if isinstance(found, dict) else None


def mapping_problem(text: str, found: dict, commands: list[str]) -> str | None:
    """As `problem`, of settings as a file has them, with their sections, or of an entry of `rewards` or `algorithm`."""
    if not text.startswith("{"):
        return problem(commands, found, [])
    return problem(commands, {"rewards": [found]}, []) and problem(commands, {"algorithm": found}, [])


def flags_problem(text: str, commands: list[str]) -> str | None:
    words = words_of(filled(text))[1]
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    if len(words) > len(names) and all(is_setting(name[2:].replace("-", "_"), commands) for name in names):
        return problem(commands, {}, words)
    unknown = [
        name
        for name in names
        if not is_setting(name[2:].removeprefix("no_").replace("-", "_"), commands)
        and name not in (*OTHER_FLAGS, "--config", "--help", "--help-all")
        and not re.search(rf'"{name}"|^    {name[2:]}: .*option\(', scripts(), re.MULTILINE)
    ]
    return f"no program of ours has {', '.join(unknown)}" if unknown else None


def reason_against(piece: Piece) -> str | None:
    """Why what stands between two backticks is wrong as a setting; None if it is right, or none."""
    text, commands = piece.text, commands_of(piece.page)
    found = mapping_of(text)
    sections = {path.partition(".")[0] for path in leaves_of("ppo") if "." in path}
    first, _, value = text.partition(" ")
    if found is not None:
        return mapping_problem(text, found, commands)
    if text.startswith("--"):
        return flags_problem(text, commands)
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", first) and first.partition(".")[0] in sections:
        exists = any(first in leaves_of(command) for command in EVERY)
        return None if exists else "there is no such setting"
    if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", first):
        if value and " " not in value and is_setting(first, EVERY):
            return flags_problem(f"--{text}", EVERY)
        return None if is_in_code(first) else "no setting, and no name in the code"
    return None


@cache
def findings() -> dict[Piece, str]:
    pieces = [piece for page in PAGES for piece in spans(page)]
    others = [piece for piece in pieces if not program_of(piece.text) and piece.text not in explained_errors()]
    reasons = {piece: reason_against(piece) for piece in others}
    return {piece: reason for piece, reason in reasons.items() if reason}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_in_sentences_exist_and_take_their_values(page):
    known = {**NOT_SETTINGS, **OTHER_NAMES}
    mine = {piece.text: reason for piece, reason in findings().items() if piece.page == name_of(page)}
    assert {text: reason for text, reason in mine.items() if text not in known} == {}


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("docs/ppo.md", "--kl_coeff 0.1"),  # no such flag
        ("docs/ppo.md", "--kl_coeff"),
        ("docs/sft.md", "--kl_coefficient 0.1"),  # not of this page's method
        ("docs/data.md", "--max_length many"),
        ("docs/data.md", "--too_long cut"),
        ("docs/plugins.md", "tensor_parallel 0"),  # out of range
        ("docs/plugins.md", "parallel.plugins"),
        ("docs/plugins.md", "plugin: {type: zero2}"),
        ("docs/plugins.md", "parallel: {learning_rate: 1.0}"),  # in another section
        ("docs/papers.md", "algorithm: {type: dapoo}"),
        ("docs/papers.md", "algorithm: {type: dapo, clip_high: -1}"),
        ("docs/rewards.md", "{type: maths}"),
        ("docs/rewards.md", "{type: math, wieght: 2}"),
        ("docs/rewards.md", "rewards: [maths]"),
        ("docs/rewards.md", "--allow_code_execution true"),  # of an entry, so no flag
        ("docs/tracking.md", "trackers: [tensorbord]"),
        ("docs/sft.md", "warmup_ratio"),  # TRL's
        ("docs/plugins.md", "gradient_checkpointing: true"),  # without its section
        ("applications/colossal_llama/README.md", "mix: {zh: most}"),
        ("applications/colossal_llama/README.md", "{zh: 0.7}"),  # of which setting?
        ("applications/colossal_eval/README.md", "--shot 5"),
    ],
)
def test_what_is_wrong_between_backticks_is_found(page, text):
    assert reason_against(Piece(page, text))


@pytest.mark.parametrize(
    ("page", "language", "text"),
    [
        ("docs/tracking.md", "yaml", "trackers: [wandb]"),  # without its section
        ("docs/tracking.md", "yaml", "tracking: {tracking_mode: of}"),
        ("docs/ppo.md", "yaml", "algorithm: {group_size: 4}"),  # of another method
        ("docs/plugins.md", "yaml sft", "algorithm: {type: dpo}"),
        ("docs/plugins.md", "yaml", "algorithm: {type: dpo, clip_low: 0.1}"),
        ("docs/plugins.md", "yaml mkdocs", "site_name: coati"),
    ],
)
def test_what_is_wrong_in_a_block_is_found(page, language, text):
    with pytest.raises(AssertionError):
        test_a_block_of_settings_is_taken(Piece(page, text, language))


def first_cells(page: Path, heads: str) -> list[str]:
    """What stands between backticks in the first column of a page's tables with such a head."""
    tables = re.findall(rf"^\| (?:{heads}) \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", prose(page), re.MULTILINE)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    return [text for cell in cells for text in re.findall("`(.+?)`", cell)]


STYLE = ROOT / "coati" / "tracking" / "style.py"  # CSS, whose variables look like flags
WITH_TABLES = [page for page in PAGES if first_cells(page, "[Ss]etting")]


@pytest.mark.parametrize("page", WITH_TABLES, ids=name_of)
def test_tables_of_settings_list_settings(page):
    """Those of the methods that the page is about; of rewards' entries on the page of all settings."""
    commands = commands_of(name_of(page))
    names = [text.removeprefix("--").partition(" ")[0] for text in first_cells(page, "[Ss]etting")]
    rewards = entry_classes(settings_of("ppo")[0].__pydantic_fields__["rewards"].annotation)
    of_rewards = {name for kind in rewards for name in kind.__pydantic_fields__}
    assert [name for name in names if not is_setting(name, commands) and name not in of_rewards] == []


@pytest.mark.parametrize("file", [f for f in sorted((ROOT / "coati").rglob("*.py")) if f != STYLE], ids=name_of)
def test_flags_that_messages_and_help_name_exist(file):
    flags = re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9](?![\w{-])", text_of(file))
    assert sorted({flag for flag in flags if flags_problem(flag, EVERY)}) == []


def test_every_exception_is_used():
    found = {piece.text for piece in findings()}
    assert sorted({*NOT_SETTINGS, *OTHER_NAMES} - found) == []
    flags = {word.partition("=")[0] for page in PAGES for piece in spans(page) for word in piece.text.split()}
    assert sorted(set(OTHER_FLAGS) - flags) == []
