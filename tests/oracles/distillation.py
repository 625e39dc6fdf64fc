"""Distillation's losses as slow loops over python floats, written from GKD's equations (2306.13649, section 3)."""

import math

from tests.oracles.losses import _log_softmax, _tokens


def _kl(p, q):
    """KL(p || q) of two distributions as lists of log-probs; 0 log 0 is 0."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a != -math.inf)


def _log_sum(a, b):
    """log(exp(a) + exp(b))."""
    top = max(a, b)
    return top if top == -math.inf else top + math.log(math.exp(a - top) + math.exp(b - top))


def vocabulary_divergence(student, teacher, kind, beta=0.5, temperature=1.0):
    """One number per position, from the logits of both models there, `[positions][vocab]`."""
    found = []
    for student_logits, teacher_logits in zip(student, teacher, strict=True):
        s, t = (_log_softmax([x / temperature for x in logits]) for logits in (student_logits, teacher_logits))
        if kind == "forward":
            found.append(_kl(t, s))
        elif kind == "reverse":
            found.append(_kl(s, t))
        else:
            m = [_log_sum(math.log(beta) + b, math.log(1 - beta) + a) for a, b in zip(s, t, strict=True)]
            found.append(beta * _kl(t, m) + (1 - beta) * _kl(s, m))
    return found


def distillation_loss(divergences, mask, denominator):
    return math.fsum(divergences[b][t] for b, t in _tokens(mask)) / denominator


def without_first(mask, count):
    """A row at a time: how many of its tokens have been seen."""
    found = []
    for row in mask:
        seen = 0
        kept = []
        for real in row:
            seen += int(real)
            kept.append(bool(real) and seen > count)
        found.append(kept)
    return found
