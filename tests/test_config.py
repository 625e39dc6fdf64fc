"""One dataclass a command: YAML, flags and --help come from it."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest
from pydantic import Field

import coati.config
from coati.config import ListOf, configure, option, parse_config, reconfigure, settings
from coati.config.flags import range_of
from coati.config.options import path_kind
from coati.config.schema import Leaf, by_path, entry_classes, flags, leaves, paths_named, section_classes, types_of
from coati.errors import UserError
from coati.initial import value_at
from coati.losses import correction, group, policy, preference
from coati.trainers.config import DAPO, GRPO, GRPOConfig, PPOConfig, PreferenceConfig, RewardConfig, SFTConfig
from tests.conftest import ROOT

CONFIGS = [SFTConfig, RewardConfig, PreferenceConfig, PPOConfig, GRPOConfig]


@settings
class Settings(coati.config.Settings):
    """Small, with every type of field that ours have."""

    path: str | None = option(None, "a path", path="output")
    rate: float = option(0.5, "a number")
    count: int = option(3, "a whole number")
    limit: float | None = option(None, "a number or nothing")
    names: ListOf[str] = option(("a", "b"), "words")
    weights: ListOf[float] | None = option(None, "numbers")
    shuffle: bool = option(True, "a switch that is on")
    verbose: bool = option(False, "a switch that is off")
    kind: Literal["k1", "k2"] = option("k1", "a choice")
    display: Literal["auto", "on", "off"] = option("auto", "a choice with words that may be switches")
    share: float = option(0.5, "a number with a range", ge=0, lt=1)
    shares: ListOf[Annotated[float, Field(gt=0, le=1)]] = option((), "numbers with a range")
    folders: ListOf[str] = option((), "paths", path="data")
    extra: dict[str, Any] | None = option(None, "a mapping")


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
    expected = dict(path="some/folder", rate=1e-5, count=7, limit=2.0, names=["x", "y z", "3"], weights=[1.0, 0.5])
    expected |= dict(shuffle=False, verbose=True, kind="k2")
    assert config == Settings(**expected)
    assert {name: type(getattr(config, name)) for name in expected} == {n: type(v) for n, v in expected.items()}


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
        ("rat: 1\n", "unknown setting 'rat'; did you mean 'rate'?"),
        ("learning_rates: 1\n", "unknown setting 'learning_rates'"),
        ("zzz: 1\n", "unknown setting 'zzz'"),
        ("7: 1\n", "unknown setting '7'"),
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


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["[]"], []),
        (["[a, '---', no]"], ["a", "---", "no"]),
        (["data[:3]"], ["data[:3]"]),  # no list
        (["a", "[b]"], ["a", "[b]"]),  # several words are the list
    ],
)
def test_a_list_may_be_yaml_as_a_flag_too(parse, words, names):
    assert parse("names: [x]\n", "--names", *words).names == names
    if len(words) == 1:
        assert parse("names: [x]\n", f"--names={words[0]}").names == names


def test_a_list_of_entries_may_be_yaml_as_a_flag_too():
    written = "[{type: regex, pattern: x, weight: 2}, math]"
    together = parse_config(PPOConfig, ["--rewards", written]).rewards
    apart = parse_config(PPOConfig, ["--rewards", "{type: regex, pattern: x, weight: 2}", "math"]).rewards
    assert together == apart and [reward.type for reward in together] == ["regex", "math"]
    assert parse_config(PPOConfig, ["--rewards", "[]"]).rewards == []


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
    classes = [ALL_REWARDS] if config_class is PPOConfig else []
    for leaf in [*leaves(config_class).values(), *(leaf for kind in classes for leaf in kind)]:
        assert len(leaf.field.description or "") > 5, f"{leaf.path} has no help text"


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_help_shows_every_setting_and_ends_well(config_class, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(config_class, ["--help-all"], description="what it does")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "what it does" in text
    assert "--config FILE.yaml" in text
    assert [flag for flag in flags(leaves(config_class)).values() if f"--{flag} " not in text] == []


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_defaults_survive_the_parser(config_class):
    """What a config is without any flag is what its dataclass says."""
    assert parse_config(config_class, []) == config_class()


# --- words of YAML


@pytest.mark.parametrize(
    "word",
    ["off", "no", "yes", "on", "true", "null-ish", "1:30", "12:30:45", "1e-5", "1.10", "007", "0x1F", "0o17", "1_000"]
    + ["2024-01-31", "2024-01-31 10:00:00", "---x", "=", "y", "N", ".5", "-1", "1e5", ".inf", "@x", "a: b", "#x", "~x"],
)
def test_a_text_is_what_the_file_says(parse, word):
    """REPORT 26: as a plain word, in quotes, and in a list."""
    if word[0] not in "@#" and ": " not in word:
        assert parse(f"path: {word}\nnames: [{word}, x]\n") == Settings(path=home(word), names=[word, "x"])
    assert parse(f"path: '{word}'\nnames: ['{word}']\n") == Settings(path=home(word), names=[word])


def home(path: str) -> str:
    return os.path.expanduser(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: ['---']", dict(names=["---"])),
        ("names: [---x, -y, --count]", dict(names=["---x", "-y", "--count"])),
        ("weights: [1, -0.00005]", dict(weights=[1.0, -5e-5])),
        ("weights: [-1e-5, -.5, +3, 1E2]", dict(weights=[-1e-5, -0.5, 3.0, 100.0])),
        ("display: off", dict(display="off")),
        ("display: on", dict(display="on")),
        ("shuffle: off", dict(shuffle=False)),
        ("rate: 1e-5", dict(rate=1e-5)),
        ("rate: 1E+3", dict(rate=1000.0)),
        ("rate: -.25e-3", dict(rate=-0.00025)),
        ("count: 010", dict(count=10)),
        ("count: '12'", dict(count=12)),
        ("count: -3", dict(count=-3)),
        ("names: one", dict(names=["one"])),
        ("names:\n- a\n- no\n", dict(names=["a", "no"])),
        ("x: &x {rate: 0.25}\n<<: *x", None),
        ("<<: {rate: 0.25, count: 4}\nrate: 0.75", dict(rate=0.75, count=4)),
    ],
)
def test_words_mean_what_the_type_of_the_setting_says(parse, text, expected):
    """REPORT 26: `off` is no for a switch and a choice for a choice; numbers have signs and exponents."""
    if expected is None:
        with pytest.raises(UserError, match="unknown setting 'x'"):
            parse(text)
    else:
        assert parse(text) == Settings(**expected)


@pytest.mark.parametrize(
    ("word", "value"),
    [("no", "no"), ("off", "off"), ("false", False), ("True", True), ("1:30", "1:30"), ("1e-5", 1e-5), ("0x1F", 31)]
    + [("0o17", 15), ("010", 10), ("null", None), ("~", None), ("1_000", "1_000"), ("'1'", "1"), (".5", 0.5)]
    + [("2024-01-31", "2024-01-31"), ("-.inf", float("-inf")), ("[no, 1]", ["no", 1]), ("{a: true}", {"a": True})],
)
def test_the_words_of_a_mapping_are_those_of_yaml_1_2(parse, word, value):
    """REPORT 26: whose core schema knows true and false, numbers without colons, and null."""
    assert parse(f"extra: {{x: {word}}}\n").extra == {"x": value}


def test_a_mapping_is_yaml_as_a_flag(parse):
    assert parse(None, "--extra", "{a: 1, b: off, c: {d: [1e-3]}}").extra == {"a": 1, "b": "off", "c": {"d": [0.001]}}
    with pytest.raises(UserError, match="--extra is 'text'; it takes a mapping"):
        parse(None, "--extra", "text")
    with pytest.raises(UserError, match="--extra is not YAML"):
        parse(None, "--extra", "{a: ")


@pytest.mark.parametrize("text", ["rate: 1\nrate: 2\n", "rate: 1\n'rate': 2\n", "extra:\n  a: 1\n  b: 1\n  a: 2\n"])
def test_a_key_given_twice_is_refused_with_its_line(parse, text):
    """REPORT 26: the first would be dropped in silence."""
    line = len(text.splitlines())
    with pytest.raises(UserError, match=rf"line {line}\): '(rate|a)' is given twice"):
        parse(text)


def test_negative_numbers_with_exponents_are_no_flags(parse):
    """REPORT 26: on the command line too."""
    assert parse(None, "--weights", "1", "-5e-05", "-.5", "--rate", "-1e-3").weights == [1.0, -5e-5, -0.5]


def test_home_folders_are_written_out(parse, monkeypatch):
    """REPORT 26: in files, flags and Python, single paths and lists; other texts keep their tilde."""
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = dict(path="/home/somebody/a b", folders=["/home/somebody/x", "y/~"], names=["~/z"])
    text = "path: ~/a b\nfolders: [~/x, y/~]\nnames: [~/z]\n"
    for config in (parse(text), parse(None, "--path=~/a b", "--folders", "~/x", "y/~", "--names", "~/z")):
        assert asdict(config).items() >= expected.items()
    ours = configure(
        SFTConfig, output_dir="~/run", model="~/model", train_data=["~/a.jsonl"], cache_dir="~/cache", stop=["~/"]
    )
    assert (ours.output_dir, ours.model.path) == ("/home/somebody/run", "/home/somebody/model")
    assert (ours.data.train_data, ours.data.cache_dir) == (["/home/somebody/a.jsonl"], "/home/somebody/cache")
    assert ours.generation.stop == ["~/"]


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_every_setting_that_sounds_like_a_path_is_one(config_class):
    """REPORT 26: or a folder named ~ would appear."""
    words = ("dir", "data", "path", "_model", "tokenizer", "template", "schema", "evaluators", "resume")
    found = [*leaves(config_class).values(), *(ALL_REWARDS if config_class is PPOConfig else [])]
    names = {leaf.path for leaf in found if leaf.path.endswith(words)} - {"classifier.template"}
    assert {leaf.path for leaf in found if path_kind(leaf.field)} >= names


ALL_REWARDS = [
    Leaf(f"{types_of(kind)[0]}.{name}", field)
    for kind in entry_classes(PPOConfig.__pydantic_fields__["rewards"].annotation)
    for name, field in kind.__pydantic_fields__.items()
]
APPLICATIONS = {
    "colossal_llama.extend_tokenizer.ExtendConfig": ("tokenizer", "output", "pieces"),
    "colossal_llama.init_model.InitConfig": ("model", "tokenizer", "output", "old_tokenizer"),
    "colossal_llama.prepare_pretrain.PrepareConfig": ("data", "tokenizer", "output"),
    "colossal_llama.tokenizer_report.ReportConfig": ("output", "base"),
    "colossal_llama.pretraining.stage_settings.PretrainConfig": ("model", "output_dir"),
    "colossal_eval.evaluate.EvaluateConfig": ("data", "output"),
    "colossal_eval.answer.AnswerConfig": ("model", "output"),
    "colossal_eval.judge.JudgeConfig": ("output", "references"),
    "colossal_eval.prepare.PrepareConfig": ("data", "output"),
}


@pytest.mark.parametrize("place", APPLICATIONS)
def test_home_folders_are_written_out_in_the_applications_too(place):
    """REPORT 26."""
    module, _, name = place.rpartition(".")
    names = APPLICATIONS[place]
    flags = [word for name in names for word in (f"--{name}", "~/x")]
    config = parse_config(getattr(importlib.import_module(module), name), flags)
    values = [value_at(config, paths_named(name, leaves(type(config)))[0]) for name in names]
    assert [value for value in values if value not in (home("~/x"), [home("~/x")])] == []


# --- numbers that make sense

NUMBERS = [
    (SFTConfig, "learning_rate", [-1e-3, float("nan"), float("inf")], [0.0, 1.0]),
    (SFTConfig, "steps", [-1], [0, 10**9]),
    (SFTConfig, "epochs", [0.0, -1.0], [0.01]),
    (SFTConfig, "lora_rank", [-1], [0, 8]),
    (SFTConfig, "lora_alpha", [0.0], [16.0]),
    (SFTConfig, "lora_dropout", [-0.1, 1.0], [0.0, 0.5]),
    (SFTConfig, "warmup", [2.0, -0.1], [0.0, 1.0]),
    (SFTConfig, "final_rate", [1.1], [0.0, 1.0]),
    (SFTConfig, "weight_decay", [-0.1], [0.0]),
    (SFTConfig, "adam_beta1", [-0.1, 1.0], [0.0, 0.9]),
    (SFTConfig, "adam_beta2", [-0.1, 1.0], [0.0, 0.999]),
    (SFTConfig, "max_grad_norm", [-1.0], [0.0]),
    (SFTConfig, "seed", [-1, 2**32], [0, 2**32 - 1]),
    (SFTConfig, "samples", [-1], [0]),
    (SFTConfig, "batch_size", [0, -8], [1]),
    (SFTConfig, "micro_batch_size", [0], [1]),
    (SFTConfig, "max_tokens_per_batch", [0], [None, 10**6]),
    (SFTConfig, "eval_every", [-1], [0]),
    (SFTConfig, "save_every", [-1], [0]),
    (SFTConfig, "log_every", [0], [1]),
    (SFTConfig, "keep_checkpoints", [0], [1]),
    (SFTConfig, "max_length", [0], [1]),
    (SFTConfig, "max_prompt_length", [0], [1]),
    (SFTConfig, "tensor_parallel", [0], [1]),
    (SFTConfig, "offload_parameter_fraction", [1.5], [0.0, 1.0]),
    (SFTConfig, "temperature", [-1.0], [0.0, 2.0]),
    (SFTConfig, "top_k", [-1], [0]),
    (SFTConfig, "top_p", [0.0, 1.5], [0.1, 1.0]),
    (SFTConfig, "min_p", [2.0, -0.1], [0.0, 1.0]),
    (SFTConfig, "max_new_tokens", [0], [1]),
    (SFTConfig, "min_new_tokens", [-1], [0]),
    (SFTConfig, "repetition_penalty", [0.0], [1.0]),
    (SFTConfig, "num_beams", [0], [1]),
    (RewardConfig, "label_smoothing", [-0.1, 1.0], [0.0]),
    (RewardConfig, "centering", [-1.0], [0.0]),
    (PreferenceConfig, "beta", [0.0, -1.0], [0.1]),
    (PreferenceConfig, "nll_coefficient", [-1.0], [0.0]),
    (PPOConfig, "clip_low", [-1.0], [0.0, 1.0]),
    (PPOConfig, "clip_high", [-1.0], [0.0, 5.0]),
    (PPOConfig, "dual_clip", [1.0, -1.0], [None, 3.0]),
    (PPOConfig, "generation_batch_size", [0], [1]),
    (PPOConfig, "minibatches", [0], [1]),
    (PPOConfig, "ppo_epochs", [0], [1]),
    (PPOConfig, "kl_coefficient", [-0.1], [0.0]),
    (PPOConfig, "kl_target", [0.0], [None, 1.0]),
    (PPOConfig, "gamma", [1.1, -1.0], [0.0, 1.0]),
    (PPOConfig, "gae_lambda", [1.1], [0.0, 1.0]),
    (PPOConfig, "critic_learning_rate", [-1.0], [0.0]),
    (PPOConfig, "critic_warmup", [-1], [0]),
    (PPOConfig, "reward_timeout", [0.0], [0.5]),
    (PPOConfig, "reward_failure_score", [float("nan"), float("inf")], [-1.0]),
    (GRPOConfig, "group_size", [0], [2]),
    (GRPOConfig, "cap", [0.5], [1.0]),
    (GRPOConfig, "reject_below", [-0.1, 1.1], [0.0, 1.0]),
    (GRPOConfig, "reject_above", [0.9], [1.0]),
    (GRPOConfig, "off_policy_bound", [-1.0], [None, 0.0]),
    (GRPOConfig, "overlong_buffer", [-1], [0]),
]


@pytest.mark.parametrize(("config_class", "name", "wrong", "right"), NUMBERS, ids=[row[1] for row in NUMBERS])
def test_numbers_without_sense_are_refused_by_name_and_range(config_class, name, wrong, right):
    """REPORT 27: in Python and as flags; the bounds themselves are right where the range says so."""
    for value in wrong:
        with pytest.raises(UserError, match=rf"{name} is .*: it must be (at least|above|at most|below|finite)"):
            configure(config_class, **{name: value})
        with pytest.raises(UserError, match=f"--{name} is .*: it must be"):
            parse_config(config_class, [f"--{name}", str(value)])
    [path] = paths_named(name, leaves(config_class))
    for value in right:
        assert value_at(configure(config_class, **{name: value}), path) == value


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_every_number_has_a_range_unless_any_will_do(config_class):
    """REPORT 27."""
    free = {"reward_failure_score", "entropy_coefficient", "weight", "lowest_score", "highest_score"}
    found = [*leaves(config_class).values(), *(ALL_REWARDS if config_class is PPOConfig else [])]
    numbers = {leaf.path.rpartition(".")[2]: leaf for leaf in found if {int, float} & {*leaf.kinds}}
    assert {name for name, leaf in numbers.items() if not range_of(leaf.field)} <= free


def test_all_problems_are_named_at_once(parse):
    """REPORT 27: those of words and names, then those of numbers."""
    with pytest.raises(UserError) as error:
        parse("rat: 1\ncount: many\nkind: k3\nextra: [1]\nshare: 1\nshares: [0.5, 0, 2]\n", "--rate", "nan")
    problems = ("unknown setting 'rat'", "count is 'many'", "kind is 'k3'", "extra is a list", "--rate is 'nan'")
    problems += ("share is '1': it must be below 1", "shares[1] is '0': it must be above 0", "shares[2] is '2'")
    assert [problem for problem in problems if problem not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_contradictions_of_all_sections_are_named_at_once():
    with pytest.raises(UserError) as error:
        configure(PPOConfig, temperature=0.0, top_k=5, ptx_coefficient=1.0, train_weights=[1.0, 2.0])
    assert all(
        words in str(error.value) for words in ("temperature 0 is greedy", "ptx_data and", "train_weights has 2")
    )


def test_choices_are_those_of_the_losses():
    """Settings load without torch, so they name the choices themselves."""
    hints = get_type_hints(GRPO)
    assert hints["advantage"] == group.Advantage and hints["aggregation"] == group.Aggregation
    assert hints["policy_loss"] == policy.PolicyLoss
    of_correction = get_type_hints(hints["correction"])
    assert of_correction["reject"] == correction.Level
    assert get_args(of_correction["weights"]) == ("auto", *get_args(correction.Level))
    methods = section_classes(PreferenceConfig.__pydantic_fields__["algorithm"].annotation)
    assert {types_of(kind)[0] for kind in methods} == {*preference.PREFERENCE_LOSSES, "kto"}


# --- sections


def test_sections_lists_and_types(tmp_path):
    path = tmp_path / "dapo.yaml"
    path.write_text(
        "model: some/model\n"
        "algorithm: {type: dapo, clip_high: 0.3}\n"
        "optimizer:\n  learning_rate: 1e-4\n  warmup:\n"
        "rewards: [math, {type: regex, pattern: 'x: \\d', weight: .5}, {type: regex, pattern: y, name: y}]\n"
    )
    config = parse_config(GRPOConfig, ["--config", str(path), "--algorithm.group_size", "4", "--optimizer.warmup=0.5"])
    assert isinstance(config.algorithm, DAPO) and config.algorithm.dynamic_sampling
    assert (config.algorithm.clip_high, config.algorithm.group_size) == (0.3, 4)
    assert (config.optimizer.learning_rate, config.optimizer.warmup, config.model.path) == (1e-4, 0.5, "some/model")
    assert [(r.type, r.weight, r.name) for r in config.rewards] == [
        ("math", 1.0, None),
        ("regex", 0.5, None),
        ("regex", 1.0, "y"),
    ]
    assert config.rewards[1].pattern == r"x: \d"


def test_another_type_leaves_the_defaults_of_the_first_behind(tmp_path):
    path = tmp_path / "gspo.yaml"
    path.write_text("algorithm: {type: gspo, group_size: 4}\n")
    config = parse_config(GRPOConfig, ["--config", str(path)], defaults={"algorithm": {"type": "dapo"}})
    assert config == configure(GRPOConfig, algorithm="gspo", group_size=4)
    config = parse_config(GRPOConfig, ["--config", str(path), "--algorithm", "rloo"])
    assert config == configure(GRPOConfig, algorithm="rloo")


def test_rewards_as_flags():
    flags = ["--rewards", "math", "{type: regex, pattern: 'a, b', weight: -0.5}"]
    config = parse_config(GRPOConfig, flags)
    assert [(r.type, r.weight) for r in config.rewards] == [("math", 1.0), ("regex", -0.5)]
    assert config.rewards[1].pattern == "a, b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 1\n", "unknown setting 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ("optimizer: {learning_rat: 1}\n", "'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'?"),
        ("optimizer: 1e-5\n", "optimizer.learning_rate"),
        ("optimizer: [1]\n", "optimizer is a list; it takes settings of its own"),
        ("algorithm: {type: grppo}\n", "algorithm: there is no type 'grppo'; it is one of grpo, dr-grpo"),
        ("algorithm: {type: grpo, gamma: 1}\n", "unknown setting 'algorithm.gamma'"),
        ("rewards: [maths]\n", "rewards[0]: there is no type 'maths'"),
        ("rewards: [math, regex]\n", "rewards[1].pattern is missing"),
        ("rewards: [{weight: 1}]\n", "rewards[0] has no type"),
        ("rewards: [{type: math, answer_colum: x}]\n", "unknown setting 'rewards[0].answer_colum'"),
        ("algorithm: {clip_low: -1}\n", "algorithm.clip_low is '-1': it must be at least 0"),
    ],
)
def test_mistakes_in_sections_are_named_by_their_path(tmp_path, text, says):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    if says == "optimizer.learning_rate":  # a section may be its first setting
        assert parse_config(GRPOConfig, ["--config", str(path)]).optimizer.learning_rate == 1e-5
        return
    with pytest.raises(UserError) as error:
        parse_config(GRPOConfig, ["--config", str(path)])
    assert says in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda c: c.__name__)
def test_every_flag_means_one_setting(config_class):
    """A flag may leave out the section, for its last part is no other setting's."""
    found = leaves(config_class)
    names = flags(found)
    assert len({*names.values()}) == len(names)
    for path, name in names.items():
        assert paths_named(name, found) == paths_named(path, found) == [path]
        assert "." not in name


