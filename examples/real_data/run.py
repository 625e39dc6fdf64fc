"""SFT, reward models, DPO, KTO and PPO on real data with a small model from random weights: T0 tasks, Self-Instruct,
HH-RLHF and GSM8K model solutions, as they lie in a data folder (see ../shared/data). About half an hour on 2 cores.

    python examples/real_data/run.py --data ../shared/data

Writes runs/real_data/ and the table in docs/real-data.md. The point is that the pipeline is sound on real text; a model
of 3 M parameters that has read 5 MB writes no sense.
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from coati.tracking import read_metrics, write_report  # noqa: E402
from examples.stages import fill_figures, train  # noqa: E402

STAGES = ("sft", "reward_gsm8k", "reward_hh", "preference_hh", "preference_kto_hh", "ppo_hh")
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the data folder")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "real_data", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    arguments = parser.parse_args()
    if not (arguments.data / "hh_rlhf").is_dir():
        sys.exit(f"error: {arguments.data} has no hh_rlhf folder: name the data folder with --data")
    data, output, started = arguments.data.resolve(), arguments.output.resolve(), time.monotonic()
    prepare(data, output)
    common = {"cache_dir": output / "cache"}

    def stage(name: str, algorithm: str, **flags):
        train(algorithm, HERE / f"{name}.yaml", output / name, common | flags, arguments.processes)

    tasks = [data / "t0_sft" / "train.jsonl", data / "self_instruct" / "seed_tasks.jsonl"]
    tasks += [data / "gsm8k" / "train.jsonl", output / "hh_answers.jsonl"]
    stage("sft", "sft", train_data=tasks, eval_data=data / "t0_sft" / "test.jsonl", tokenizer=output / "tokenizer")
    common["model"] = output / "sft" / "model"
    pairs = {"train_data": output / "gsm8k_train.jsonl", "eval_data": output / "gsm8k_test.jsonl"}
    stage("reward_gsm8k", "reward", **pairs)
    pairs = {"train_data": data / "hh_rlhf" / "train.jsonl", "eval_data": data / "hh_rlhf" / "test.jsonl"}
    stage("reward_hh", "reward", **pairs)
    stage("preference_hh", "preference", **pairs)
    stage("preference_kto_hh", "preference", **pairs)
    scorer = {"type": "model", "path": str(output / "reward_hh" / "model")}
    stage("ppo_hh", "ppo", rewards=[scorer], **pairs)
    write_report([output], output / "report.html")
    write_table(output, time.monotonic() - started)


def prepare(data: Path, output: Path):
    """A tokenizer trained on the SFT and dialogue text, and pairs of right and wrong GSM8K solutions."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "tokenizer").is_dir():
        texts = [row["prompt"] + "\n" + row["completion"] for row in read(data / "t0_sft" / "train.jsonl")]
        texts += [row["chosen"] for row in read(data / "hh_rlhf" / "train.jsonl")]
        texts += [row["question"] + row["answer"] for row in read(data / "gsm8k" / "train.jsonl")[:2000]]
        train_tokenizer(texts).save_pretrained(output / "tokenizer")
    solutions = read(data / "gsm8k" / "model_solutions.jsonl")
    # the better answers of the dialogues are demonstrations too
    dialogues = [row["chosen"].rpartition("\n\nAssistant:") for row in read(data / "hh_rlhf" / "train.jsonl")]
    lines = [json.dumps({"prompt": a + b, "completion": c.strip()}) + "\n" for a, b, c in dialogues if c.strip()]
    (output / "hh_answers.jsonl").write_text("".join(lines))
    # questions, not pairs, are split: no test question was trained on
    for name, rows in (("train", solutions[:800]), ("test", solutions[800:])):
        lines = [json.dumps(pair) + "\n" for row in rows for pair in pairs_of(row)]
        (output / f"gsm8k_{name}.jsonl").write_text("".join(lines))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs_of(row: dict) -> list[dict]:
    """Every right solution of a question against every wrong one."""
    solutions = [value for value in row.values() if isinstance(value, dict)]
    right = [s["solution"] for s in solutions if s["is_correct"]]
    wrong = [s["solution"] for s in solutions if not s["is_correct"]]
    return [{"prompt": row["question"], "chosen": r, "rejected": w} for r in right for w in wrong if r != w]


def train_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = dict(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=list(SPECIAL.values()), **settings))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL)


def write_table(output: Path, seconds: float):
    """The figures, into docs/real-data.md."""
    rows = {name: read_metrics(output / name) for name in STAGES}

    def ends(name: str, metric: str) -> tuple[float, float]:
        values = [row[metric] for row in rows[name] if metric in row]
        return values[0], values[-1]

    lines = [
        f"`python examples/real_data/run.py` on 2 processes (ZeRO-2, fp32, CPU), {seconds / 60:.0f} minutes.",
        "",
        "| stage | figure | before | after |",
        "|---|---|---|---|",
        "| SFT | held-out loss, nats per token | {:.3f} | {:.3f} |".format(*ends("sft", "eval/loss")),
    ]
    titles = {"reward_gsm8k": "reward model, GSM8K solutions", "reward_hh": "reward model, HH-RLHF"}
    for name, title in (titles | {"preference_hh": "DPO, HH-RLHF"}).items():
        (first, last), (_, low), (_, high) = (
            ends(name, f"eval/{m}") for m in ("accuracy", "accuracy_low", "accuracy_high")
        )
        pairs = ends(name, "eval/pairs")[1]
        interval = f"{last:.3f} (95 %: {low:.3f} to {high:.3f}, {pairs:.0f} pairs)"
        lines.append(f"| {title} | held-out accuracy | {first:.3f} | {interval} |")
    kto = "| KTO, HH-RLHF | held-out margin, good answers' rewards less bad ones' | {:.3f} | {:.3f} |"
    lines.append(kto.format(*ends("preference_kto_hh", "eval/margin")))
    lines.append(
        "| PPO, HH-RLHF prompts | reward, held-out prompts | {:.3f} | {:.3f} |".format(*ends("ppo_hh", "eval/reward"))
    )
    kl = [row["kl"] for row in rows["ppo_hh"] if "kl" in row]
    lines.append(f"| | KL to the SFT model, nats per response | {kl[0]:.2f} | {kl[-1]:.2f} (most: {max(kl):.2f}) |")
    fill_figures(ROOT / "docs" / "real-data.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
