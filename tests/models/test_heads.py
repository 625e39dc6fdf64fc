"""Critic and RewardModel: shapes, the last real token, padding on either side."""

import pytest
import torch

from coati.models import Critic, RewardModel
from tests.models.families import EOS, FAMILIES, PAD, padded, rows, tiny_config


def make(model_class, family, **overrides):
    torch.manual_seed(0)
    return model_class(config=tiny_config(family, **overrides)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_critic_gives_a_value_a_token_and_padding_does_not_matter(family):
    """PITFALL 2: values of the real tokens are the same for left, right and no padding."""
    critic, tokens = make(Critic, family), rows()
    alone = [critic(x[None])[0] for x in tokens]
    for side in ("left", "right"):
        ids, mask = padded(tokens, side, extra=2)
        values = critic(ids, mask)
        assert values.shape == ids.shape
        assert values.dtype == torch.float32
        for row, expected in enumerate(alone):
            torch.testing.assert_close(values[row][mask[row]], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_is_read_at_the_last_real_token_for_any_padding(family):
    """PITFALL 5: never at a PAD token. With the mask, and without it by the config's pad token."""
    model, tokens = make(RewardModel, family), rows()
    expected = torch.stack([model.token_values(x[None], None)[0, -1] for x in tokens])
    assert expected.unique().numel() == len(tokens)
    for side in ("left", "right"):
        for mask_given in (True, False):
            ids, mask = padded(tokens, side, extra=2)
            rewards = model(ids, mask if mask_given else None)
            assert rewards.shape == (3,)
            assert rewards.dtype == torch.float32
            torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eos", [EOS, [9, EOS]])
def test_a_real_eos_that_is_also_the_pad_token_is_scored(eos):
    """PITFALL 6: pad = EOS: the row's own EOS is its last real token, whatever the padding looks like."""
    model = make(RewardModel, "gpt2", pad_token_id=EOS, eos_token_id=eos)
    tokens = [torch.cat([x, torch.tensor([EOS])]) for x in rows()]
    expected = torch.stack([model.token_values(x[None], None)[0, -1] for x in tokens])
    for side in ("left", "right"):
        rewards = model(*padded(tokens, side, fill=EOS))
        torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)
    unmasked = model(tokens[0][None])
    torch.testing.assert_close(unmasked, expected[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pad", [PAD, None])
def test_without_mask_and_padding_every_token_counts(pad):
    model = make(RewardModel, "llama", pad_token_id=pad)
    ids = torch.stack(rows(lengths=(5, 5)))
    torch.testing.assert_close(model(ids), model.token_values(ids, None)[:, -1], rtol=1e-5, atol=1e-6)


def test_value_head_is_stored_beside_the_transformer_and_read_back(tmp_path):
    """PITFALL 13, PITFALL 23: a critic that starts from a reward model's folder has its head as well."""
    reward = make(RewardModel, "opt")
    reward.save_pretrained(tmp_path)
    critic = Critic(tmp_path)
    assert torch.equal(critic.value_head.weight, reward.value_head.weight)
    assert critic.value_head.bias == 0, "a reward model's head has no bias"
    ids, mask = padded(rows(), "right")
    values = critic.eval()(ids, mask)
    assert torch.equal(values.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0], reward(ids, mask))


@pytest.mark.parametrize("model_class", [Critic, RewardModel])
def test_a_trained_head_round_trips(model_class, tmp_path):
    """PITFALL 21: weight and, where there is one, bias."""
    model = make(model_class, "llama")
    for parameter in model.value_head.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = model_class(tmp_path)
    for name, parameter in model.value_head.named_parameters():
        assert torch.equal(again.value_head.get_parameter(name), parameter)


def test_a_head_file_without_weights_is_an_error(tmp_path):
    """PITFALL 26: a damaged folder is never taken for a whole one."""
    from safetensors.torch import save_file

    make(Critic, "llama").save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "value_head.safetensors")
    with pytest.raises((ValueError, RuntimeError)):
        Critic(tmp_path)


def test_bf16_models_give_float32_values():
    """PITFALL 11."""
    torch.manual_seed(0)
    model = RewardModel(config=tiny_config("llama"), dtype=torch.bfloat16)
    assert model(*padded(rows(), "left")).dtype == torch.float32
