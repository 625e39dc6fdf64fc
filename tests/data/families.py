"""Chat templates in the manner of published ones, each with a second writer in plain Python that says who wrote what.

A writer gives `[(text, who)]`: `who` is the number of the assistant's message that the text was written for (what a
model would have sampled), or None. It raises `Refused` where the template does.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "templates"
SPECIAL = """
<pad> <s> </s> <bos> <eos> <|endoftext|> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|>
<start_of_turn> <end_of_turn> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]
[/TOOL_RESULTS] <|system|> <|user|> <|assistant|> <|end|> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜>
<｜Assistant｜> <think> </think> <|start|> <|channel|> <|message|> <|return|> <|call|> <tool_call> </tool_call>
"""

Written = list[tuple[str, int | None]]


class Refused(Exception):
    """The template raises."""


@dataclass(frozen=True)
class Family:
    """A template, its tokenizer's special tokens, its writer, and what it can take.

    Attributes:
        tagged: responses are marked with {% generation %}.
    """

    name: str
    write: Callable[..., Written]
    eos_token: str
    bos_token: str | None = None
    tools: bool = False
    tagged: bool = False

    @property
    def template(self) -> str:
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")

    def tokenizer(self):
        """A small byte-level tokenizer with the special tokens of all families, not prepared."""
        from transformers import PreTrainedTokenizerFast

        special = {"eos_token": self.eos_token, "pad_token": "<pad>", "bos_token": self.bos_token}
        special = {name: token for name, token in special.items() if token is not None}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend(), **special)
        tokenizer.chat_template = self.template
        return tokenizer


def backend():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL.split(), initial_alphabet=alphabet, show_progress=False
    )
    corpus = ["assistant\nuser\nsystem You are a helpful assistant. What is the capital of France? Paris."] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def as_json(value, **how) -> str:
    return json.dumps(value, ensure_ascii=False, **how)


def split_system(messages: list[dict]) -> tuple[str | None, list[tuple[int, dict]]]:
    numbered = list(enumerate(messages))
    if messages[0]["role"] == "system":
        return messages[0]["content"], numbered[1:]
    return None, numbered


def results_of_tools(messages: list[dict], i: int) -> str:
    """As Qwen's templates write them: those in a row in one turn of the user's."""
    begins = "" if i and messages[i - 1]["role"] == "tool" else "<|im_start|>user"
    ends = "" if i + 1 < len(messages) and messages[i + 1]["role"] == "tool" else "<|im_end|>\n"
    return f"{begins}\n<tool_response>\n{messages[i]['content']}\n</tool_response>{ends}"


def qwen_call(call: dict) -> str:
    function = call["function"]
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {as_json(function["arguments"])}}}\n</tool_call>'


def qwen2_5(messages, tools=None, prompt=False) -> Written:
    system, _ = split_system(messages)
    head = "You are a helpful assistant." if system is None else system
    if tools:
        head += "\n\n# Tools\n\n<tools>" + "".join("\n" + as_json(tool) for tool in tools) + "\n</tools>"
    out: Written = [(f"<|im_start|>system\n{head}<|im_end|>\n", None)]
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            said = "\n".join(text for text in [m["content"], *map(qwen_call, m.get("tool_calls", []))] if text)
            out += [("<|im_start|>assistant\n", None), (said + "<|im_end|>", i), ("\n", None)]
        elif m["role"] == "tool":
            out.append((results_of_tools(messages, i), None))
        elif i or m["role"] == "user":
            out.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", None))
    return [*out, ("<|im_start|>assistant\n", None)] if prompt else out


def qwen3(messages, tools=None, prompt=False, enable_thinking=True) -> Written:
    system, _ = split_system(messages)
    out: Written = []
    if tools:
        head = "" if system is None else system + "\n\n"
        head += "# Tools\n\n<tools>" + "".join("\n" + as_json(tool) for tool in tools) + "\n</tools>"
        out.append((f"<|im_start|>system\n{head}<|im_end|>\n", None))
    elif system is not None:
        out.append((f"<|im_start|>system\n{system}<|im_end|>\n", None))
    asked = [i for i, m in enumerate(messages) if m["role"] == "user" and "<tool_response>" not in m["content"]]
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            said, thought = m["content"], m.get("reasoning_content", "")
            if "</think>" in said and not thought:
                thought, said = said.split("</think>")[0].split("<think>")[-1], said.split("</think>")[-1].lstrip("\n")
            is_last = i == len(messages) - 1
            thinks = i > asked[-1] and (is_last or thought)
            header = "<|im_start|>assistant\n"
            if not enable_thinking and thinks and not thought.strip("\n"):
                # The empty thought is a part of the prompt then.
                out += [(header + "<think>\n\n</think>\n\n", None), (said.lstrip("\n"), i)]
            elif thinks:
                # The prompt opens a thought too, if only to close it.
                opens = "<think>\n"
                out += [(header, None), (opens, i if enable_thinking else None)]
                out.append((f"{thought.strip(chr(10))}\n</think>\n\n" + said.lstrip("\n"), i))
            else:
                out += [(header, None), (said, i)]
            calls = "\n".join(map(qwen_call, m.get("tool_calls", [])))
            out += [("\n" + calls if said and calls else calls, i), ("<|im_end|>", i), ("\n", None)]
        elif m["role"] == "tool":
            out.append((results_of_tools(messages, i), None))
        elif i or m["role"] == "user":
            out.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", None))
    thought = "" if enable_thinking else "<think>\n\n</think>\n\n"
    return [*out, ("<|im_start|>assistant\n" + thought, None)] if prompt else out


def llama3(messages, tools=None, prompt=False, date_string="26 Jul 2024") -> Written:
    system, rest = split_system(messages)
    environment = "Environment: ipython\n" if tools else ""
    out: Written = [
        ("<s><|start_header_id|>system<|end_header_id|>\n\n", None),
        (f"{environment}Today Date: {date_string}\n\n{(system or '').strip()}<|eot_id|>", None),
    ]
    if tools:
        described = "".join(as_json(tool, indent=4) + "\n\n" for tool in tools)
        head = "<|start_header_id|>user<|end_header_id|>\n\nRespond with a JSON for a function call.\n\n"
        out.append((head + described + rest[0][1]["content"].strip() + "<|eot_id|>", None))
        rest = rest[1:]
    for i, m in rest:
        if "tool_calls" in m:
            if len(m["tool_calls"]) != 1:
                raise Refused("one call at a time")
            function = m["tool_calls"][0]["function"]
            said = f'{{"name": "{function["name"]}", "parameters": {as_json(function["arguments"])}}}<|eot_id|>'
            out += [("<|start_header_id|>assistant<|end_header_id|>\n\n", None), (said, i)]
        elif m["role"] == "tool":
            out.append((f"<|start_header_id|>ipython<|end_header_id|>\n\n{as_json(m['content'])}<|eot_id|>", None))
        else:
            out.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", None))
            out.append((m["content"].strip() + "<|eot_id|>", i if m["role"] == "assistant" else None))
    return [*out, ("<|start_header_id|>assistant<|end_header_id|>\n\n", None)] if prompt else out


def gemma3(messages, tools=None, prompt=False) -> Written:
    system, rest = split_system(messages)
    out: Written = [("<bos>", None)]
    for place, (i, m) in enumerate(rest):
        if m["role"] != ("user", "assistant")[place % 2]:
            raise Refused("roles")
        prefix = system + "\n\n" if system is not None and place == 0 else ""
        if m["role"] == "assistant":
            out += [("<start_of_turn>model\n", None), (m["content"].strip() + "<end_of_turn>", i), ("\n", None)]
        else:
            out.append((f"<start_of_turn>user\n{prefix}{m['content'].strip()}<end_of_turn>\n", None))
    return [*out, ("<start_of_turn>model\n", None)] if prompt else out


def mistral(messages, tools=None, prompt=False) -> Written:
    system, rest = split_system(messages)
    asked = [i for i, m in rest if m["role"] == "user"]
    # The template compares messages, so two equal ones are both the last.
    last = [i for i in asked if messages[i] == messages[asked[-1]]]
    out: Written = [("<s>", None)]
    for i, m in rest:
        if m["role"] == "user":
            described = f"[AVAILABLE_TOOLS] [{', '.join(map(as_json, tools))}][/AVAILABLE_TOOLS]" if tools else ""
            prefix = system + "\n\n" if system is not None and i == len(messages) - 1 else ""
            out.append(((described if i in last else "") + f"[INST] {prefix}{m['content']}[/INST]", None))
        elif "tool_calls" in m:
            if any(len(call.get("id", "")) != 9 for call in m["tool_calls"]):
                raise Refused("ids")
            calls = [as_json(call["function"])[:-1] + f', "id": "{call["id"]}"}}' for call in m["tool_calls"]]
            out.append((f"[TOOL_CALLS] [{', '.join(calls)}]</s>", i))
        elif m["role"] == "assistant":
            out.append((f" {m['content'].strip()}</s>", i))
        else:
            if len(m.get("tool_call_id", "")) != 9:
                raise Refused("ids")
            result = f'{{"content": {m["content"]}, "call_id": "{m["tool_call_id"]}"}}'
            out.append((f"[TOOL_RESULTS] {result}[/TOOL_RESULTS]", None))
    return out


def phi3(messages, tools=None, prompt=False) -> Written:
    out: Written = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            out += [("<|assistant|>\n", None), (m["content"], i), ("<|end|>", i), ("\n", None)]
        elif m["role"] != "tool":
            out.append((f"<|{m['role']}|>\n{m['content']}<|end|>\n", None))
    return [*out, ("<|assistant|>\n" if prompt else "<|endoftext|>", None)]


def deepseek_r1(messages, tools=None, prompt=False) -> Written:
    system, rest = split_system(messages)
    out: Written = [("<｜begin▁of▁sentence｜>" + (system or ""), None)]
    for i, m in rest:
        if m["role"] == "user":
            out.append(("<｜User｜>" + m["content"], None))
        elif m["role"] == "assistant":
            said = m["content"].split("</think>")[-1]
            out += [("<｜Assistant｜>", None), (said + "<｜end▁of▁sentence｜>", i)]
    return [*out, ("<｜Assistant｜><think>\n", None)] if prompt else out


def deepseek_v3_1(messages, tools=None, prompt=False, thinking=False) -> Written:
    """With `thinking` the prompt opens a thought, so that what closes it is the assistant's."""
    system, rest = split_system(messages)
    out: Written = [("<｜begin▁of▁sentence｜>" + (system or ""), None)]
    for i, m in rest:
        if m["role"] == "user":
            out.append(("<｜User｜>" + m["content"], None))
        elif m["role"] == "assistant":
            said = m["content"].partition("</think>")[2] if "</think>" in m["content"] else m["content"]
            out += [("<｜Assistant｜>", None), ("</think>", i if thinking else None)]
            out.append((said + "<｜end▁of▁sentence｜>", i))
    return [*out, ("<｜Assistant｜>" + ("<think>" if thinking else "</think>"), None)] if prompt else out


