"""A small byte-level BPE tokenizer, the chat templates that the masks are tried on, and a data folder."""

import json

import pytest

SPECIAL_TOKENS = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
CORPUS = [
    "User: what is the capital of France?\nAssistant: The capital of France is Paris.",
    "assistant\nuser\nsystem You are a helpful assistant. Please answer the question of the user.",
    "def add(a, b):\n    return a + b\n\n\n1 2 3 4 5 6 7 8 9 10",
] * 20

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# The tags leave the EOS token out, as many published templates do.
CHATML_TAGGED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Writes a think block in the last turn only, so that an earlier turn changes once others follow.
QWEN3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# template, and the token that ends a response in it
TEMPLATES = {
    "default": (None, "</s>"),
    "llama3": (LLAMA3, "</s>"),
    "chatml": (CHATML, "<|im_end|>"),
    "chatml_tagged": (CHATML_TAGGED, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
}


@pytest.fixture(scope="session")
def backend_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def new_tokenizer(backend_json):
    """Make a fresh tokenizer, not prepared; keywords override its special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    def make(**special):
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
        special = {name: token for name, token in special.items() if token is not None}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend_json), **special)

    return make


@pytest.fixture(scope="session")
def tokenizer_for(new_tokenizer):
    """A prepared tokenizer with the named template; one a session for each name."""
    from coati.data import prepare_tokenizer

    prepared = {}

    def get(name: str):
        if name not in prepared:
            template, eos = TEMPLATES[name]
            tokenizer = new_tokenizer(eos_token=eos)
            tokenizer.chat_template = template
            prepared[name], _ = prepare_tokenizer(tokenizer)
        return prepared[name]

    return get


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows (or ready lines) to a file in a fresh folder and return its path."""

    def write(rows, name="rows.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def template_text():
    return {name: template for name, (template, _) in TEMPLATES.items()}
