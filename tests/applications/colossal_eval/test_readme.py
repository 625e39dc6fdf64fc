"""The README's commands, in their order, on tiny models, two subjects of MMLU and an endpoint of our own."""

import re
import shlex

import datasets

from coati.config import parse_config
from colossal_eval import answer, judge, prepare, report, reward_bench
from colossal_eval.benchmarks.prepared_folder import to_line
from colossal_eval.evaluate import EvaluateConfig, evaluate
from tests.applications.colossal_eval.conftest import make_mmlu, make_model
from tests.applications.colossal_eval.test_judge import QUESTIONS, Endpoint, fair
from tests.applications.colossal_eval.test_reward_bench import PAIRS, make_reward_model
from tests.conftest import ROOT

README = ROOT / "applications" / "colossal_eval" / "README.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS_OF = (prepare, report, answer, judge, reward_bench)
MAINS = {module.__name__.rsplit(".", 1)[1]: module.main for module in COMMANDS_OF}


def test_every_command_runs(runtime, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mmlu(tmp_path / "FOLDER")
    for name, seed in (("A", 1), ("B", 2)):
        make_model(tmp_path / name, seed)
    (tmp_path / "runs" / "eval" / "data" / "mt_bench" / "test").mkdir(parents=True)
    (tmp_path / "runs" / "eval" / "data" / "mt_bench" / "test" / "all.jsonl").write_text(
        "".join(map(to_line, QUESTIONS))
    )
    make_reward_model(tmp_path / "RM")
    datasets.Dataset.from_list(PAIRS).to_parquet(tmp_path / "filtered.parquet")
    server = Endpoint(lambda messages, _: fair(messages))
    for command in COMMANDS:
        words = shlex.split(command.replace("http://127.0.0.1:8000/v1", server.url))
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, arguments = words[script].rsplit("/", 1)[1].removesuffix(".py"), words[script + 1 :]
        if name == "evaluate":
            evaluate(parse_config(EvaluateConfig, arguments), runtime)
        else:
            assert MAINS[name](arguments) == 0, command
    server.shutdown()
    records = [tmp_path / "runs" / "eval" / out / "records" / "A" / "mmlu.jsonl" for out in ("out", "ranks")]
    assert records[0].read_bytes() == records[1].read_bytes()
    assert (tmp_path / "runs" / "eval" / "out" / "report.html").is_file()
    assert "| A | all | 3.00" in (tmp_path / "runs" / "eval" / "judge" / "report.md").read_text()
