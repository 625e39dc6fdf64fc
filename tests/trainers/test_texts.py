"""What rewards, samples and reports read of tokens; and runs whose templates open a thought or take arguments."""

import dataclasses

import pytest

from coati.config import configure
from coati.rewards import Reward
from coati.rollout import Completion, PolicyGenerator, prompt_of
from coati.rollout.generator import notify_done
from coati.rollout.prompts import response_texts
from coati.trainers.pairs import text_of
from examples.tokenizer import byte_level_tokenizer
from tests.conftest import SPECIAL, WORDS, settings_for, trainer_classes

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>"]
# The EOS is not all that ends a turn: the model's generation config has another token.
TEMPLATE = """\
{%- for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}
{%- if add_generation_prompt and (thinks is not defined or thinks) %}{{ '<think>' }}{% endif %}"""


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """As `tiny_world`, with a tokenizer whose tags are special tokens, as those of reasoning models are."""
    from transformers import GenerationConfig, LlamaConfig

    from coati.models import Actor

    root = tmp_path_factory.mktemp("tags")
    tokenizer = byte_level_tokenizer([f"user: {' '.join(WORDS)}"] * 4, 320, SPECIAL)
    tokenizer.add_special_tokens({"extra_special_tokens": [*TAGS, "<end>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "policy")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes)
    actor = Actor(config=config)
    ends = [1, tokenizer.convert_tokens_to_ids("<end>")]
    actor.transformer.generation_config = GenerationConfig(eos_token_id=ends)
    actor.save_pretrained(root / "policy")
    return tiny_world | {"policy": str(root / "policy"), "tokenizer": str(root / "policy"), "root": root}


def make(algorithm, world, runtime, tmp_path, /, **changes):
    config_class, trainer_class = trainer_classes(algorithm)
    changes |= dict(model=world["policy"], model_config=None, output_dir=str(tmp_path / algorithm))
    return trainer_class(configure(config_class, **settings_for(algorithm, world, **changes)), runtime)


SAID = "<think>red lamp</think><answer>blue</answer>"


def respond_with(monkeypatch, tokenizer, *texts):
    """Has policies complete prompts with these texts, one after the other."""

    def generate(self, requests, sampling, on_done=None):
        rows = tokenizer(list(texts[: len(requests)]), add_special_tokens=False)["input_ids"]
        return notify_done([Completion(ids, [-1.0] * len(ids), "eos") for ids in rows], on_done)

    monkeypatch.setattr(PolicyGenerator, "generate", generate)


@pytest.mark.parametrize("end", ["<eos>", "<end>", "<pad>", "<eos><pad><pad>", ""])
@pytest.mark.parametrize("said", [SAID, "plain words", "<tool_call>{}", "<bos>x", "</think>", " a  b\n"])
def test_only_what_ends_a_turn_is_taken_out_of_a_response(said, end, world):
    """REPORT 9: EOS, padding and the generation config's ends; no other special token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world["policy"])
    ends = [tokenizer.convert_tokens_to_ids("<end>")]
    assert response_texts(tokenizer, tokenizer([said + end], add_special_tokens=False)["input_ids"], ends) == [said]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_rewards_read_special_tokens_that_carry_content(algorithm, world, runtime, tmp_path, monkeypatch):
    """REPORT 9: also those that score while others generate; the verifier of tags sees them."""
    rewards = dict(rewards=["format"], reward_workers=0)
    trainer = make(algorithm, world, runtime, tmp_path, chat_template_kwargs={"thinks": False}, **rewards)
    respond_with(monkeypatch, trainer.tokenizer, SAID + "<end>", "red<eos>")
    samples = trainer.generation.sample(
        [prompt_of(trainer.data, row, [row]) for row in (0, 1)], trainer.config.generation
    ).samples
    assert [(sample.response, sample.score) for sample in samples] == [(SAID, 1.0), ("red", 0.0)]


def test_samples_and_reports_show_special_tokens(world, runtime, tmp_path, monkeypatch):
    """REPORT 9: of SFT and of reward models."""
    trainer = make("sft", world, runtime, tmp_path, samples=1)
    respond_with(monkeypatch, trainer.tokenizer, SAID + "<end>")
    [sample] = trainer.samples({})
    assert sample["response"] == SAID and sample["prompt"].startswith("user: ")
    reward = make("reward", world, runtime, tmp_path)
    ids = reward.tokenizer(["user: red\nassistant: ", SAID + "<eos>"], add_special_tokens=False)["input_ids"]
    side = dataclasses.replace(
        reward.data[0].chosen, input_ids=[*ids[0], *ids[1]], loss_mask=[False] * len(ids[0]) + [True] * len(ids[1])
    )
    assert text_of(reward.tokenizer, side) == {"prompt": "user: red\nassistant: ", "response": SAID}


def test_best_of_n_reads_special_tokens(world, monkeypatch):
    """REPORT 9: as rewards in training do."""
    from transformers import AutoTokenizer

    from coati.models import Actor
    from coati.rollout import best_of_n

    tokenizer = AutoTokenizer.from_pretrained(world["policy"])
    respond_with(monkeypatch, tokenizer, SAID + "<end>", "red<eos>")

    class Tagged(Reward):
        def score(self, samples):
            return [float("<answer>" in sample.response) for sample in samples]

    [found] = best_of_n(Actor(world["policy"]), Tagged(), ["red"], 2, tokenizer=tokenizer)
    assert (found.response, found.scores) == (SAID, [1.0, 0.0])


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_policy_whose_template_opens_a_thought_learns(algorithm, world, runtime, tmp_path):
    """REPORTS 7 and 29: a run of two steps; its prompts end as the template says, its argument switches that off."""
    trainer = make(algorithm, world, runtime, tmp_path, steps=2)
    assert trainer.data[0].text.endswith("\nassistant: <think>")
    assert trainer.data[0].input_ids[-1] == trainer.tokenizer.convert_tokens_to_ids("<think>")
    trainer.train()
    other = make(algorithm, world, runtime, tmp_path / "other", chat_template_kwargs={"thinks": False})
    assert other.data[0].text.endswith("\nassistant: ")


def test_a_policy_needs_no_template_that_writes_responses(world, runtime, tmp_path):
    """REPORT 7: nothing of the data's responses is learned."""
    path = tmp_path / "chat.jinja"
    path.write_text("{{ raise_exception('no') if messages[-1].role != 'user' else messages[-1].content + '<think>' }}")
    trainer = make("grpo", world, runtime, tmp_path, chat_template=str(path))
    assert trainer.data[0].text.endswith("<think>")


def test_sft_with_such_a_template_says_so_and_learns(world, runtime, tmp_path, monkeypatch):
    """REPORT 7: rows whose template writes no thought are learned as it writes them."""
    said = []
    monkeypatch.setattr(runtime, "say", said.append)
    trainer = make("sft", world, runtime, tmp_path, steps=1, samples=1, max_new_tokens=2)
    assert any("ends a prompt with '<think>'" in line for line in said)
    trainer.train()
