"""The figures that the Colossal-LLaMA-2-7B-base card publishes, and ours computed the same way beside them.

Source: the model card hpcai-tech/Colossal-LLaMA-2-7b-base, section "Performance Evaluation": MMLU and CMMLU 5-shot by
the first token; AGIEval 5-shot, four-choice questions by "exact match or first token"; GAOKAO-Bench 0-shot, four-choice
questions by the first token; C-Eval (5-shot) from its leaderboard. Accuracy in percent.
"""

from __future__ import annotations

from collections.abc import Iterable

from colossal_eval.scores.metrics import mean

COLUMNS = ("mmlu", "cmmlu", "agieval", "gaokao_bench", "ceval")
CARD = {
    "Baichuan-7B": (42.32, 44.53, 38.72, 36.74, 42.80),
    "Baichuan2-7B-Base": (46.97, 57.67, 45.76, 52.60, 54.00),
    "ChatGLM-6B": (39.67, 41.17, 40.10, 36.53, 38.90),
    "ChatGLM2-6B": (44.74, 49.40, 46.36, 45.49, 51.70),
    "InternLM-7B": (46.70, 52.00, 44.77, 61.64, 52.80),
    "Qwen-7B (original)": (54.29, 56.03, 52.47, 56.42, 59.60),
    "Qwen-7B": (58.33, 62.54, 64.34, 74.05, 63.50),
    "Llama-2-7B": (44.47, 32.97, 32.60, 25.46, None),
    "Linly-AI/Chinese-LLaMA-2-7B-hf": (37.43, 29.92, 32.00, 27.57, None),
    "wenge-research/yayi-7b-llama2": (38.56, 31.52, 30.99, 25.95, None),
    "ziqingyang/chinese-llama-2-7b": (33.86, 34.69, 34.52, 25.18, 34.2),
    "TigerResearch/tigerbot-7b-base": (43.73, 42.04, 37.64, 30.61, None),
    "LinkSoul/Chinese-Llama-2-7b": (48.41, 38.31, 38.45, 27.72, None),
    "FlagAlpha/Atom-7B": (49.96, 41.10, 39.83, 33.00, None),
    "Colossal-LLaMA-2-7b-base": (53.06, 49.89, 51.48, 58.82, 50.20),
}
METRICS = {"agieval": "combined"}


def compare_published(models: list[str], records_of: dict[str, dict[str, Iterable[dict]]]) -> list[dict]:
    """Rows of the card and of ours, `{"name", "columns", "figures": {benchmark: text}}`.

    Args:
        found: records by benchmark and model. Questions with four choices and one answer count; those whose metric the
            card uses was not computed leave the figure out.
    """
    rows = [
        {"name": name, "figures": {c: f"{v:.2f}" for c, v in zip(COLUMNS, values, strict=True) if v is not None}}
        for name, values in CARD.items()
    ]
    for model in models:
        figures = {}
        for benchmark in COLUMNS:
            metric = METRICS.get(benchmark, "first_token")
            records = records_of.get(benchmark, {}).get(model, ())
            scores = [
                record["scores"][metric]
                for record in records
                if record["kind"] == "single_choice" and len(record["labels"]) == 4 and metric in record["scores"]
            ]
            if scores:
                figures[benchmark] = f"{100 * mean(scores).value:.2f} (ours, n = {len(scores):,})"
        rows.append({"name": model, "figures": figures})
    return [row | {"columns": list(COLUMNS)} for row in rows]
