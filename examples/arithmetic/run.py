"""Chain sums: a small model from random weights gets some of them right after a short SFT, and goes on to learn from
whether its responses are right, or from pairs of a right and a wrong one, on two CPU processes in minutes.

python examples/arithmetic/run.py                                   # data, SFT, GRPO
python examples/arithmetic/run.py --algorithms dapo dpo --seed 1    # a seed's data and SFT serve all its algorithms
python examples/arithmetic/run.py --algorithms all --seeds 3 --write_docs     # and table and plot of docs/grpo.md
python examples/arithmetic/run.py --algorithms newer --seeds 3 --write_docs arithmetic-newer     # its second ones
python examples/arithmetic/run.py --model_config examples/arithmetic/configs/experts.json --output runs/experts
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from results import summarize  # noqa: E402
from sums import make_data  # noqa: E402

from examples.rounds import PromptSet, ScoredPrompt, sample_responses  # noqa: E402
from examples.stages import train  # noqa: E402

# The config, and what an algorithm differs in from it, see docs/grpo.md and docs/preference.md.
ALGORITHMS = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("grpo", dict(advantage="dr_grpo", aggregation="constant")),
    "dapo": ("grpo", dict(aggregation="token", clip_high=0.28, dynamic_sampling=True, overlong_buffer=4)),
    "gspo": ("grpo", dict(policy_loss="gspo", clip_low=0.003, clip_high=0.004)),
    "sapo": ("grpo", dict(policy_loss="sapo")),
    "dppo": ("grpo", dict(policy_loss="dppo", aggregation="token", clip_low=0.15, clip_high=0.15)),
    "maxrl": ("grpo", dict(advantage="maxrl")),
    "cispo": ("grpo", dict(policy_loss="cispo", aggregation="token", clip_low=1.0, clip_high=1.0)),
    "rloo": ("grpo", dict(advantage="rloo", policy_loss="none", aggregation="constant")),
    "reinforce++": ("grpo", dict(advantage="reinforce++-baseline", aggregation="token")),
    "remax": ("grpo", dict(advantage="remax", group_size=1, batch_size=512, aggregation="token")),
    "ppo": ("ppo", {}),
    "sao": ("ppo", dict(algorithm="sao")),
    "bpco": ("ppo", dict(algorithm="bpco", critic_warmup=3)),
    "opd": ("distill", {}),  # from what `TEACHER` has made
    # without a likelihood term both responses of a pair become rarer, and fewer are right
    "dpo": ("preference", dict(nll_coefficient=1.0)),
    "simpo": ("preference", dict(algorithm="simpo", beta=2.0, gamma=1.0, nll_coefficient=1.0)),
    "orpo": ("preference", dict(algorithm="orpo", beta=1.0)),
    "kto": ("preference", dict(algorithm="kto", beta=0.5)),
}
NEWER = ["grpo", "ppo", "sapo", "dppo", "maxrl", "sao", "bpco", "opd"]  # those of 2026, beside two that came before
TEACHER = "grpo"
ENOUGH = 0.5  # accuracy at which SFT is left
PAIRED = 3000  # prompts that are sampled to make pairs
MODEL = HERE / "configs" / "model.json"
TRIES = 4  # responses to each held-out prompt


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", choices=[*ALGORITHMS, "all", "newer"], default=["grpo"])
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many times, each with another seed")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "arithmetic", help="where everything goes")
    parser.add_argument("--processes", type=int, default=2, help="processes on this machine")
    parser.add_argument("--model_config", type=Path, default=MODEL, help="of the model that starts at random")
    parser.add_argument(
        "--write_docs",
        nargs="?",
        const="arithmetic",
        choices=["arithmetic", "arithmetic-newer"],
        help="put table and plot into docs/ too, under this name",
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    several = {"all": list(ALGORITHMS), "newer": NEWER}
    chosen = [algorithm for name in arguments.algorithms for algorithm in several.get(name, [name])]
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        folder = output / f"seed{seed}"
        data = make_data(folder / "data", seed)
        start = supervise(folder, data, seed, arguments.processes, arguments.model_config.resolve())
        before = accuracy(start, data["prompts_eval"], seed, TRIES)
        for algorithm in chosen:
            if not (folder / algorithm / "summary.json").exists():
                learn(algorithm, start, before, folder, data, seed, arguments.processes)
    summarize(output, {name: script for name, (script, _) in ALGORITHMS.items()}, write_docs=arguments.write_docs)


def supervise(folder: Path, data: dict[str, Path], seed: int, processes: int, model_config: Path = MODEL) -> Path:
    """Trains on right responses, and returns the first checkpoint that is right often enough."""
    flags = {"seed": seed, "cache_dir": folder / "cache", "train_data": data["sft"], "eval_data": data["sft_eval"]}
    own = {"tokenizer": data["tokenizer"], "model_config": model_config}
    train("sft", HERE / "configs" / "sft.yaml", folder / "sft", flags | own, processes)
    for checkpoint in sorted((folder / "sft" / "checkpoints").glob("step-*")):
        model = checkpoint / "model" / "model"
        found = accuracy(model, data["sft_eval"], seed)
        print(f"{checkpoint.name}: {found:.3f} right", flush=True)
        if found > ENOUGH:
            return model
    sys.exit(f"error: no checkpoint in {folder / 'sft'} is right in over {ENOUGH:.0%}: raise steps in configs/sft.yaml")


def learn(algorithm: str, start: Path, before: float, folder: Path, data: dict[str, Path], seed: int, processes: int):
    """Trains with one algorithm, and writes accuracy before and after and the seconds to summary.json."""
    script, changes = ALGORITHMS[algorithm]
    output, started = folder / algorithm, time.monotonic()
    files = [data["prompts_train"], data["prompts_eval"]]
    if script == "preference":
        files = [pairs(start, path, seed) for path in files]
    flags = {"seed": seed, "cache_dir": folder / "cache", "model": start, "train_data": files[0], "eval_data": files[1]}
    if script == "distill":
        flags["teacher"] = folder / TEACHER / "model"
        if not flags["teacher"].is_dir():
            sys.exit(f"error: {algorithm} learns from {flags['teacher']}: --algorithms {TEACHER} {algorithm}")
    train(script, HERE / "configs" / f"{script}.yaml", output, flags | changes, processes)
    seconds = time.monotonic() - started
    after = accuracy(output / "model", data["prompts_eval"], seed, TRIES)
    found = {"before": before, "after": after, "seconds": seconds}
    (output / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{algorithm}, seed {seed}: {before:.3f} right before, {after:.3f} after, {seconds:.0f} s", flush=True)


def draw_responses(model: Path, prompts: Path, seed: int, n: int) -> list[ScoredPrompt]:
    """n sampled responses to each of at most `PAIRED` prompts of a file, and whether each is right."""
    return sample_responses(
        model, PromptSet(prompts, f"{HERE}/reward.py:correct", n, PAIRED, max_new_tokens=28), [seed, 0]
    )


def accuracy(model: Path, prompts: Path, seed: int, n: int = 1) -> float:
    """The fraction of right responses among n sampled ones to each prompt."""
    rewards = [reward for scored in draw_responses(model, prompts, seed, n) for reward in scored.rewards]
    return sum(rewards) / len(rewards)


def pairs(model: Path, prompts: Path, seed: int) -> Path:
    """A right and a wrong response to each prompt for which eight samples gave both."""
    path = prompts.with_name(prompts.name.replace("prompts", "pairs"))
    if not path.exists():
        informative = [a for a in draw_responses(model, prompts, seed, 8) if a.is_informative]
        rows = [{"prompt": a.prompt, "chosen": a.best, "rejected": a.worst} for a in informative]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


if __name__ == "__main__":
    main()
