"""How long rows may be: tables of positions that end, and frequencies that change with the length."""

import pytest
import torch

from coati.errors import UserError
from coati.models import Actor
from coati.models.positions import row_limit
from coati.rewards import SequenceClassifierReward
from coati.samples import Sample
from tests.models.families import GROUPED, SHARED, padded, tiny_config
from tests.trainers.test_saving import make

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
OPENAI = dict(n_embd=32, n_layer=2, n_head=4)
OF_64 = SMALL | dict(max_position_embeddings=64)
LEFT = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=64)
# what is built of 64 positions -> the longest row
CAUSAL = {
    "GPT2": (OPENAI | dict(n_positions=64), 64),
    "GPTBigCode": (OPENAI | dict(n_positions=64), 64),
    "GPTNeo": (
        dict(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
        64,
    ),
    "OPT": (SMALL | dict(ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64), 64),
    "BioGpt": (OF_64, 64),
    "GPTJ": (OPENAI | dict(n_positions=64, rotary_dim=4), 64),
    "CodeGen": (OPENAI | dict(n_positions=64, rotary_dim=4), 64),
    "OpenAIGPT": (OPENAI | dict(n_positions=64), 64),
    "Mpt": (dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64), 64),
    "CTRL": (OPENAI | dict(n_positions=64, dff=48), 64),
    "Bart": (LEFT | dict(is_decoder=True, is_encoder_decoder=False), 64),
    "Llama": (GROUPED, None),
    "Bloom": (dict(hidden_size=32, n_layer=2, n_head=4), None),
    "XGLM": (dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64), None),
}
CLASSIFIERS = {
    "Bert": (OF_64, 64),
    "DistilBert": (dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64), 64),
    "Electra": (OF_64, 64),
    "DebertaV2": (OF_64, 64),
    "Roberta": (OF_64, 62),
    "XLMRoberta": (OF_64, 62),
    "Camembert": (OF_64, 62),
    "MPNet": (OF_64, 62),
    "Longformer": (OF_64 | dict(attention_window=8), 62),
    "ModernBert": (OF_64, None),
}


def built(name: str, settings: dict, auto: str):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SHARED, "pad_token_id": 1, "bos_token_id": 0, **settings})
    return getattr(transformers, auto).from_config(config).eval()


CASES = [(name, "AutoModelForCausalLM", *case) for name, case in CAUSAL.items()]
CASES += [(name, "AutoModelForSequenceClassification", *case) for name, case in CLASSIFIERS.items()]


@pytest.mark.parametrize(("name", "auto", "settings", "limit"), CASES, ids=[case[0] for case in CASES])
@torch.no_grad()
def test_the_limit_is_where_the_model_breaks(name, auto, settings, limit):
    """REPORT 19: the last row that goes through is as long as we say, and the next one doesn't go through."""
    model = built(name, settings, auto)
    found = row_limit(model)
    assert (found.tokens if found else None) == limit

    def run(length: int):
        model(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length, dtype=torch.long))

    if limit is None:
        run(130)
        return
    run(limit)
    with pytest.raises((IndexError, RuntimeError)):
        run(limit + 1)


def long_rope(**changes):
    """A tiny Phi-3 with 16 original positions, whose long frequencies differ."""
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    settings = dict(rope_parameters=rope, original_max_position_embeddings=16, initializer_range=0.5)
    return Phi3Config(**{**SHARED, **GROUPED, **settings, **changes})


def dynamic(**changes):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return tiny_config("llama", rope_parameters=rope, max_position_embeddings=16, initializer_range=0.5, **changes)


@pytest.mark.parametrize("config", [long_rope, dynamic])
@torch.no_grad()
def test_rows_within_the_original_length_do_not_depend_on_their_neighbors(config):
    """REPORT 16: up to the limit that is found; beyond it they do, which is why it is one."""
    torch.manual_seed(0)
    actor = Actor(config=config()).eval()
    limit = row_limit(actor.transformer).tokens
    assert limit == 16
    short = torch.arange(5, 15)
    alone = actor(short[None])[0]
    for length in (limit, limit + 4):
        ids, mask = padded([short, torch.arange(20, 20 + length)], "right")
        difference = (actor(ids, mask)[0, : len(short)] - alone).abs().max()
        assert (difference < 1e-4) if length <= limit else (difference > 1e-2)


