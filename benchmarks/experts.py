"""Where a mixture's experts may be: in the tensor-parallel group, each process computing its own for all tokens, as
coati does; or spread over data-parallel processes, tokens traveling to them and back (all-to-all).

    python benchmarks/experts.py --save    # 6 minutes; writes benchmarks/results/experts.json

Two processes of one thread, gloo, fp32: forward and backward pass and the exchange of gradients of a Qwen3 mixture of
16 experts, 2 or 8 for each token. Losses are compared, too. The all-to-all is here and nowhere else: what it would
save is what decides whether coati should have it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.contest import machine, store  # noqa: E402
from examples.stages import free_port  # noqa: E402

PROCESSES, LENGTH, VOCABULARY = 2, 512, 8000
EVERY = dict(num_key_value_heads=4, head_dim=64, num_experts=16, vocab_size=VOCABULARY, norm_topk_prob=True)
SHAPES = {  # by hidden size: the model's, and how many rows; the second is as wide as Qwen3-30B-A3B
    512: (dict(num_hidden_layers=4, num_attention_heads=8, moe_intermediate_size=256), 8),
    2048: (dict(num_hidden_layers=1, num_attention_heads=32, moe_intermediate_size=768), 4),
}
CASES = [(512, 2), (512, 8), (2048, 2), (2048, 8)]  # hidden size, experts of a token


class Exchange(torch.autograd.Function):
    """Rows go to other processes; their gradients come back."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int]):
        ctx.sizes = received, sent
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return Exchange.apply(gradient, *ctx.sizes), None, None


def spread_experts(experts: nn.Module, rank: int):
    """Leaves this process its range of a layer's experts, and has tokens travel to the others'."""
    count = experts.num_experts = experts.num_experts // PROCESSES
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(parameter.detach()[rank * count :][:count].clone()))
        getattr(experts, name).of_experts = True
    compute = experts.forward

    def forward(states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        per_token = chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)  # by expert, so by process too
        counts = torch.bincount(chosen.flatten(), minlength=PROCESSES * count)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        sent, received = (x.view(PROCESSES, count).sum(1).tolist() for x in (counts, theirs))
        rows = Exchange.apply(states[order // per_token], sent, received)
        own = torch.arange(count).repeat(PROCESSES).repeat_interleave(theirs)[:, None]
        rows = Exchange.apply(compute(rows, own, rows.new_ones(len(rows), 1)), received, sent)
        outputs = torch.empty_like(rows).index_copy(0, order, rows).view(len(chosen), per_token, -1)
        return (outputs * weights[..., None]).sum(1)

    experts.forward = forward


def make_model(hidden: int, per_token: int):
    from transformers import Qwen3MoeConfig

    from coati.models import Actor

    torch.manual_seed(0)
    shape = EVERY | SHAPES[hidden][0] | dict(num_experts_per_tok=per_token, max_position_embeddings=LENGTH)
    return Actor(config=Qwen3MoeConfig(hidden_size=hidden, **shape))


def steps(hidden: int, per_token: int, rank: int) -> dict[str, Callable[[], float]]:
    """By contender, what computes all gradients and gives the loss of all tokens."""
    from coati.losses import cross_entropy
    from coati.models.experts import is_experts
    from coati.parallel.policy import split_tensors

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (SHAPES[hidden][1], LENGTH), generator=generator)
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False

    def together(split_sequence: bool) -> Callable[[], float]:
        model = make_model(hidden, per_token)
        split_tensors(model, dist.group.WORLD, split_sequence)

        def step() -> float:
            model.zero_grad()
            loss, _ = cross_entropy(model(ids, targets=targets, right_padded=True), targets, float(targets.sum()))
            loss.backward()
            return loss.item()

        return step

    def apart(spreads: bool) -> Callable[[], float]:
        model = make_model(hidden, per_token)
        for module in model.modules() if spreads else ():
            if is_experts(module):
                spread_experts(module, rank)
        own_ids, own_targets = (x[rank::PROCESSES] for x in (ids, targets))

        def step() -> float:
            model.zero_grad()
            loss, _ = cross_entropy(
                model(own_ids, targets=own_targets, right_padded=True), own_targets, float(targets.sum())
            )
            loss.backward()
            everywhere = [p.grad.flatten() for p in model.parameters() if not hasattr(p, "of_experts")]
            dist.all_reduce(torch.cat(everywhere))
            total = loss.detach().clone()
            dist.all_reduce(total)
            return total.item()

        return step

    return {
        "tensor group": together(split_sequence=False),
        "tensor group, split sequence": together(split_sequence=True),
        "all-to-all": apart(spreads=True),
        "every process all experts": apart(spreads=False),
    }


def work(rank: int, port: int, rounds: int, told):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for case in CASES:
        seconds: dict[str, list[float]] = {}
        contenders = steps(*case, rank)
        for _ in range(1 + rounds):
            losses = []
            for name, step in contenders.items():
                dist.barrier()
                started = time.perf_counter()
                losses.append(step())
                dist.barrier()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
            assert max(losses) - min(losses) < 1e-4 * losses[0], losses
        if rank == 0:
            told.put((case, {name: statistics.median(found[1:]) for name, found in seconds.items()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each, after one to warm up")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/experts.json")
    options = parser.parse_args()
    told = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (free_port(), options.rounds, told), nprocs=PROCESSES)
    cases = {f"{hidden} wide, {k} per token": found for (hidden, k), found in (told.get() for _ in CASES)}
    result = {"machine": machine(PROCESSES), "rounds": options.rounds, "cases": cases}
    print(json.dumps(result))
    if options.save:
        store(result, "experts", "cases")


if __name__ == "__main__":
    main()
