"""What the example's models know: bits per character of held-out documents, whatever the tokenizer."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "applications")]

from coati.tracking import read_metrics  # noqa: E402
from coati.tracking.charts import Line  # noqa: E402
from examples.drawing import figure  # noqa: E402
from examples.stages import fill_figures  # noqa: E402

CHARACTERS = 60_000  # of each language's held-out documents
WINDOW = 256
RESAMPLES = 2000


def measure(output: Path, arguments):
    """Nats of every held-out document under every model, in each model's losses.json."""
    texts = {language: held_out(output / "data" / f"{language}_eval.jsonl") for language in ("en", "zh")}
    for folder in models(output, arguments).values():
        if not (folder / "losses.json").exists():
            print(f"measuring {folder.relative_to(output)}", flush=True)
            losses = {language: document_losses(folder, some) for language, some in texts.items()}
            (folder / "losses.json").write_text(json.dumps(losses))


def models(output: Path, arguments) -> dict[tuple[str, int], Path]:
    """Folders by arm and seed; the arm "" is the English model."""
    folders = {}
    for seed in range(arguments.seeds):
        folders["", seed] = output / f"seed{seed}" / "english" / "1-english" / "model"
        for arm in arguments.arms:
            folders[arm, seed] = output / f"seed{seed}" / arm.replace(" ", "-") / "3-replay" / "model"
    return folders


