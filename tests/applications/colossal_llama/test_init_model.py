"""New rows are the means that the rule says; everything else is as it was, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest

from tests.applications.colossal_llama.conftest import write_byte_level, write_jsonl
from tests.conftest import ROOT


def configs(size: int) -> dict:
    """Architectures with their tensors in different places, by name."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, PhiConfig, Qwen2Config

    shape = dict(vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    heads = dict(num_key_value_heads=1, head_dim=16)
    opt = dict(ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64)
    return {
        "llama": LlamaConfig(**shape, num_key_value_heads=1),
        "llama-tied": LlamaConfig(**shape, num_key_value_heads=1, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**shape, num_key_value_heads=1),
        "gemma2": Gemma2Config(**shape, **heads),
        "gpt2": GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        "opt": OPTConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **opt),
        "phi": PhiConfig(**shape, num_key_value_heads=2),
    }


ARCHITECTURES = ["llama", "llama-tied", "qwen2", "gemma2", "gpt2", "opt", "phi"]


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, **options)


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def save_model(
    folder: Path, tokenizer: str, architecture: str = "llama", dtype: str = "bfloat16", rows: int = 0
) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    size = rows or len(tokenizer_of(tokenizer))
    model = AutoModelForCausalLM.from_config(configs(size)[architecture]).to(getattr(torch, dtype))
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    model.save_pretrained(folder, max_shard_size="20KB")
    for file in Path(tokenizer).iterdir():
        shutil.copy(file, folder)
    return folder


def run(**settings) -> dict:
    from colossal_llama.init_model import InitConfig, init_model

    return init_model(InitConfig(progress="off", **{name: str(value) for name, value in settings.items()}))


def expected_sources(old, new, kind: str) -> dict[int, list[int]]:
    """Old tokens of each new token's text, from the old tokenizer's ids of the text in the middle of another one."""
    sources = {}
    for piece, token in new.get_vocab().items():
        if piece in old.get_vocab():
            continue
        text = new.backend_tokenizer.decoder.decode([piece]) if kind == "byte-level" else piece.replace("▁", " ")
        if "\ufffd" in text:
            continue
        before = old.encode("\n", add_special_tokens=False)
        ids = old.encode("\n" + text, add_special_tokens=False)
        assert ids[: len(before)] == before
        sources[token] = ids[len(before) :]
    return sources


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_rows_are_means_and_all_else_is_bit_equal(architecture, tokenizers, extended, tmp_path):
    import torch

    source = save_model(tmp_path / "in", tokenizers["byte-level"], architecture)
    folder = extended["byte-level"]["settings"]["output"]
    done = run(model=source, tokenizer=folder, output=tmp_path / "out")
    before, after = load(source), load(tmp_path / "out")
    old, new = tokenizer_of(tokenizers["byte-level"]), tokenizer_of(folder)
    assert done["new_tokens"] == len(new) - len(old) and done["suppressed"] == 0
    assert after.config.vocab_size == len(new) == after.get_input_embeddings().weight.shape[0]
    changed = {id(module.weight) for module in (after.get_input_embeddings(), after.get_output_embeddings())}
    for (name, one), (_, other) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other[: len(one)]), name
    sources = expected_sources(old, new, "byte-level")
    assert len(sources) > 30
    for model_parts in (
        (before.get_input_embeddings(), after.get_input_embeddings()),
        (
            before.get_output_embeddings(),
            after.get_output_embeddings(),
        ),
    ):
        one, other = model_parts
        for token, ids in sources.items():
            mean = torch.stack([one.weight[token].double() for token in ids]).mean(0).to(one.weight.dtype)
            torch.testing.assert_close(other.weight[token], mean, rtol=0.01, atol=1e-6)
    assert (len(changed) == 1) == (after.config.tie_word_embeddings and architecture != "phi")
    text = torch.tensor([old.encode("the red lamp")])
    with torch.no_grad():
        torch.testing.assert_close(before(text).logits, after(text).logits[..., : len(old)], rtol=0, atol=1e-6)


