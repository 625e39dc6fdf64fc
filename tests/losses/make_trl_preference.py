"""Writes trl_preference.json: what TRL's own losses give on the responses in it. Run by a python that has TRL 1.16:

    .venv-trl-1.16/bin/python tests/losses/make_trl_preference.py

Nothing of TRL is copied: its trainers' methods run on objects that were never set up, on given log-probs of tokens. The
accelerator and the model are stand-ins: the one gathers from a single process, the other returns those log-probs.
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

FILE = Path(__file__).with_name("trl_preference.json")
PAIRS, WIDTH = 6, 9
KEEP = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def tokens(seed: int, rows: int, scale: float):
    """Log-probs of response tokens float64 `[rows, WIDTH - 1]`, 0 elsewhere, and the mask of the whole rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH - 1, (rows,), generator=generator)
    mask = torch.arange(WIDTH)[None] >= WIDTH - lengths[:, None]
    log_probs = -scale * torch.rand(rows, WIDTH - 1, dtype=torch.float64, generator=generator)
    return log_probs * mask[:, 1:], mask


def model_that_gives(*outputs):
    """A model whose calls return these log-probs of tokens, one after the other."""
    waiting = list(outputs)

    def model(**inputs):
        log_probs = waiting.pop(0)
        nothing = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    return model


def bare(trainer_class, **attributes):
    """A trainer without its set-up."""
    trainer = object.__new__(trainer_class)
    trainer.__dict__ |= attributes | {"accelerator": KEEP, "aux_loss_enabled": False}
    trainer.__dict__ |= {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    if not hasattr(trainer, "model"):
        trainer.model = SimpleNamespace(training=True)
    return trainer


def dpo(log_probs, mask, reference, types, weights, beta, smoothing):
    """`DPOTrainer._compute_loss` on precomputed reference log-probs: the mean loss."""
    settings = dict(loss_types=types, loss_weights=weights, beta=beta, label_smoothing=smoothing)
    settings |= dict(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False)
    trainer = bare(DPOTrainer, **settings)
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = dict(input_ids=mask.long(), attention_mask=torch.ones_like(mask), completion_mask=mask.long())
    inputs |= dict(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    return trainer._compute_loss(model_that_gives(log_probs), inputs, False).item()


def kto(log_probs, mask, reference, labels, mixed, mixed_reference, beta, weights):
    """`KTOTrainer._compute_loss`: the mean loss and its KL."""
    settings = dict(loss_type="kto", calculate_KL=True, precompute_ref_logps=True, beta=beta)
    settings |= dict(desirable_weight=weights[0], undesirable_weight=weights[1])
    trainer = bare(KTOTrainer, **settings)
    inputs = dict(input_ids=mask.long(), attention_mask=torch.ones_like(mask), completion_mask=mask.long())
    inputs |= {f"KL_{name}": value for name, value in inputs.items()}
    inputs |= dict(label=labels, ref_logps=reference.sum(1), ref_KL_logps=mixed_reference.sum(1))
    loss = trainer._compute_loss(model_that_gives(mixed, log_probs), inputs, False)
    return loss.item(), trainer._metrics["train"]["kl"][0]


def each_pair(function, log_probs, mask, reference, *rest):
    """One pair a batch, as with a batch size of 1 and gradient accumulation: the mean of the losses.

    A term that TRL divides by the tokens of a batch weighs responses by their length in any larger one."""
    losses = [
        function(*(torch.stack([x[i], x[PAIRS + i]]) for x in (log_probs, mask, reference)), *rest)
        for i in range(PAIRS)
    ]
    return sum(losses) / PAIRS


def reference_free(log_probs, mask, beta, smoothing, gamma, scale):
    """CPO's `cpo_loss` (on sums) and its SimPO (on averages), ORPO's `odds_ratio_loss` (on averages)."""
    sums, averages = log_probs.sum(1), log_probs.sum(1) / mask.sum(1)
    found = {}
    for name, read, kind in (("cpo", sums, "sigmoid"), ("simpo", averages, "simpo")):
        trainer = bare(CPOTrainer, loss_type=kind, beta=beta, label_smoothing=smoothing, simpo_gamma=gamma, alpha=0.0)
        found[name] = trainer.cpo_loss(*read.chunk(2))[0].mean().item()
    trainer = bare(ORPOTrainer, beta=beta)
    found["orpo"] = -trainer.odds_ratio_loss(*averages.chunk(2))[0].mean().item()  # float32 inside
    return found


def main():
    cases = []
    for seed, scale, beta, smoothing, gamma in (
        (0, 2.0, 0.1, 0.0, 0.5),
        (1, 0.5, 2.0, 0.1, 1.0),
        (2, 8.0, 0.5, 0.3, 0.0),
    ):
        log_probs, mask = tokens(seed, 2 * PAIRS, scale)
        reference = log_probs + 0.3 * scale * (tokens(seed + 100, 2 * PAIRS, 1.0)[0] + 0.5) * mask[:, 1:]
        mixed, mixed_reference = (tokens(seed + extra, 2 * PAIRS, scale)[0] for extra in (200, 300))
        labels = torch.arange(2 * PAIRS) % 3 != 0
        given = (log_probs, mask, reference)
        losses = {}
        for name, kind in (("dpo", "sigmoid"), ("robust-dpo", "robust"), ("hinge", "hinge"), ("ipo", "ipo")):
            if kind != "sigmoid" or smoothing == 0:  # TRL's sigmoid has no smoothing any more: CPO's has
                losses[name] = dpo(*given, [kind], [1.0], beta, smoothing)
        losses["dpo, length_normalized"] = dpo(*given, ["sigmoid_norm"], [1.0], beta, 0.0)
        losses["rpo"] = each_pair(dpo, *given, ["sigmoid", "sft"], [1.0, 0.7], beta, 0.0)
        losses["kto"], kl = kto(*given, labels, mixed, mixed_reference, beta, (1.0, 1.5))
        losses |= reference_free(log_probs, mask, beta, smoothing, gamma, scale)
        cases.append(
            {
                "beta": beta,
                "label_smoothing": smoothing,
                "gamma": gamma,
                "log_probs": log_probs.sum(1).tolist(),
                "lengths": mask.sum(1).tolist(),
                "reference": reference.sum(1).tolist(),
                "desirable": labels.tolist(),
                "mixed_log_ratios": (mixed - mixed_reference).sum(1).tolist(),
                "kl": kl,
                "losses": losses,
            }
        )
    origin = f"tests/losses/make_trl_preference.py with TRL {version('trl')}, torch {torch.__version__}"
    FILE.write_text(json.dumps({"origin": origin, "trl": version("trl"), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
