"""What coati is measured beside: TRL's trainers, in TRL's own environment, and a plain PyTorch loop.

Started by benchmarks/training.py as `PYTHON benchmarks/peers.py SETTINGS`; imports nothing of coati's.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contest import serve


def prepare(settings: dict):
    import torch

    torch.manual_seed(0)
    peers = {"sft": trl_sft, "reward": trl_reward, "ppo": trl_ppo, "preference": trl_dpo, "grpo": trl_grpo}
    return (peers | {"loop": plain_loop})[settings["peer"]](settings)


def shared_arguments(settings: dict) -> dict:
    rows = settings["micro_batch_size"]
    return dict(
        output_dir=f"{settings['folder']}/unused",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings["batch_size"] // rows,
        learning_rate=1e-5,
        max_steps=settings["steps"],
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        bf16=settings["device"] != "cpu",
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        use_cpu=settings["device"] == "cpu",
    ) | settings.get("arguments", {})


def timed(trainer):
    """A turn is a training of its own; its clock runs from the first step's beginning to the last one's end, and its
    amount is the real tokens that the model read."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **keywords):
            if state.global_step == 0:
                self.started, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **keywords):
            self.seconds, self.cpu_seconds = time.perf_counter() - self.started, time.process_time() - self.cpu

    clock, tokens, step = Clock(), [], trainer.training_step
    trainer.add_callback(clock)

    def counted(model, inputs, *rest):
        if isinstance(inputs, dict):  # GRPO's are prompts, before they are completed
            mask = inputs.get("attention_mask")  # packed rows have none
            tokens.append(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
        return step(model, inputs, *rest)

    trainer.training_step = counted

    def work():
        tokens.clear()
        trainer.train()
        return {"amount": sum(tokens), "seconds": clock.seconds, "cpu": clock.cpu_seconds}

    return work


def trl_sft(settings: dict):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = json.loads(Path(settings["rows"]).read_text())
    arguments = shared_arguments(settings) | dict(max_length=settings["max_length"])
    folder = f"{settings['folder']}/policy"
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return timed(trainer)


def trl_reward(settings: dict):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = json.loads(Path(settings["rows"]).read_text())
    arguments = shared_arguments(settings) | dict(max_length=settings["max_length"])
    folder = f"{settings['folder']}/scorer"
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32),
        args=RewardConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    return timed(trainer)


def trl_dpo(settings: dict):
    """Reference log-probs are computed before the clock runs, and kept."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder, rows = settings["folder"], json.loads(Path(settings["rows"]).read_text())
    arguments = shared_arguments(settings) | dict(max_length=settings["max_length"], precompute_ref_log_probs=True)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32),
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/policy"),
    )
    return timed(trainer)


def trl_grpo(settings: dict):
    """One update per iteration, no reference; the reward is a number per response."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    folder, prompts = settings["folder"], json.loads(Path(settings["rows"]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/policy")
    policy = AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32)
    arguments = shared_arguments(settings) | dict(
        generation_batch_size=settings["batch_size"],
        num_generations=settings["group_size"],
        max_completion_length=max(settings["limits"]),
        beta=0.0,
        temperature=1.0,
    )
    trainer = GRPOTrainer(
        model=policy,
        args=GRPOConfig(**arguments),
        reward_funcs=lambda completions, **columns: [float(len(text) % 7) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    end_at(policy, settings["limits"], tokenizer.eos_token_id)
    steps = timed(trainer)
    return lambda: steps() | {"amount": settings["batch_size"] * settings["steps"]}


def end_at(model, limits: list[int], eos: int):
    """Makes the model's responses end after so many tokens each, EOS included and nowhere else."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class EndThere(LogitsProcessor):
        def __init__(self, prompt: int):
            self.prompt = prompt

        def __call__(self, input_ids, scores):
            scores[:, eos] = -torch.inf
            ends = input_ids.shape[1] - self.prompt + 1 >= torch.tensor(limits)
            scores[ends] = -torch.inf
            scores[ends, eos] = 0.0
            return scores

    generate = model.generate

    def limited(*args, **keywords):
        ends = LogitsProcessorList([EndThere(keywords["input_ids"].shape[1])])
        return generate(*args, **keywords, logits_processor=ends)

    model.generate = limited


def trl_ppo(settings: dict):
    """Responses end where `settings["limits"]` says."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    folder = settings["folder"]
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/policy")
    policy, reference = (AutoModelForCausalLM.from_pretrained(f"{folder}/policy") for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(f"{folder}/scorer", num_labels=1) for _ in range(2)
    )
    arguments = shared_arguments(settings)
    del arguments["max_steps"]
    config = PPOConfig(
        **arguments,
        total_episodes=settings["batch_size"] * settings["steps"],
        response_length=max(settings["limits"]),
        num_ppo_epochs=settings["ppo_epochs"],
        num_mini_batches=1,
        num_sample_generations=0,
        local_rollout_forward_batch_size=settings["batch_size"],
        temperature=1.0,
        stop_token="eos",
    )
    prompts = json.loads(Path(settings["rows"]).read_text())
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in prompts]),
        eval_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in prompts[:1]]),
    )

    end_at(policy, settings["limits"], tokenizer.eos_token_id)

    def work() -> int:
        trainer.train()
        return settings["batch_size"] * settings["steps"]

    return work


def plain_loop(settings: dict):
    """Forward, backward and AdamW, over rows of equal length: what no framework can go below."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    reward, seq = settings["algorithm"] == "reward", settings["max_length"]
    rows = settings["micro_batch_size"] * (2 if reward else 1)
    if reward:
        model = AutoModelForSequenceClassification.from_pretrained(f"{settings['folder']}/scorer", num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(f"{settings['folder']}/policy")
    device = settings["device"]
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(10, 1000, (rows, seq), device=device)
    lower = torch.autocast(device, torch.bfloat16, enabled=device != "cpu")
    accumulated = settings["batch_size"] // settings["micro_batch_size"]

    def work() -> int:
        for _ in range(settings["steps"]):
            for _ in range(accumulated):
                with lower:
                    if reward:
                        chosen, rejected = model(ids).logits[:, 0].chunk(2)
                        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
                    else:
                        loss = model(ids, labels=ids).loss
                (loss / accumulated).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return settings["steps"] * accumulated * rows * seq

    return work


if __name__ == "__main__":
    serve(prepare)
