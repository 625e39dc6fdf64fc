"""Training: coati beside TRL and a plain PyTorch loop.

    python benchmarks/training.py                  # all cases; one JSON line
    python benchmarks/training.py --save training  # and writes benchmarks/results/training.json
    python benchmarks/training.py --cases sft-log-normal --rounds 1

TRL works in environments of its own, which `make trl` makes; without them it is left out. Everyone has the same model
(a random Llama of 5.8 M parameters), rows of the same tokens, and steps of as many of them, in fp32.

    sft-fixed, sft-log-normal          32 rows per step: of 256 tokens, of 32 to 512 (TRL padded, grouped, packed)
    reward-fixed, reward-log-normal    8 pairs a step: of 256 tokens, of up to 512
    reward-prompts                     as reward-fixed, but 70 % of a row is its prompt, as in HH-RLHF (`share_prompts`)
    ppo-fixed, ppo-shared              16 prompts of 32 tokens, responses of exactly 64, 4 epochs; separate critic, or
                                       one trunk for policy and value (ours; TRL has two)
    ppo-log-normal                     64 prompts, responses of up to 256, 1 epoch
                                       (with `compile_generation` where there is g++, compiled before the clock runs)
    dpo-fixed, dpo-log-normal          as reward models, with the reference's log-probs computed before the clock runs
    dpo-vocabulary                     as dpo-fixed, with a vocabulary of 32,768
    dpo-prompts                        as dpo-fixed, with the prompts of reward-prompts
    grpo-fixed, grpo-log-normal        responses as PPO's, four per prompt, 1 epoch, no reference
    ranks                              reward-fixed under ZeRO-2: 2 processes of 1 thread, 1 of 2, 1 of 1
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import Contender, contest, machine, ratio, serve, store
from benchmarks.generation import MODEL, log_normal
from benchmarks.world import PLAIN, REWARD, words, write_models, write_rows

ROOT = Path(__file__).resolve().parents[1]
LATEST = ROOT / ".venv-trl-1.16/bin/python"
LAST_PPO = ROOT / ".venv-trl/bin/python"
DATA_ROWS = 512
GROUP = 4
# the column of lengths has to be there when the sampler asks for it
GROUPED_PAIRS = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
PARTS = ("generate", "score", "evaluate", "learn")  # of an iteration


@dataclass(frozen=True)
class Case:
    """A workload.

    Attributes:
        flags: of coati's training script, beside the common ones.
        peers: by name, TRL's settings.
        steps: optimizer steps (PPO: iterations) of a turn.
        lengths: tokens of each row; of PPO and GRPO, of each response.
        prompt: tokens of a row that are its prompt, but for PPO and GRPO.
        model: changes of the Llama's configuration.
        loop: a plain PyTorch loop takes part.
    """

    algorithm: str
    batch_size: int
    micro_batch_size: int
    steps: int
    lengths: list[int]
    flags: dict = field(default_factory=dict)
    peers: dict[str, dict] = field(default_factory=dict)
    loop: bool = False
    prompt: int = 1
    model: dict = field(default_factory=dict)

    @property
    def rolls_out(self) -> bool:
        return self.algorithm in ("ppo", "grpo")


def cases() -> dict[str, Case]:
    padded, packed = {"TRL, padded": {}}, {"TRL, packed": {"packing": True, "packing_strategy": "bfd"}}
    grouped = {"TRL, grouped": {"train_sampling_strategy": "group_by_length"}}
    pairs_grouped = {"TRL, grouped": GROUPED_PAIRS}
    uneven = np.clip(log_normal(DATA_ROWS, 130, 0.8), 32, 512).tolist()
    responses = np.clip(log_normal(64, 58, 0.8), 1, 256).tolist()
    budget, cached = {"max_tokens_per_batch": 1024}, {"cache_reference": True}
    even = [256] * DATA_ROWS
    ppo = {"compile_generation": bool(shutil.which("g++"))}
    trl = {"TRL": {}}
    return {
        "sft-fixed": Case("sft", 32, 8, 2, even, {}, padded, loop=True),
        "sft-log-normal": Case("sft", 32, 8, 4, uneven, budget, padded | grouped | packed),
        "reward-fixed": Case("reward", 8, 8, 4, even, {}, trl, loop=True),
        "reward-log-normal": Case("reward", 8, 8, 8, uneven, budget, trl | pairs_grouped),
        "reward-prompts": Case("reward", 8, 8, 4, even, {"share_prompts": True}, trl, prompt=180),
        "ranks": Case("reward", 8, 8, 4, even, {"plugin": "zero2"}),
        "ppo-fixed": Case("ppo", 16, 16, 1, [64] * 16, ppo | {"ppo_epochs": 4}, trl),
        "ppo-shared": Case("ppo", 16, 16, 1, [64] * 16, ppo | {"ppo_epochs": 4, "shared_trunk": True}, trl),
        "ppo-log-normal": Case(
            "ppo",
            64,
            16,
            1,
            responses,
            ppo | {"max_tokens_per_batch": 1024},
            trl,
        ),
        "dpo-fixed": Case("preference", 8, 8, 4, even, cached, trl),
        # few rows: TRL takes minutes for the reference's log-probs of all
        "dpo-vocabulary": Case("preference", 8, 8, 2, [256] * 64, cached, trl, model={"vocab_size": 2**15}),
        "dpo-prompts": Case("preference", 8, 8, 4, even, cached | {"share_prompts": True}, trl, prompt=180),
        "dpo-log-normal": Case("preference", 8, 8, 8, uneven, budget | cached, trl | pairs_grouped),
        "grpo-fixed": Case("grpo", 16, 16, 2, [64] * 16, ppo, trl),
        "grpo-log-normal": Case("grpo", 64, 16, 1, responses, ppo | {"max_tokens_per_batch": 1024}, trl),
    }


def prepare_coati(settings: dict):
    """Steps of coati's real trainer."""
    from coati.config import parse_config
    from coati.parallel import launch
    from coati.rollout import RolloutEngine
    from coati.trainers.grpo import GRPOConfig, GRPOTrainer
    from coati.trainers.ppo import PPOConfig, PPOTrainer
    from coati.trainers.preference import PreferenceConfig, preference_trainer
    from coati.trainers.reward import RewardConfig, RewardTrainer
    from coati.trainers.sft import SFTConfig, SFTTrainer

    runtime = launch()
    algorithm, limits = settings["algorithm"], settings["limits"]
    classes = {"sft": (SFTConfig, SFTTrainer), "reward": (RewardConfig, RewardTrainer), "ppo": (PPOConfig, PPOTrainer)}
    classes |= {"preference": (PreferenceConfig, preference_trainer), "grpo": (GRPOConfig, GRPOTrainer)}
    config_class, trainer_class = classes[algorithm]
    config, rolls_out = parse_config(config_class, settings["flags"]), limits is not None
    if rolls_out:  # as far as its limit each, and not to an EOS
        generate = RolloutEngine.generate

        def limited(engine, requests, *rest):
            ends = zip(requests, limits, strict=True)
            return generate(engine, [replace(request, max_new_tokens=limit) for request, limit in ends], *rest)

        RolloutEngine.generate = limited
    trainer = trainer_class(config, runtime)

    def work() -> dict:
        tokens, parts = 0, Counter()
        for _ in range(settings["steps"]):
            metrics = trainer.step(trainer.steps_done)
            trainer.steps_done += 1
            tokens += metrics["tokens"]
            parts.update({f"seconds/{part}": metrics[f"seconds/{part}"] for part in PARTS} if rolls_out else {})
        samples = settings["batch_size"] * settings["steps"]
        return {"amount": samples if rolls_out else tokens, "parts": parts}

    def work_together() -> dict:
        runtime.communicator.broadcast("go")
        return work()

    while not runtime.is_main:
        work_together()
    return work if runtime.world_size == 1 else work_together