def test_settings_by_path_keep_mappings_and_lists_whole():
    config = configure(GRPOConfig, chat_template_kwargs={"a": {"b": 1}}, rewards=["math"], algorithm="dapo")
    found = by_path(config)
    assert found["data.chat_template_kwargs"] == {"a": {"b": 1}} and found["algorithm.type"] == "dapo"
    assert [reward["type"] for reward in found["rewards"]] == ["math"]
    assert found.keys() == leaves(GRPOConfig, "dapo").keys()


def test_a_copy_with_other_settings_keeps_the_rest():
    config = configure(GRPOConfig, algorithm="dapo", clip_high=0.4, rewards=["math"], temperature=0.7)
    other = reconfigure(config, temperature=0.9, model="x")
    assert (other.generation.temperature, other.model.path) == (0.9, "x")
    assert other.algorithm == config.algorithm and other.rewards == config.rewards
    assert config.generation.temperature == 0.7
    with pytest.raises(UserError, match="unknown setting 'temperatur'"):
        reconfigure(config, temperatur=1)


# --- how soon

SCRIPTS = ["examples/train_sft.py", "examples/train_rm.py", "examples/train_preference.py", "examples/train_ppo.py"]
SCRIPTS += ["examples/train_grpo.py", "applications/colossal_llama/train.py"]
WITHOUT = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers", "colossalai", "datasets"), f"{name} is imported"
sys.meta_path.insert(0, Refuse())
sys.path[:0] = [".", "applications"]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script: str, *flags: str) -> subprocess.CompletedProcess:
    """Runs a script that can't import what takes seconds."""
    words = [sys.executable, "-c", WITHOUT, script, *flags]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_reported_before_anything_heavy_is_imported(script, tmp_path):
    """REPORT 31: a typing error in the file, a number out of range, and a data file that isn't there."""
    stage = "stages: [{name: one}]\n" if "llama" in script else ""
    cases = {
        "learning_rat: 1\n": "unknown setting 'learning_rat'; did you mean 'optimizer.learning_rate'?",
        "steps: -1\n": "steps is '-1': it must be at least 0",
        "data: {train_data: [missing/rows.jsonl]}\n": "missing/rows.jsonl does not exist",
    }
    for text, message in cases.items():
        (tmp_path / "run.yaml").write_text(stage + text)
        ended = start(script, "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"))
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
        assert message in ended.stderr
        assert not (tmp_path / "run").exists()