def tensors_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def test_a_tied_head_is_not_written(tokenizers, extended, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path / "in", tokenizers["byte-level"], "llama-tied")
    path = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.zeros(
        len(tokenizer_of(source)), 32, dtype=torch.bfloat16
    )  # as some files have it
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = path.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    run(model=source, tokenizer=extended["byte-level"]["settings"]["output"], output=tmp_path / "out")
    assert "lm_head.weight" in tensors_in(source)
    assert "lm_head.weight" not in tensors_in(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"].keys() == (
        tensors_in(tmp_path / "out")
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_the_original_rule_differs_by_the_spurious_space(kind, tokenizers, extended):
    from colossal_llama.model.token_rows import token_sources

    old, new = tokenizer_of(tokenizers[kind]), tokenizer_of(extended[kind]["settings"]["output"])
    mean, original = (
        token_sources(old.backend_tokenizer, new.backend_tokenizer, "mean"),
        token_sources(old.backend_tokenizer, new.backend_tokenizer, "original"),
    )
    assert {token: ids for token, ids in expected_sources(old, new, kind).items() if mean[token] != ids} == {}
    space = old.get_vocab().get("▁")
    for piece, token in new.get_vocab().items():
        if kind == "sentencepiece" and token in mean and not piece.startswith("▁"):
            assert original[token] == [space, *mean[token]]
            assert original[token] == old(piece, add_special_tokens=False)["input_ids"]
    assert mean.keys() == original.keys() and len(mean) == len(new) - len(old)


def test_parts_of_characters_are_means_of_their_bytes(tokenizers, extended):
    from colossal_llama.model.token_rows import token_sources

    old, new = tokenizer_of(tokenizers["byte-level"]), tokenizer_of(extended["byte-level"]["settings"]["output"])
    sources = token_sources(old.backend_tokenizer, new.backend_tokenizer, "mean")
    parts = [piece for piece, token in new.get_vocab().items() if token in sources and len(piece) == 2]
    assert parts
    for piece in parts:
        assert sources[new.get_vocab()[piece]] == [old.get_vocab()[symbol] for symbol in piece]


def test_an_added_special_token_is_the_mean_of_its_text(tokenizers, tmp_path):
    from colossal_llama.model.token_rows import token_sources

    for kind, text in (("sentencepiece", "lamp"), ("byte-level", "the lamp")):
        old, new = tokenizer_of(tokenizers[kind]), tokenizer_of(tokenizers[kind])
        new.add_special_tokens({"pad_token": f"<{text}>"})
        ids = old.encode(f"\n<{text}>", add_special_tokens=False)[len(old.encode("\n", add_special_tokens=False)) :]
        assert token_sources(old.backend_tokenizer, new.backend_tokenizer, "mean") == {len(old): ids}


def test_random_rows_have_the_old_deviation_and_depend_on_the_seed(tokenizers, extended, tmp_path):
    import torch

    source = save_model(tmp_path / "in", tokenizers["byte-level"], dtype="float32")
    rows = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = extended["byte-level"]["settings"]["output"]
        run_random(source, folder, tmp_path / name, seed)
        rows.append(load(tmp_path / name).get_input_embeddings().weight)
    old = load(source).get_input_embeddings().weight
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    new = rows[0][len(old) :]
    assert abs(new.std() / old.std() - 1) < 0.06 and abs(new.mean()) < 4 * old.std() / new.numel() ** 0.5


def run_random(source, tokenizer, output, seed):
    from colossal_llama.init_model import InitConfig, init_model

    init_model(
        InitConfig(
            model=str(source), tokenizer=str(tokenizer), output=str(output), rule="random", seed=seed, progress="off"
        )
    )


@pytest.mark.parametrize("architecture", ["llama", "phi"])
def test_padding_rows_are_never_generated(architecture, tokenizers, extended, tmp_path):
    import torch

    from colossal_llama.init_model import InitConfig, init_model

    source = save_model(tmp_path / "in", tokenizers["byte-level"], architecture, "float32")
    folder, output = extended["byte-level"]["settings"]["output"], tmp_path / "out"
    done = init_model(
        InitConfig(model=str(source), tokenizer=folder, output=str(output), pad_to_multiple_of=256, progress="off")
    )
    model, tokens = load(output), len(tokenizer_of(output))
    assert done["rows"] == 512 == model.config.vocab_size and done["suppressed"] == 512 - tokens > 0
    assert model.generation_config.suppress_tokens == list(range(tokens, 512))
    prompt = torch.tensor([[1, 2]]).expand(64, 2)
    torch.manual_seed(0)
    drawn = model.generate(prompt, do_sample=True, temperature=5.0, top_k=0, max_new_tokens=16, pad_token_id=0)
    assert drawn[:, 2:].max() < tokens
    with torch.no_grad():
        share = model(prompt[:1]).logits.softmax(-1)[..., tokens:].sum(-1).max()
    if architecture == "phi":
        assert share == 0, "a head's bias does without suppress_tokens"
    else:
        assert share > 0.01, "without a bias only suppress_tokens helps"


def test_unused_rows_of_the_model_are_taken_first(tokenizers, extended, tmp_path):
    import torch

    tokenizer, folder = tokenizers["byte-level"], extended["byte-level"]["settings"]["output"]
    size, new_size = len(tokenizer_of(tokenizer)), len(tokenizer_of(folder))
    source = save_model(tmp_path / "in", tokenizer, rows=new_size + 10)  # as Qwen's
    done = run(model=source, tokenizer=folder, output=tmp_path / "out")
    assert done == {"old_rows": new_size + 10, "new_tokens": new_size - size, "rows": new_size + 10, "suppressed": 10}
    before, after = (load(path).get_input_embeddings().weight for path in (source, tmp_path / "out"))
    assert torch.equal(before[:size], after[:size]) and torch.equal(before[new_size:], after[new_size:])
    assert not torch.equal(before[size:new_size], after[size:new_size])


def test_index_and_shards_are_kept(tokenizers, extended, tmp_path):
    source = save_model(tmp_path / "in", tokenizers["byte-level"])
    run(model=source, tokenizer=extended["byte-level"]["settings"]["output"], output=tmp_path / "out")
    one, other = (json.loads((p / "model.safetensors.index.json").read_text()) for p in (source, tmp_path / "out"))
    assert one["weight_map"] == other["weight_map"] and len(set(one["weight_map"].values())) > 3
    new_bytes = (len(tokenizer_of(tmp_path / "out")) - len(tokenizer_of(source))) * 32 * 2 * 2
    assert other["metadata"]["total_size"] == one["metadata"]["total_size"] + new_bytes
    assert (tmp_path / "out" / "extension.json").exists() and (tmp_path / "out" / "tokenizer_config.json").exists()


def test_what_does_not_fit_is_named_and_leaves_nothing(tokenizers, extended, tmp_path, capsys):
    from colossal_llama.init_model import main

    source = save_model(tmp_path / "in", tokenizers["byte-level"])
    other = write_byte_level(tmp_path / "other")
    capsys.readouterr()
    vocabulary = json.loads((Path(other) / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {"!": 1, '"': 0}
    (Path(other) / "tokenizer.json").write_text(json.dumps(vocabulary))
    good, output = extended["byte-level"]["settings"]["output"], tmp_path / "out"

    def refusal(model, tokenizer, *more: str) -> str:
        assert main(["--model", str(model), "--tokenizer", str(tokenizer), "--output", str(output), *more]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and not list(tmp_path.glob("out*"))
        return lines[0]

    assert "model's tokenizer" in refusal(source, other)
    assert "does not exist" in refusal(tmp_path / "gone", good)
    assert "does not exist" in refusal(source, tmp_path / "gone")
    assert "--pad_to_multiple_of is 0" in refusal(source, good, "--pad_to_multiple_of", "0")
    shard = sorted(source.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert shard.name in refusal(source, good)
    shard.write_bytes(b"no weights")
    assert "is not a safetensors file" in refusal(source, good)
    shard.unlink()
    assert "cannot be read" in refusal(source, good)
    for path in source.glob("*.safetensors*"):
        path.unlink()
    assert "save the model as safetensors" in refusal(source, good)


def test_an_existing_output_is_refused(tokenizers, extended, tmp_path, capsys):
    from colossal_llama.init_model import main

    (tmp_path / "out").mkdir()
    flags = ["--model", str(tmp_path), "--tokenizer", tokenizers["byte-level"], "--output", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "out exists" in capsys.readouterr().err


def write_seven_billion(folder: Path, tokenizer: str, extended: Path) -> int:
    """Llama-2-7B's tensors, bf16, in three shards as published, of one repeated block; both tokenizers of its sizes."""
    import os

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(intermediate_size=11008, num_hidden_layers=32, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    names, noise, weight_map = list(shapes), os.urandom(1 << 24), {}
    for number in range(3):
        header, end = {}, 0
        for name in names[number * 100 : None if number == 2 else number * 100 + 100]:
            size = 2 * shapes[name][0] * (shapes[name] + [1])[1]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            weight_map[name] = f"model-{number + 1:05}-of-00003.safetensors"
            end += size
        text = json.dumps(header).encode()
        with (folder / f"model-{number + 1:05}-of-00003.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, len(noise)):
                file.write(noise[: end - start])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    spec = json.loads((Path(tokenizer) / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    for path, size in ((folder, 32000), (extended, 69104)):
        path.mkdir(exist_ok=True)
        vocabulary = spec["model"]["vocab"]
        vocabulary |= {f"ab{token}": token for token in range(len(vocabulary), size)}
        (path / "tokenizer.json").write_text(json.dumps(spec))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_a_model_of_seven_billion_needs_little_memory(tokenizers, tmp_path):
    import os
    import subprocess
    import sys
    import time

    if shutil.disk_usage(tmp_path).free < 35e9:
        pytest.skip("needs 35 GB of disk")
    size = write_seven_billion(tmp_path / "in", tokenizers["byte-level"], tmp_path / "tokenizer")
    script = ROOT / "applications" / "colossal_llama" / "init_model.py"
    flags = ["--model", tmp_path / "in", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "out"]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, script, *flags, "--pad_to_multiple_of", "64"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'applications'}"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    processor = (usage.ru_utime + usage.ru_stime) / size * 1e9
    print(
        f"\n{size / 1e9:.1f} GB: {usage.ru_maxrss / 1e6:.2f} GB of memory; {seconds / size * 1e9:.1f} s per GB, ",
        end="",
    )
    print(f"{processor:.1f} of them on the processor")
    assert status == 0
    assert usage.ru_maxrss < 3e6  # kB
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    rows = 69120  # 69104 to a multiple of 64
    assert abs(written - size - 2 * 2 * 4096 * (rows - 32000)) < 10_000  # the headers differ in spaces
    for folder in ("in", "out"):
        shutil.rmtree(tmp_path / folder)


@pytest.fixture(scope="module")
def extended_twice(tokenizers, extended, tmp_path_factory) -> list[str]:
    """Tokenizers: one extended, the same with three more tokens."""
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    root, first = tmp_path_factory.mktemp("twice"), extended["byte-level"]["settings"]["output"]
    pieces = write_jsonl(root / "pieces.jsonl", [{"piece": piece} for piece in ("zqx", "qxz", "xzq")])
    extend(ExtendConfig(tokenizer=first, output=str(root / "second"), pieces=pieces, sample_size=10, progress="off"))
    return [first, str(root / "second")]


@pytest.mark.parametrize("rows_left", [0, 1, 64])
@pytest.mark.parametrize(("architecture", "own"), [("llama", []), ("llama", [5]), ("phi", [])])
def test_extended_twice_only_ids_without_a_token_are_suppressed(
    rows_left, own, architecture, tokenizers, extended_twice, tmp_path
):
    """REPORT 21: whether the second extension fills all padding of the first or leaves some; what somebody else
    suppresses stays suppressed."""
    from colossal_llama.init_model import InitConfig, init_model

    first, second = (len(tokenizer_of(folder)) for folder in extended_twice)
    start = save_model(tmp_path / "in", tokenizers["byte-level"], architecture)
    one = InitConfig(
        model=str(start),
        tokenizer=extended_twice[0],
        output=str(tmp_path / "one"),
        pad_to_multiple_of=second + rows_left,
    )
    init_model(one)
    path = tmp_path / "one" / "generation_config.json"
    settings = json.loads(path.read_text())
    assert settings["suppress_tokens"] == list(range(first, second + rows_left))
    path.write_text(json.dumps(settings | {"suppress_tokens": sorted([*own, *settings["suppress_tokens"]])}))
    run(model=tmp_path / "one", tokenizer=extended_twice[1], output=tmp_path / "two")
    found = json.loads((tmp_path / "two" / "generation_config.json").read_text())["suppress_tokens"]
    assert found == own + list(range(second, second + rows_left))
    model = load(tmp_path / "two")
    assert (model.generation_config.suppress_tokens or []) == found
    bias = model.get_output_embeddings().bias
    assert bias is None or bias[first:second].min() > -100
