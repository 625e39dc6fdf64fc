"""Texts from a trained model, as they are written: `python applications/colossal_llama/generate.py --model FOLDER`."""

import argparse
import sys

from coati.errors import UserError, run_command


def main(argv: list[str] | None = None) -> int:
    """Continues a prompt, or the lines of the terminal one after the other; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--model", required=True, help="a folder that transformers opens")
    parser.add_argument("--prompt", help="what to continue; without it, lines are read until the end of the input")
    parser.add_argument("--chat", action="store_true", help="lines are turns of a dialogue, in the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 for greedy decoding")
    options = parser.parse_args(argv)
    return run_command(lambda: write(options))


def write(options):
    """Loads the model and generates.

    Raises:
        UserError: it can't be loaded, or has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"can't load a model from {options.model}: {str(error).splitlines()[0]}") from error
    if options.chat and not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {options.model} has no chat template: leave out --chat")
    sampling = dict(do_sample=options.temperature > 0)
    if options.temperature > 0:
        sampling |= dict(temperature=options.temperature)
    dialogue = []
    for line in [options.prompt] if options.prompt is not None else _lines():
        dialogue.append({"role": "user", "content": line})
        text = (
            tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
            if options.chat
            else line
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not options.chat)
        streamer = TextStreamer(tokenizer, skip_prompt=options.chat, skip_special_tokens=True)
        output = model.generate(**inputs, **sampling, streamer=streamer, max_new_tokens=options.max_new_tokens)
        response = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        dialogue.append({"role": "assistant", "content": response})


def _lines():
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