def write_data(case: Case, folder: Path) -> dict[str, str]:
    """The rows for coati as text and for TRL as the token ids that coati makes of them."""
    paths = {"coati": str(folder / "rows.jsonl"), "peers": str(folder / "rows.json")}
    bos, eos, overhead = 0, 1, 2 + case.prompt  # BOS and EOS, and the prompt's words
    ids = lambda text: [int(word[1:]) + 4 for word in text.split()]  # noqa: E731
    ours, theirs = [], []
    for i, length in enumerate([32] * max(64, case.batch_size) if case.rolls_out else case.lengths):
        if case.rolls_out:
            prompt = words(i, length - 1)
            ours.append({"prompt": prompt})
            theirs.append(prompt if case.algorithm == "grpo" else [bos, *ids(prompt)])
            continue
        prompt = words(i, case.prompt)
        answer, other = (words(i + k, length - overhead) for k in (1, 2))
        chosen, rejected = ([bos, *ids(prompt), *ids(text), eos] for text in (answer, other))
        if case.algorithm == "sft":
            ours.append({"prompt": prompt, "completion": answer})
            asked = 1 + case.prompt
            theirs.append({"input_ids": chosen, "completion_mask": [0] * asked + [1] * (length - asked)})
        else:
            ours.append({"prompt": prompt, "chosen": answer, "rejected": other})
            as_ids = {"chosen_ids": chosen, "rejected_ids": rejected}
            as_text = {"prompt": prompt, "chosen": f" {answer}", "rejected": f" {other}"}
            theirs.append((as_ids if case.algorithm == "reward" else as_text) | {"length": length})
    write_rows(Path(paths["coati"]), ours)
    Path(paths["peers"]).write_text(json.dumps(theirs))
    return paths


