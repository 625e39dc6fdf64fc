"""A model's answers to dialogues, for judge.py: `answer.py --model M --questions DATA/mt_bench --output M.jsonl`."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from coati.config import Settings, option, parse_config
from coati.errors import UserError, run_command
from coati.tracking.files import replace_file
from colossal_eval.benchmarks.question import Question, read_questions
from colossal_eval.run.model_loading import load_model, model_folder


@dataclass
class AnswerConfig(Settings):
    """Settings of answer.py."""

    model: str = option("", "a model folder, LoRA adapter, coati run or checkpoint", path="model")
    questions: str = option("runs/eval/data/mt_bench", "what prepare.py made of MT-Bench", path="file")
    output: str = option("", "the file to write; its name is the model's in the judge's report", path="output")
    max_new_tokens: int = option(512, "longest answer", ge=1)
    temperature: float = option(0.0, "of sampling; 0 for greedy", ge=0)
    seed: int = option(0, "of sampling", ge=0)
    dtype: str = option("float32", "of the weights: float32, bfloat16 or float16")
    limit: int | None = option(None, "only the first questions", ge=1)


def answer(config: AnswerConfig) -> list[dict]:
    """Answers all turns of all questions and writes them, `{"id", "turns"}` a line.

    Raises:
        UserError: a wrong setting, model or file, or a dialogue that is longer than what the model reads.
    """
    import torch

    from coati.data import prepare_tokenizer

    if not config.model or not config.output:
        raise UserError("name the model with --model and the file to write with --output")
    if Path(config.output).exists():
        raise UserError(f"{config.output} is there: remove it, or give another --output")
    files = sorted((Path(config.questions) / "test").glob("*.jsonl"))
    questions = list(itertools.chain.from_iterable(map(read_questions, files)))[: config.limit]
    if not questions:
        raise UserError(f"{config.questions} has no questions: make it with prepare.py --benchmark mt_bench")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(Path(config.output).stem, model_folder(config.model), config.dtype, device)
    notes = []
    if not loaded.tokenizer.chat_template:
        loaded.tokenizer, notes = prepare_tokenizer(loaded.tokenizer)
    print(*notes, f"{len(questions)} dialogues, {config.dtype} on {device.type}, into {config.output}", sep="\n")
    answers = answer_turns(loaded, questions, config)
    rows = [{"id": question.id, "turns": turns} for question, turns in zip(questions, answers, strict=True)]
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    replace_file(Path(config.output), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def answer_turns(loaded, questions: list[Question], config: AnswerConfig) -> list[list[str]]:
    """The answers to each question's turns, each given with the dialogue so far."""
    from coati.rollout import GenerationConfig, generate
    from coati.rollout.prompts import eos_ids, response_texts

    how = GenerationConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    ends = dict(eos_ids=eos_ids(loaded.tokenizer, loaded.actor), pad_id=0)
    dialogues: list[list[dict]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions) + 1):
        asked = [i for i, question in enumerate(questions) if turn <= len(question.turns)]
        for i in asked:
            dialogues[i].append({"role": "user", "content": [questions[i].question, *questions[i].turns][turn]})
        prompts = [_prompt(loaded, dialogues[i], questions[i], config.max_new_tokens) for i in asked]
        seeds = [[config.seed, turn, i] for i in asked]
        rollout = generate(loaded.actor, prompts, how, seeds=seeds, tokenizer=loaded.tokenizer, **ends)
        texts = response_texts(loaded.tokenizer, rollout.response_ids(), ends["eos_ids"])
        for i, text in zip(asked, texts, strict=True):
            dialogues[i].append({"role": "assistant", "content": text.strip()})
    return [[said["content"] for said in dialogue if said["role"] == "assistant"] for dialogue in dialogues]


def _prompt(loaded, dialogue: list[dict], question: Question, room: int) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) + room > loaded.max_length:
        raise UserError(
            f"question {question.id} and an answer of {room} tokens have {len(ids) + room} tokens, the model reads "
            f"{loaded.max_length}: lower --max_new_tokens"
        )
    return ids


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""
    return run_command(lambda: answer(parse_config(AnswerConfig, argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