def qwq(messages, tools=None, prompt=False) -> Written:
    out: Written = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            said = m["content"].split("</think>")[-1].lstrip("\n")
            out += [("<|im_start|>assistant\n", None), (said + "<|im_end|>", i), ("\n", None)]
        else:
            out.append((f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n", None))
    return [*out, ("<|im_start|>assistant\n<think>\n", None)] if prompt else out


def gpt_oss(messages, tools=None, prompt=False, reasoning_effort="medium") -> Written:
    system, rest = split_system(messages)
    head = f"You are a helpful assistant.\n\nReasoning: {reasoning_effort}"
    out: Written = [(f"<|start|>system<|message|>{head}<|end|>", None)]
    if system or tools:
        told = f"# Instructions\n\n{system}\n\n" if system else ""
        told += "# Tools\n\n" if tools else ""
        for tool in tools or []:
            function = tool["function"]
            told += f"// {function['description']}\ntype {function['name']} = "
            told += f"(_: {as_json(function['parameters'])}) => any;\n\n"
        out.append((f"<|start|>developer<|message|>{told}<|end|>", None))
    called = None
    for i, m in rest:
        if m["role"] == "user":
            out.append((f"<|start|>user<|message|>{m['content']}<|end|>", None))
        elif m["role"] == "tool":
            if called is None:
                raise Refused("no call")
            result = f"<|channel|>commentary<|message|>{as_json(m['content'])}<|end|>"
            out.append((f"<|start|>functions.{called} to=assistant{result}", None))
        elif "tool_calls" in m:
            if m["content"] and m.get("thinking"):
                raise Refused("both")
            function, said = m["tool_calls"][0]["function"], ""
            called = function["name"]
            if thought := m["content"] or m.get("thinking"):
                said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
            said += f" to=functions.{called}<|channel|>commentary json<|message|>{as_json(function['arguments'])}"
            out += [("<|start|>assistant", None), (said + "<|call|>", i)]
        elif i == len(messages) - 1 and not prompt:
            said = f"<|channel|>final<|message|>{m['content']}<|return|>"
            if "thinking" in m:
                said = f"<|channel|>analysis<|message|>{m['thinking']}<|end|><|start|>assistant" + said
            out += [("<|start|>assistant", None), (said, i)]
        else:
            called = None
            out += [("<|start|>assistant", None), (f"<|channel|>final<|message|>{m['content']}<|end|>", i)]
    return [*out, ("<|start|>assistant", None)] if prompt else out


FAMILIES = {
    family.name: family
    for family in (
        Family("qwen2_5", qwen2_5, "<|im_end|>", tools=True),
        Family("qwen3", qwen3, "<|im_end|>", tools=True),
        Family("llama3", llama3, "<|eot_id|>", "<s>", tools=True),
        Family("gemma3", gemma3, "<end_of_turn>", "<bos>"),
        Family("mistral", mistral, "</s>", "<s>", tools=True),
        Family("phi3", phi3, "<|end|>", tagged=True),
        Family("deepseek_r1", deepseek_r1, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        Family("deepseek_v3_1", deepseek_v3_1, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        Family("qwq", qwq, "<|im_end|>"),
        Family("gpt_oss", gpt_oss, "<|return|>", tools=True),
    )
}