MISSING = {
    "train_data": "missing.jsonl",
    "eval_data": "./missing/folder",
    "model": "missing/model/folder",
    "tokenizer": "/missing/tokenizer",
    "model_config": "./config.json",
    "chat_template": "missing.jinja",
    "resume": "missing/checkpoint",
    "evaluators": "missing/file.py:count",
    "ptx_data": "missing.parquet",
    "critic_model": "~/missing",
}


def test_every_missing_path_is_named_at_once(tmp_path):
    """REPORT 31: before anything is loaded; names on the hub and modules are left to those who load them."""
    flags = [word for name, path in MISSING.items() for word in (f"--{name}", path)]
    rewards = ["model, path: ../missing", "function, path: missing.py:reward", "classifier, path: /missing"]
    flags += ["--rewards", *(f"{{type: {reward}}}" for reward in rewards), "{type: json, json_schema: schema.json}"]
    ended = start("examples/train_ppo.py", *flags, "--ptx_coefficient", "1", "--output_dir", str(tmp_path / "run"))
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert [name for name in MISSING if not re.search(rf"\b(model\.path|{name}) ", ended.stderr)] == []
    assert ended.stderr.count("rewards.path") == 3 and "rewards.json_schema schema.json" in ended.stderr
    hub = ["--model", "owner/name", "--rewards", "{type: function, path: package.module:function}"]
    hub += ["--train_data", "owner/name:test"]
    ended = start("examples/train_ppo.py", *hub, "--output_dir", str(tmp_path / "run"))
    assert "torch is imported" in ended.stderr  # the settings were right


def test_a_plan_is_refused_as_quickly():
    """REPORT 31."""
    ended = start("coati/cli.py", "plan", "sft", "--learning-rat", "1")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "--learning-rat" in ended.stderr
