"""A model's responses to dialogues, for judge.py: `answer.py --model M --questions DATA/mt_bench --output M.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from coati.config import Settings, option, parse_config, settings
from coati.errors import UserError, run_command
from coati.files import replace_file
from colossal_eval.benchmarks.prepared_folder import read_dialogues
from colossal_eval.benchmarks.question import Question
from colossal_eval.run.model_loading import Loaded, load_model, model_folder


@settings
class AnswerConfig(Settings):
    """Settings of answer.py."""

    model: str = option("", "a model folder, LoRA adapter, coati run or checkpoint", path="model")
    questions: str = option("runs/eval/data/mt_bench", "what prepare.py made of MT-Bench", path="file")
    output: str = option("", "the file to write; its name is the model's in the judge's report", path="output")
    max_new_tokens: int = option(512, "longest response", ge=1)
    temperature: float = option(0.0, "of sampling; 0 for greedy", ge=0)
    seed: int = option(0, "of sampling", ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of the weights")
    limit: int | None = option(None, "only the first questions", ge=1)


def answer(config: AnswerConfig) -> list[dict]:
    """Responds to all turns of all questions and writes the responses, `{"id", "turns"}` per line.

    Raises:
        UserError: a wrong setting, model or file, or a dialogue that is longer than what the model reads.
    """
    import torch

    from coati.data import prepare_tokenizer

    if not config.model or not config.output:
        raise UserError("name the model with --model and the file to write with --output")
    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output} is there: remove it, or give another --output")
    questions = read_dialogues(Path(config.questions))[: config.limit]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(output.stem, model_folder(config.model), config.dtype, device)
    notes = []
    if not loaded.tokenizer.chat_template:
        loaded.tokenizer, notes = prepare_tokenizer(loaded.tokenizer)
    print(*notes, f"{len(questions)} dialogues, {config.dtype} on {device.type}, into {output}", sep="\n")
    responses = respond_to_turns(loaded, questions, config)
    rows = [{"id": question.id, "turns": turns} for question, turns in zip(questions, responses, strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def respond_to_turns(loaded: Loaded, questions: list[Question], config: AnswerConfig) -> list[list[str]]:
    """The responses to each question's turns, each given with the dialogue so far."""
    from coati.rollout import GenerationConfig, Request, complete
    from coati.rollout.prompts import eos_ids, response_texts

    sampling = GenerationConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    tokenizer, ends = loaded.tokenizer, eos_ids(loaded.tokenizer, loaded.actor)
    dialogues: list[list[dict]] = [[] for _ in questions]
    responses: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions) + 1):
        with_this_turn = [i for i, question in enumerate(questions) if turn <= len(question.turns)]
        for i in with_this_turn:
            dialogues[i].append({"role": "user", "content": [questions[i].question, *questions[i].turns][turn]})
        requests = [
            Request(_prompt(loaded, dialogues[i], questions[i], config.max_new_tokens), [config.seed, turn, i])
            for i in with_this_turn
        ]
        completions = complete(loaded.actor, requests, sampling, eos_ids=ends, tokenizer=tokenizer)
        texts = response_texts(tokenizer, [completion.ids for completion in completions], ends)
        for i, text in zip(with_this_turn, texts, strict=True):
            responses[i].append(text.strip())
            dialogues[i].append({"role": "assistant", "content": responses[i][-1]})
    return responses


def _prompt(loaded: Loaded, dialogue: list[dict], question: Question, room: int) -> list[int]:
    text = loaded.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) + room > loaded.max_length:
        raise UserError(
            f"question {question.id} and a response of {room} tokens have {len(ids) + room} tokens, the model reads "
            f"{loaded.max_length}: lower --max_new_tokens"
        )
    return ids


def main(argv: list[str] | None = None) -> int:
    """The command; 2 for a mistake of the user's."""
    return run_command(lambda: answer(parse_config(AnswerConfig, argv, description=__doc__)))


if __name__ == "__main__":
    sys.exit(main())
