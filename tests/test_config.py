"""One dataclass a command: YAML, flags and --help come from it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from coati.config import option, parse_config
from coati.errors import UserError
from coati.trainers.ppo import PPOConfig
from coati.trainers.preference import PreferenceConfig
from coati.trainers.reward import RewardConfig
from coati.trainers.sft import SFTConfig

CONFIGS = [SFTConfig, RewardConfig, PreferenceConfig, PPOConfig]


@dataclass
class Settings:
    """Small, with every type of field that ours have."""

    path: str | None = option(None, "a path")
    rate: float = option(0.5, "a number")
    count: int = option(3, "a whole number")
    limit: float | None = option(None, "a number or nothing")
    names: list[str] = option(("a", "b"), "words")
    weights: list[float] | None = option(None, "numbers")
    shuffle: bool = option(True, "a switch that is on")
    verbose: bool = option(False, "a switch that is off")
    kind: Literal["k1", "k2"] = option("k1", "a choice")


@pytest.fixture
def parse(tmp_path):
    """Parse YAML text and flags."""

    def parse(text: str | bytes | None = None, *flags: str) -> Settings:
        if text is None:
            return parse_config(Settings, list(flags))
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse_config(Settings, ["--config", str(path), *flags])

    return parse


def test_defaults_without_file_and_flags(parse):
    assert parse() == Settings()
    assert parse().names == ["a", "b"]
    assert parse().names is not parse().names


def test_the_file_sets_every_type_of_field(parse):
    config = parse(
        "path: some/folder\nrate: 1e-5\ncount: 7\nlimit: 2\nnames: [x, 'y z', '3']\nweights: [1, 0.5]\n"
        "shuffle: false\nverbose: true\nkind: k2\n"
    )
    expected = Settings("some/folder", 1e-5, 7, 2.0, ["x", "y z", "3"], [1.0, 0.5], False, True, "k2")
    assert config == expected
    assert [type(getattr(config, f.name)) for f in dataclasses.fields(config)] == [
        type(getattr(expected, f.name)) for f in dataclasses.fields(expected)
    ]


def test_a_flag_wins_over_the_file_wherever_it_stands(parse, tmp_path):
    text = "rate: 0.1\nnames: [x, y, z]\nshuffle: false\nkind: k2\ncount: 9\n"
    config = parse(text, "--rate", "0.2", "--names", "q", "--shuffle", "true", "--kind=k1")
    assert config == Settings(rate=0.2, names=["q"], shuffle=True, kind="k1", count=9)
    path = tmp_path / "settings.yaml"
    assert parse_config(Settings, ["--rate", "0.3", f"--config={path}"]).rate == 0.3


def test_the_command_line_is_read_if_no_arguments_are_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--count", "11"])
    assert parse_config(Settings).count == 11


def test_nothing_in_the_file_leaves_the_default(parse):
    assert parse("path: null\nlimit: ~\nweights:\n") == Settings()


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("no", False), ("on", True), ("'false'", False), ("1", True)]
)
def test_booleans_in_yamls_spellings(parse, text, value):
    assert parse(f"shuffle: {text}\nverbose: {text}\n") == Settings(shuffle=value, verbose=value)


def test_boolean_flags_need_no_value(parse):
    assert parse(None, "--verbose").verbose is True
    assert parse(None, "--verbose", "false").verbose is False


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rat: 1\n", "unknown key 'rat'; did you mean 'rate'?"),
        ("learning_rates: 1\n", "unknown key 'learning_rates'"),
        ("zzz: 1\n", "unknown key 'zzz'"),
        ("7: 1\n", "unknown key 7"),
        ("- rate\n- 1\n", "must be a mapping"),
        ("rate\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("rate: [1\n", "is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(parse, tmp_path, text, says):
    """PITFALL 30: and no YAML tag runs code."""
    with pytest.raises(UserError) as error:
        parse(text)
    assert says in str(error.value)
    assert str(tmp_path / "settings.yaml") in str(error.value)
    assert "\n" not in str(error.value)
    assert ("did you mean" in str(error.value)) == ("did you mean" in says)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(UserError, match=f"--config {path}: .*(No such file|Is a directory)"):
            parse_config(Settings, ["--config", str(path)])


def test_a_file_that_is_no_text_is_named(parse):
    with pytest.raises(UserError, match=r"settings\.yaml"):
        parse(b"\x80\x81\xff\xfe binary")


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("count: many\n", [], r"settings\.yaml: count is 'many'; it takes a whole number"),
        ("kind: k3\n", [], "kind is 'k3'; it takes one of k1, k2"),
        ("shuffle: maybe\n", [], "shuffle is 'maybe'; it takes true or false"),
        (None, ["--count", "1.5"], "--count is '1.5'; it takes a whole number"),
        (None, ["--weights", "1", "x"], "--weights is 'x'; it takes a number"),
        (None, ["--cout", "3"], "--cout"),
        (None, ["--rate"], "--rate.*expected"),
        (None, ["--config"], "--config.*expected"),
    ],
)
def test_wrong_values_and_unknown_flags_are_named(parse, text, flags, says):
    with pytest.raises(UserError, match=says):
        parse(text, *flags)


def test_abbreviated_flags_are_refused(parse, capsys):
    """A new field must not change what an old command means."""
    with pytest.raises((SystemExit, ValueError)):
        parse(None, "--cou", "4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate: -1\nlimit: -0.25\n", dict(rate=-1.0, limit=-0.25)),
        pytest.param("rate: -0.00001\npath: -dash\n", dict(rate=-1e-5, path="-dash")),
    ],
)
def test_values_that_start_with_a_dash(parse, text, expected):
    assert parse(text) == Settings(**expected)


def test_an_empty_list_empties_the_list(parse):
    assert parse("names: []\n").names == []


@pytest.mark.parametrize("flags", [["--names", "q"], ["--names=q"]])
def test_a_flag_wins_over_an_empty_list_in_the_file(parse, flags):
    assert parse("names: []\n", *flags).names == ["q"]


def test_two_files_are_refused_or_both_read(parse, tmp_path):
    (tmp_path / "other.yaml").write_text("count: 5\n")
    try:
        config = parse("rate: 0.1\n", "--config", str(tmp_path / "other.yaml"))
    except (UserError, SystemExit):
        return
    assert (config.rate, config.count) == (0.1, 5)


def test_a_mapping_as_a_value_is_refused(parse):
    with pytest.raises((UserError, SystemExit)):
        parse("path: {a: 1}\n")


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_every_setting_has_a_help_text(config_class):
    for field in dataclasses.fields(config_class):
        assert len(field.metadata.get("help", "")) > 5, f"{config_class.__name__}.{field.name} has no help text"


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_help_shows_every_setting_and_ends_well(config_class, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(config_class, ["--help"], description="what it does")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "what it does" in text
    assert "--config FILE.yaml" in text
    assert [f.name for f in dataclasses.fields(config_class) if f"--{f.name} " not in text + " "] == []


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_defaults_survive_the_parser(config_class):
    """What a config is without any flag is what its dataclass says."""
    assert parse_config(config_class, []) == config_class()