def test_a_limit_is_found_in_the_parts_of_a_config():
    """REPORT 16: where layers of two kinds have frequencies of their own."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
    }
    config = Gemma3TextConfig(**{**SHARED, **GROUPED, "head_dim": 8, "rope_parameters": rope})
    assert row_limit(Gemma3TextModel(config)).tokens == 64
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=32)
    assert row_limit(Actor(config=tiny_config("llama", rope_parameters=yarn)).transformer) is None


LONGEST = 30


@pytest.fixture(scope="module")
def policies(tiny_world, tmp_path_factory):
    """Policies of the tiny world that read rows of LONGEST tokens at most."""
    from transformers import AutoTokenizer

    tokenizer, folder = AutoTokenizer.from_pretrained(tiny_world["tokenizer"]), tmp_path_factory.mktemp("short")
    size = dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    configs = {
        "gpt2": tiny_config("gpt2", n_positions=LONGEST, **size),
        "opt": tiny_config("opt", **size | dict(max_position_embeddings=LONGEST)),
        "phi3": long_rope(**size, original_max_position_embeddings=LONGEST),
        "dynamic": tiny_config(
            "llama", **size | dict(rope_parameters=dynamic().rope_parameters, max_position_embeddings=LONGEST)
        ),
    }
    for name, config in configs.items():
        Actor(config=config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "dynamic"])
@pytest.mark.parametrize("algorithm", ["sft", "reward", "preference", "ppo", "grpo", "distill"])
def test_rows_that_are_too_long_are_refused_at_the_start(algorithm, family, policies, tiny_world, runtime, tmp_path):
    """REPORTS 16 and 19: in one line that has both lengths."""
    changes = dict(model=policies[family], model_config=None, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        UserError, match=rf"have up to \d+ tokens, and .* {LONGEST}: lower --max_length .*--max_new_tokens"
    ):
        make(algorithm, tiny_world, runtime, tmp_path / "run", **changes)
    if algorithm in ("sft", "ppo"):
        changes |= dict(max_length=28, max_prompt_length=28, max_new_tokens=2, too_long="drop")
        make(algorithm, tiny_world, runtime, tmp_path / "short", steps=1, **changes).train()


def test_sample_responses_count(policies, tiny_world, runtime, tmp_path):
    """REPORT 19: SFT's rows fit, and its responses to the evaluation prompts would not."""
    changes = dict(model=policies["gpt2"], model_config=None, max_length=28, too_long="drop", steps=1)
    with pytest.raises(UserError, match="have up to"):
        make("sft", tiny_world, runtime, tmp_path / "run", max_new_tokens=20, **changes)
    make("sft", tiny_world, runtime, tmp_path / "unsampled", max_new_tokens=20, eval_data=[], **changes).train()


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_classifiers_texts_are_cut_to_what_it_reads(kind, tiny_world):
    """REPORT 19: by default and at the most; RoBERTa's config says two tokens too many."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world["tokenizer"])
    settings, limit = CLASSIFIERS[kind]
    sizes = dict(num_labels=1, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=3)
    model = built(kind, settings | sizes, "AutoModelForSequenceClassification")
    reward = SequenceClassifierReward(model, tokenizer, pad_token="<pad>")
    assert reward.max_length == limit
    text = "the cat sat on the mat " * 40
    assert reward.score([Sample.of_texts(text, text)]).isfinite().all()
    with pytest.raises(UserError, match=rf"reads 1 to {limit} tokens, not max_length {limit + 1}"):
        SequenceClassifierReward(model, tokenizer, pad_token="<pad>", max_length=limit + 1)
