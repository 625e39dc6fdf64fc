"""The README's commands, in their order, on a tiny model and a few texts."""

import importlib
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from colossal_llama.pretraining.pretrain_trainer import PretrainConfig, StagedPretraining
from colossal_llama.pretraining.stage_plan import parse_stages
from tests.conftest import ROOT, sentence

README = ROOT / "applications" / "colossal_llama" / "README.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SMALL = "--steps 1 --batch_size 2 --micro_batch_size 2 --eval_every 0 --save_every 0 --progress off"
HAN = "天地人你我他山水日月大小上下中国学生"


def write(path, texts, category):
    rows = [json.dumps({"text": text, "category": category}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tiny_world, tmp_path_factory):
    """MODEL and texts, as the README calls them."""
    from shutil import copytree

    folder = tmp_path_factory.mktemp("readme")
    copytree(tiny_world["policy"], folder / "MODEL")
    random = np.random.default_rng(0)
    chinese = ["".join(random.choice(list(HAN), 30)) + "。" for _ in range(40)]
    english = [sentence(i, 12) for i in range(40)]
    for name, start, end in (("", 0, 30), ("_eval", 30, 40)):
        write(folder / f"zh{name}.jsonl", chinese[start:end], "zh")
        write(folder / f"en{name}.jsonl", english[start:end], "en")
    return folder


def test_every_command_runs(place, runtime, monkeypatch, capsys):
    monkeypatch.chdir(place)
    config = str(ROOT / "applications" / "colossal_llama" / "stages.yaml")
    for command in COMMANDS:
        words = shlex.split(command)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, arguments = words[script].rsplit("/", 1)[1].removesuffix(".py"), words[script + 1 :]
        if name in ("run", "real_tokenizers"):  # the example has a test of its own; the other needs a network
            continue
        if name == "train":
            arguments[arguments.index("--config") + 1] = config
            plan = parse_stages(PretrainConfig, "", [*arguments, *SMALL.split()])
            assert [stage.tracking.run_name for stage in plan.stages] == ["warm-up", "knowledge", "replay"]
            StagedPretraining(plan, runtime).train()
        else:
            assert importlib.import_module(f"colossal_llama.{name}").main(arguments) == 0, command
    model = json.loads((place / "runs" / "zh" / "train" / "3-replay" / "model" / "config.json").read_text())
    assert model["vocab_size"] > 320
    assert (place / "runs" / "zh" / "report" / "report.md").is_file()
    assert "北京是" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.distributed
def test_the_example_runs(tmp_path):
    """With a hundredth of its training, in one of its four ways."""
    (tmp_path / "text").mkdir()
    random = np.random.default_rng(0)
    for language, texts in (
        ("zh", ["".join(random.choice(list(HAN), 300)) for _ in range(60)]),
        ("en", [sentence(i, 120) for i in range(60)]),
    ):
        rows = [json.dumps({"source": "", "target": text}) + "\n" for text in texts]
        (tmp_path / "text" / f"{language}_a.jsonl").write_text("".join(rows))
    script = ROOT / "applications" / "colossal_llama" / "example" / "run.py"
    words = ["--text", str(tmp_path / "text"), "--output", str(tmp_path / "out"), "--tokens", "0.05"]
    words += ["--arms", "mean-initialized", "no extension"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "| mean-initialized |" in (tmp_path / "out" / "figures.md").read_text()
    assert (tmp_path / "out" / "curves.svg").read_text().startswith("<svg")
