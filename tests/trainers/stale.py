"""A sampler that is not the policy: it has older weights, or rounded ones."""

from collections import deque

import torch

from coati.run_layout import ACTOR


def make_stale(trainer, monkeypatch, *, iterations: int = 0, rounded: bool = False):
    """Has a GRPO trainer's responses sampled by its policy of some iterations ago, or by the first one before.

    Log-probs noted at sampling are the sampler's own, and the trainer's are computed anew unless it bypasses them.

    Args:
        rounded: the sampler's weights are rounded to bfloat16.
    """
    policy, rollouts = trainer.engines[ACTOR].module, trainer.rollouts.next
    past = deque(maxlen=iterations + 1)

    def copied() -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in policy.state_dict().items()}

    def sampled(k):
        current = copied()
        past.append(current)
        old = {name: weight.bfloat16().float() if rounded else weight for name, weight in past[0].items()}
        policy.load_state_dict(old)
        batch = rollouts(k)
        policy.load_state_dict(current)
        return batch

    monkeypatch.setattr(trainer.rollouts, "next", sampled)
    monkeypatch.setattr(trainer.policy, "rounds_as_sampling", lambda: False)
