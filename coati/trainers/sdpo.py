"""Self-distillation policy optimization (SDPO, Hübotter et al., 2601.20802), where rewards tell which responses are
good and nothing else is fed back.

One iteration:
    1. the policy responds to each of a batch of prompts several times, and the rewards score
    2. a response's demonstration is the first other one of its group that has earned `success_reward`; a response
       without a demonstration is left out
    3. the teacher, an average of the policy, reads the demonstration in its prompt, and then the response
    4. one optimizer step on the mean divergence of both models' distributions, over the tokens of all responses that
       have a demonstration

So a token is compared with what the policy would have thought of it, had it known a solution; in GRPO all tokens of a
response share one advantage. Departures: the demonstration is the sampled tokens themselves, without those that end
it, and not a text that is tokenized again; the mean is over the tokens of the whole step, and the divergences are those
of the whole vocabulary, where the authors' code takes micro-batches and, in its scripts, the most likely tokens and a
rest.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from coati.data import TokenSequence
from coati.samples import Sample
from coati.trainers.distill import DistillTrainer
from coati.trainers.rollouts import RolloutTrainer, after_prompt
from coati.transfer import upload


class SDPOTrainer(DistillTrainer):
    """Trains a `Student`, whose step is that of `DistillTrainer`."""

    best_metric = ("reward", True)

    def own_responses(self, k):
        """This rank's micro-batches of iteration k's responses, as both models read them, and metrics of them. Those of
        responses without a demonstration have nothing that is learned."""
        a = self.config.algorithm
        batch, metrics = self.rollouts.next(k)
        demonstrations = find_demonstrations(batch.samples, a.group_size, a.success_reward)
        of_teacher = [self.with_demonstration(*pair) for pair in zip(batch.samples, demonstrations, strict=True)]
        parts = self.split(batch, of_teacher, self.data)
        metrics["rollout_kl"] = self.policy.rollout_kl_of_some(batch, [part.rows for part in parts], k)
        demonstrated = [demonstration is not None for demonstration in demonstrations]
        learns = upload(demonstrated, self.runtime.device, torch.bool)
        batch = replace(batch, response_mask=batch.response_mask & learns[:, None])
        successes = sum(sample.total_reward >= a.success_reward for sample in batch.samples)
        shares = {
            "success": successes / self.config.responses,
            "demonstrated": sum(demonstrated) / self.config.responses,
        }
        return self.readings(batch, of_teacher, parts), metrics | self.ranks.sum_metrics([shares])

    def with_demonstration(self, sample: Sample, demonstration: Sample | None) -> TokenSequence:
        """What the teacher reads of a sample; without a demonstration, the sample."""
        if demonstration is None:
            return TokenSequence(sample.tokens, [False] * len(sample.tokens))
        prompt = self.data[sample.row]
        ends = set(self.generation.sampler.ends)
        pairs = zip(demonstration.tokens, demonstration.response_mask, strict=True)
        response = [token for token, is_sampled in pairs if is_sampled and token not in ends]
        return after_prompt([*prompt.teacher_ids, *response, *prompt.teacher_rest], sample)

    # --- evaluation: a response without its group has no teacher

    sample_rows = RolloutTrainer.sample_rows

    # --- building

    build_scorer = RolloutTrainer.build_scorer

    def teaching(self):
        return replace(super().teaching(), has_place=True)

    def longest_sequence(self):
        return super().longest_sequence() + self.config.generation.max_new_tokens


def find_demonstrations(samples: Sequence[Sample], group_size: int, least: float) -> list[Sample | None]:
    """Of each sample, the first other one of its group that has earned `least`; None where there is none.

    Args:
        samples: the samples of a group one after the other.
    """
    found: list[Sample | None] = []
    for start in range(0, len(samples), group_size):
        group = samples[start : start + group_size]
        successes = [sample for sample in group if sample.total_reward >= least]
        found += [next((other for other in successes if other is not sample), None) for sample in group]
    return found
