"""Writes trl_distillation.json: what TRL's generalized JSD gives on the logits in it. For a python that has TRL 1.16:

.venv-trl-1.16/bin/python tests/losses/make_trl_distillation.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from trl.experimental.gkd import GKDTrainer

FILE = Path(__file__).with_name("trl_distillation.json")
TOKENS, VOCABULARY = 3, 5


def main():
    cases = []
    for seed, scale in ((0, 1.0), (1, 5.0), (2, 20.0)):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = scale * torch.randn(2, 1, TOKENS, VOCABULARY, dtype=torch.float64, generator=generator)
        losses = []
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
            for temperature in (1.0, 0.9):
                how = dict(beta=beta, temperature=temperature)
                loss = GKDTrainer.generalized_jsd_loss(student, teacher, reduction="sum", **how)
                losses.append(how | {"loss": loss.item()})
        cases.append({"student": student[0].tolist(), "teacher": teacher[0].tolist(), "losses": losses})
    origin = f"tests/losses/make_trl_distillation.py with TRL {version('trl')}, torch {torch.__version__}"
    FILE.write_text(json.dumps({"origin": origin, "trl": version("trl"), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