def held_out(path: Path) -> list[str]:
    """Documents with `CHARACTERS` characters together, spread over the file."""
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    total = sum(map(len, texts))
    return texts[:: max(1, total // CHARACTERS)]


def document_losses(folder: Path, texts: Sequence[str]) -> list[float]:
    """Negative log-likelihood of each text, in nats. Longer ones go through the model in windows, of which each begins
    with the last token of the one before; the first begins with EOS if the tokenizer adds no BOS. So every token of a
    text counts, and tokenizers whose first tokens differ in length can be compared."""
    import torch
    from transformers import AutoTokenizer

    from coati.models import Actor

    tokenizer, actor = AutoTokenizer.from_pretrained(folder), Actor(folder).eval()
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    windows, start_ids = [], [] if adds_bos else [tokenizer.eos_token_id]
    for i, text in enumerate(texts):
        ids = start_ids + tokenizer(text)["input_ids"]
        windows += [(i, ids[start : start + WINDOW]) for start in range(0, len(ids) - 1, WINDOW - 1)]
    windows.sort(key=lambda window: len(window[1]))
    losses = [0.0] * len(texts)
    with torch.no_grad():
        for start in range(0, len(windows), 32):
            batch = windows[start : start + 32]
            ids = torch.zeros(len(batch), len(batch[-1][1]), dtype=torch.long)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            for row, (_, window) in enumerate(batch):
                ids[row, : len(window)], mask[row, : len(window)] = torch.tensor(window), True
            sums = (actor(ids, mask, targets=mask) * mask).sum(1, dtype=torch.float64)
            for (i, _), loss in zip(batch, sums.tolist(), strict=True):
                losses[i] -= loss
    return losses


def summarize(output: Path, arguments, seconds: float):
    """Writes figures.md and curves.svg, and puts the first into the README when all arms ran with two seeds."""
    texts = {language: held_out(output / "data" / f"{language}_eval.jsonl") for language in ("en", "zh")}
    found = {key: json.loads((folder / "losses.json").read_text()) for key, folder in models(output, arguments).items()}
    table = "\n\n".join(
        [
            f"`example/run.py --seeds {arguments.seeds}` on {arguments.processes} processes (ZeRO-2, fp32, CPU), "
            f"{seconds / 60:.0f} minutes.",
            tokenizer_table(output, texts),
            loss_table(found, texts, english_tokens(output, texts["en"]), arguments),
            comparisons(found, texts, arguments),
        ]
    )
    (output / "figures.md").write_text(table + "\n")
    (output / "curves.svg").write_text(curves(output, arguments))
    print(table)
    if arguments.seeds > 1 and len(arguments.arms) > 3 and arguments.tokens == 1.0:
        fill_figures(HERE.parent / "README.md", table, "example")
        (HERE / "curves.svg").write_text((output / "curves.svg").read_text())
    print(f"\nfigures in {output / 'figures.md'}, curves in {output / 'curves.svg'}")


def tokenizer_table(output: Path, texts: dict[str, list[str]]) -> str:
    """Tokens per character of the held-out texts."""
    from transformers import AutoTokenizer

    lines = ["| tokenizer | vocabulary | tokens per character, English | Chinese |", "|---|---|---|---|"]
    for name in ("english", "extended"):
        tokenizer = AutoTokenizer.from_pretrained(output / "data" / name)
        rates = []
        for language in ("en", "zh"):
            tokens = sum(len(ids) for ids in tokenizer(texts[language], add_special_tokens=False)["input_ids"])
            rates.append(f"{tokens / sum(map(len, texts[language])):.3f}")
        lines.append(f"| {name} | {len(tokenizer):,} | {rates[0]} | {rates[1]} |")
    return "\n".join(lines)


def bits(losses: Sequence[float], texts: Sequence[str]) -> float:
    """Bits per character."""
    return sum(losses) / sum(map(len, texts)) / math.log(2)


def english_tokens(output: Path, texts: list[str]) -> int:
    """How many tokens the English documents have, with either tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output / "data" / "english")
    return sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def loss_table(found, texts, tokens: int, arguments) -> str:
    """Each model's figures, one number per seed."""
    header = "| model | bits per character, Chinese | English |"
    lines = [header + " English perplexity per token, relative to the English model's |", "|---|---|---|---|"]
    for arm in ["", *arguments.arms]:
        cells = [[], [], []]
        for seed in range(arguments.seeds):
            losses, before = found[arm, seed], found["", seed]
            cells[0].append(f"{bits(losses['zh'], texts['zh']):.3f}")
            cells[1].append(f"{bits(losses['en'], texts['en']):.3f}")
            rise = math.exp((sum(losses["en"]) - sum(before["en"])) / tokens) - 1
            cells[2].append(f"{rise:+.1%}")
        name = arm or "English only"
        lines.append(f"| {name} | " + " | ".join(", ".join(cell) for cell in cells) + " |")
    return "\n".join(lines)


def comparisons(found, texts, arguments) -> str:
    """The mean-initialized model beside the others, with bootstrap intervals over documents."""
    lines = ["| bits per character, mean-initialized minus | seed | difference | 95 % interval |", "|---|---|---|---|"]
    for arm in [arm for arm in arguments.arms if arm != "mean-initialized"]:
        language = "en" if arm == "no replay" else "zh"
        for seed in range(arguments.seeds):
            if "mean-initialized" not in arguments.arms:
                continue
            ours, theirs = (np.array(found[name, seed][language]) for name in ("mean-initialized", arm))
            low, high = interval(ours - theirs, np.array([len(text) for text in texts[language]]))
            difference = bits(ours - theirs, texts[language])
            verdict = "" if low <= 0 <= high else ", significant"
            name = f"{arm} ({'Chinese' if language == 'zh' else 'English'})"
            lines.append(f"| {name} | {seed} | {difference:+.3f} | {low:+.3f} to {high:+.3f}{verdict} |")
    return "\n".join(lines)


def interval(nats: np.ndarray, characters: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of bits per character, documents drawn with replacement."""
    draws = np.random.default_rng(0).integers(len(nats), size=(RESAMPLES, len(nats)))
    values = nats[draws].sum(1) / characters[draws].sum(1) / math.log(2)
    return tuple(np.quantile(values, [0.025, 0.975]).tolist())


def curves(output: Path, arguments) -> str:
    """Bits per Chinese character of the evaluation rows during training, by Chinese characters seen."""
    lines, data = [], output / "data"
    for color, arm in enumerate(arguments.arms):
        tokenizer = "english" if arm == "no extension" else "extended"
        rate = tokens_per_character(data, tokenizer)
        folder, points, seen = output / "seed0" / arm.replace(" ", "-"), [], 0.0
        for stage in sorted(folder.glob("?-*")):
            here = 0.0
            for row in read_metrics(stage):
                here = row.get("seen/zh", here)
                if "eval/loss/zh" in row:
                    points.append(((seen + here) / rate / 1000, row["eval/loss/zh"] * rate / math.log(2)))
            seen += here
        lines.append(Line(arm, color, points))
    title = "bits per Chinese character, by thousand Chinese characters seen"
    return figure({title: lines}, list(arguments.arms), "seed 0; three stages: new embeddings, knowledge, replay")


def tokens_per_character(data: Path, tokenizer: str) -> float:
    """Of the Chinese evaluation rows, end-of-text tokens included."""
    manifest = json.loads((data / f"{tokenizer}-packed_curve" / "manifest.json").read_text())
    texts = [json.loads(line)["text"] for line in (data / "zh_curve.jsonl").open(encoding="utf-8")]
    return manifest["categories"]["zh"]["tokens"] / sum(map(len, texts))
