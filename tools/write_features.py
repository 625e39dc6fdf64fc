"""Writes the table of architectures and features in docs/plugins.md: `python tools/write_features.py`.

Each cell is tried with a tiny model of the tests, by the same check that a run makes at its start. A test holds that
the committed page is what this writes.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "plugins.md"
MARKED = re.compile(r"(<!-- features -->\n).*?(<!-- end of features -->)", re.DOTALL)


def page() -> str:
    """The page with the current table."""
    from coati.parallel.decoders import DECODERS
    from examples.stages import table_of
    from tests.models.families import NOT_SPLIT

    heads = [*FEATURES, *OF_EXPERTS]
    rows = [[family, *cells_of(family)] for family in (*DECODERS, *NOT_SPLIT)]
    table = table_of(["", *(f"`{name}`" for name in heads)], rows)
    return MARKED.sub(lambda mark: f"{mark[1]}\n{table}\n\n{mark[2]}", PAGE.read_text(encoding="utf-8"))


def cells_of(family: str) -> list[str]:
    """yes or no; of what is for experts, nothing where there are none."""
    from coati.models.experts import is_experts

    model = model_of(family)
    has_experts = any(map(is_experts, model.modules()))
    cells = ["yes" if tried(try_feature, family) else "no" for try_feature in FEATURES.values()]
    for try_feature in OF_EXPERTS.values():
        cells.append(("yes" if tried(try_feature, family) else "no") if has_experts else "")
    return cells


def tried(try_feature: Callable[[str], None], family: str) -> bool:
    from coati.errors import UserError

    try:
        try_feature(family)
    except UserError:
        return False
    return True


def model_of(family: str):
    from coati.models import Actor
    from tests.models import families

    return families.model_of(Actor, family)


def forward_all(model, inputs: list[dict]) -> list:
    import torch

    with torch.no_grad():
        return [model(**one) for one in inputs]


# --- the features, by the settings that ask for them; each raises a UserError where a run would


def split_tensors(family: str, split_sequence: bool = False):
    from coati.parallel.decoders import check_splits

    check_splits(model_of(family), 2, 1, split_sequence)


def split_layers(family: str):
    from coati.parallel.decoders import check_splits

    check_splits(model_of(family), 1, 2)


def split_rows(family: str):
    from coati.parallel.sequence import use_sequence_parallel_attention

    use_sequence_parallel_attention(model_of(family).transformer, None)


def quantize(family: str):
    import tempfile

    from coati.errors import UserError
    from coati.models import Actor
    from coati.models.quantized import is_quantized

    with tempfile.TemporaryDirectory() as folder:
        model_of(family).save_pretrained(folder)
        packed = Actor(folder, quantize_base=True)
        if not is_quantized(packed.transformer) or not any(hasattr(p, "quant_state") for p in packed.parameters()):
            raise UserError("nothing is in 4 bits")


def read_prompts_once(family: str):
    import torch

    from coati.models.packed import check_packing

    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12, 4, 3]])
    real = torch.ones_like(ids, dtype=torch.bool)
    targets = real.clone()
    targets[:, :8] = False
    inputs = dict(input_ids=ids, attention_mask=real, targets=targets, shared_prefix_group=2)
    model = model_of(family)
    check_packing(model, partial(forward_all, model), [inputs], exact=True)


def leave_padding_out(family: str):
    import torch

    from coati.models.packed import check_isolation

    model = model_of(family)
    model.padding_free = True
    check_isolation(model, partial(forward_all, model), torch.device("cpu"))


def split_feed_forward(family: str):
    from coati.models.long_rows import split_feed_forward

    split_feed_forward(model_of(family).transformer, 4)


def even_experts(family: str):
    from coati.parallel.expert_load import ExpertLoad

    ExpertLoad(model_of(family), 0.1)


def replay_experts(family: str):
    from coati.models.routing import RoutingReplay

    RoutingReplay(model_of(family))


FEATURES = {
    "tensor_parallel": split_tensors,
    "pipeline_parallel": split_layers,
    "sequence_parallel": split_rows,
    "split_sequence": partial(split_tensors, split_sequence=True),
    "quantize_base": quantize,
    "share_prompts": read_prompts_once,
    "padding_free": leave_padding_out,
    "feed_forward_tokens": split_feed_forward,
}
OF_EXPERTS = {"router_loss": even_experts, "router_replay": replay_experts}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
