"""Time to reward: GRPO on two-digit sums with SmolLM2-135M, coati beside TRL, until enough held-out sums are right.

    python benchmarks/time_to_reward.py --seeds 0 1 2           # one JSON line
    python benchmarks/time_to_reward.py --seeds 0 1 2 --save    # and writes benchmarks/results/time_to_reward.json

A seed has its own data, and weights of its own to start from: those of examples/smollm2's SFT stage after 24 steps
(after its own 8, GRPO levels off at three sums in four). Both train LoRA of rank 16 on every linear layer with the same
prompts, reward, 32 groups of 8 responses, clip, KL weight and constant learning rate, in fp32: coati as
examples/smollm2/grpo.yaml says, on two processes of one thread, TRL (of `make trl`) in one process of two threads.
Every second iteration each samples a response to 200 held-out sums at temperature 1; that is not counted. The time is
that of training until the share of right ones is `--target`. TRL is stopped once it has taken `--patience` times as
long as coati.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine, store  # noqa: E402
from examples.smollm2.rewards import stated_answer  # noqa: E402
from examples.smollm2.tasks import make_sums  # noqa: E402

TRL = ROOT / ".venv-trl-1.16/bin/python"
EVERY = 2
SFT_STEPS = 24
START = f"sft{SFT_STEPS}"
RESPONSES, GROUP, NEW_TOKENS, RATE, KL = 256, 8, 24, 3e-4, 0.01
ROWS = 64  # that TRL reads at once

Curve = list[tuple[float, float]]  # seconds of training, share of held-out sums that are right


def make_start(model: Path, folder: Path, seed: int):
    """The seed's data, and the weights that both start from, unless they are there."""
    from examples.smollm2.model import make_model
    from examples.stages import train

    files = make_sums(folder / "data", seed)
    flags = {"model": make_model(model), "seed": seed, "steps": SFT_STEPS, "cache_dir": folder / "cache"}
    flags |= {"train_data": files["sft"], "eval_data": files["sft_eval"]}
    train("sft", ROOT / "examples/smollm2/sft.yaml", folder / START, flags, processes=2)


def curve_of_coati(folder: Path, iterations: int, seed: int) -> Curve:
    """Trains with coati's launcher, and reads the curve from what it has logged."""
    from coati.tracking.files import METRICS, read_lines
    from examples.stages import train

    with tempfile.TemporaryDirectory() as output:
        flags = {"model": folder / START / "model", "seed": seed, "steps": iterations, "schedule": "constant"}
        flags |= {"train_data": folder / "data" / "prompts.jsonl", "eval_data": folder / "data" / "prompts_eval.jsonl"}
        flags |= {"batch_size": RESPONSES // GROUP, "eval_every": EVERY, "warmup": 0.0}
        flags |= {"cache_dir": Path(output) / "cache"}
        train("grpo", ROOT / "examples/smollm2/grpo.yaml", Path(output) / "run", flags, processes=2)
        return curve_of_records(list(read_lines(Path(output) / "run" / METRICS)))


def curve_of_records(rows: list[dict]) -> Curve:
    """The curve without the evaluations' own time.

    Args:
        rows: a run's records of metrics, from the evaluation before its first step on; an evaluated step has two.
    """
    curve, seconds, last = [], 0.0, rows[0]["time"]
    for row in rows:
        if "eval/reward" in row:
            curve.append((seconds, row["eval/reward"]))
        else:
            seconds += row["time"] - last
        last = row["time"]
    return curve


def curve_of_trl(settings: dict) -> Curve:
    """In TRL's environment."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    folder = Path(settings["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / START / "model", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / START / "model", dtype=torch.float32)

    def chats(name: str) -> list[dict]:
        lines = (folder / "data" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]

    def reward(prompts, completions, answer, **columns):
        return stated_answer(prompts, [completion[0]["content"] for completion in completions], answer)

    held_out = chats("prompts_eval")

    def evaluate(model) -> float:
        model.eval()
        right = 0.0
        for start in range(0, len(held_out), 50):
            rows = held_out[start : start + 50]
            inputs = tokenizer.apply_chat_template(
                [row["prompt"] for row in rows], add_generation_prompt=True, padding=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.no_grad():
                ids = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS)
            texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(stated_answer([""] * len(texts), texts, [row["answer"] for row in rows]))
        model.train()
        return right / len(held_out)

    class Clock(TrainerCallback):
        """The curve without the evaluations' own time; the random state goes on as if there were none."""

        def __init__(self):
            self.curve, self.seconds = [], 0.0

        def on_train_begin(self, args, state, control, model, **keywords):
            self.look(model)

        def on_step_end(self, args, state, control, model, **keywords):
            self.seconds += time.perf_counter() - self.started
            self.started = time.perf_counter()
            if state.global_step % EVERY == 0:
                self.look(model)
                seconds, share = self.curve[-1]
                control.should_training_stop = share >= settings["target"] or seconds >= settings["most_seconds"]

        def look(self, model):
            with torch.random.fork_rng():
                self.curve.append((self.seconds, evaluate(model)))
            print(json.dumps(self.curve[-1]), file=sys.stderr, flush=True)
            self.started = time.perf_counter()

    clock = Clock()
    arguments = GRPOConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=RESPONSES // ROWS,
        generation_batch_size=RESPONSES,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        max_steps=settings["iterations"],
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        beta=KL,
        loss_type="grpo",
        temperature=1.0,
        seed=settings["seed"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
    )
    trainer = GRPOTrainer(
        model=policy,
        args=arguments,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(chats("prompts")),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    return clock.curve


def run_trl(folder: Path, iterations: int, seed: int, target: float, most_seconds: float) -> Curve:
    environment = dict(os.environ, OMP_NUM_THREADS="2", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as output:
        settings = dict(folder=str(folder), iterations=iterations, seed=seed, target=target, output=output)
        settings |= {"most_seconds": most_seconds}
        command = [str(TRL), __file__, "worker", json.dumps(settings)]
        done = subprocess.run(command, env=environment, cwd=output, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def reached(curve: Curve, target: float) -> float | None:
    """Seconds until the target; None if it was never reached."""
    return next((seconds for seconds, share in curve if share >= target), None)


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "worker":
        print(json.dumps(curve_of_trl(json.loads(sys.argv[-1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "smollm2", help="where models and data are made")
    parser.add_argument("--iterations", type=int, default=14, help="at most")
    parser.add_argument("--target", type=float, default=0.8, help="share of held-out sums that are right")
    parser.add_argument("--patience", type=float, default=3.0, help="times coati's seconds that TRL gets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/time_to_reward.json")
    options = parser.parse_args()
    if not TRL.exists():
        sys.exit(f"error: {TRL} is missing: `make trl` makes it")
    folders = {seed: options.folder.resolve() / f"seed{seed}" for seed in options.seeds}
    for seed, folder in folders.items():
        make_start(options.folder.resolve() / "model", folder, seed)
    result = {"machine": machine(2), "target": options.target, "seeds": {}}
    for seed, folder in folders.items():
        curves = {"coati": curve_of_coati(folder, options.iterations, seed)}
        ours = reached(curves["coati"], options.target) or curves["coati"][-1][0]
        curves["TRL"] = run_trl(folder, options.iterations, seed, options.target, options.patience * ours)
        seconds = {name: reached(curve, options.target) for name, curve in curves.items()}
        result["seeds"][str(seed)] = {"curves": curves}
        print(f"seed {seed}: seconds to {options.target:.0%}: {seconds}", file=sys.stderr, flush=True)
        if options.save:
            store(result, "time_to_reward", "seeds")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