def coati_settings(case: Case, folder: Path, rows: str, changes: dict) -> dict:
    from coati.config import as_flags

    flags = dict(
        train_data=rows,
        model=str(folder / "policy"),
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        batch_size=case.batch_size,
        micro_batch_size=case.micro_batch_size,
        steps=100000,
        progress="off",
        learning_rate=1e-5,
        max_length=max(512, *case.lengths),
        plugin="ddp",
        precision="fp32",
    )
    if case.rolls_out:
        longest = max(case.lengths)
        flags |= dict(max_new_tokens=longest, min_new_tokens=longest, ppo_epochs=1, minibatches=1, max_prompt_length=64)
    if case.algorithm == "ppo":
        flags |= dict(rewards=[dict(type="model", path=str(folder / "scorer"))], critic_model=str(folder / "scorer"))
    if case.algorithm == "grpo":
        (folder / "reward.py").write_text(REWARD)
        flags |= dict(
            rewards=[dict(type="function", path=f"{folder}/reward.py:reward")], batch_size=case.batch_size // GROUP
        )
        flags |= dict(group_size=GROUP)
    flags |= case.flags | changes
    if flags.get("shared_trunk"):
        del flags["critic_model"]
    arguments = as_flags(flags)
    limits = case.lengths if case.rolls_out else None
    return dict(algorithm=case.algorithm, flags=arguments, steps=case.steps, batch_size=case.batch_size, limits=limits)


def contenders(case: Case, folder: Path, device: str = "cpu") -> list[Contender]:
    rows = write_data(case, folder)
    ours = Contender("coati", [sys.executable, __file__, "worker"], coati_settings(case, folder, rows["coati"], {}))
    if case.flags.get("plugin") == "zero2" and not case.loop:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *ours.command[1:]]
        settings = coati_settings(case, folder, rows["coati"], {"micro_batch_size": case.micro_batch_size // 2})
        return [
            Contender("coati", start, settings, threads=1),
            Contender("coati, 1 process", ours.command, ours.settings),
            Contender("coati, 1 thread", ours.command, ours.settings, threads=1),
        ]
    found = [ours]
    common = dict(folder=str(folder), rows=rows["peers"], steps=case.steps, batch_size=case.batch_size)
    common |= dict(micro_batch_size=case.micro_batch_size, max_length=max(case.lengths), algorithm=case.algorithm)
    common |= dict(group_size=GROUP, limits=case.lengths, ppo_epochs=case.flags.get("ppo_epochs", 1), device=device)
    python = LAST_PPO if case.algorithm == "ppo" else LATEST
    script = str(ROOT / "benchmarks/peers.py")
    if python.exists():
        for name, arguments in case.peers.items():
            found.append(
                Contender(name, [str(python), script], common | dict(peer=case.algorithm, arguments=arguments))
            )
    else:
        print(f"{python} is missing: TRL is left out (`make trl` makes it)", file=sys.stderr)
    if case.loop:
        found.append(Contender("plain loop", [sys.executable, script], common | dict(peer="loop")))
    return found


def run_case(case: Case, rounds: int, threads: int, model: dict, device: str = "cpu") -> dict:
    """With random Llamas of the case's shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "world"
        write_models(folder, MODEL | dict(max_position_embeddings=4096) | case.model | model, PLAIN)
        return compare(case, folder, rounds, threads, device)


def compare(case: Case, folder: Path, rounds: int, threads: int, device: str = "cpu") -> dict:
    """With the models of a folder. On a GPU the contenders work one after the other: each has it alone."""
    everyone = contenders(case, folder, device)
    found = {}
    for together in [everyone] if device == "cpu" else [[one] for one in everyone]:
        found |= contest(together, rounds=rounds, threads=threads)
    ours = found["coati"]
    ratios = {name: ratio(ours, other) for name, other in found.items() if name != "coati"}
    peak = {name: max(result["peak_mib"], 1.0) for name, result in found.items()}  # 0 where freed memory was enough
    memory = {name: peak["coati"] / peak[name] for name in found if name != "coati"}
    return {"ratios": ratios, "memory_ratios": memory, "contenders": found}


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "worker":
        return serve(prepare_coati)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(cases()), choices=list(cases()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=json.loads, default={}, help="changes of the Llama's configuration, as JSON")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    result = {
        "machine": machine(options.threads),
        "rounds": options.rounds,
        "model": MODEL | options.model,
        "cases": {},
    }
    for name in options.cases:
        found = result["cases"][name] = run_case(cases()[name], options.rounds, options.threads, options.model)
        print(name, {k: round(v, 2) for k, v in found["ratios"].items()}, file=sys.stderr, flush=True)
        if options.save:
            store(result, options.save, "cases")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
