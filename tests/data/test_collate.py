"""Batches: padded to their longest row, with masks from lengths."""

import torch

from coati.data import (
    PreferenceSample,
    TokenSequence,
    collate_preference,
    collate_sft,
)

EOS = PAD = 2
SHORT = TokenSequence([5, EOS, 6, EOS], [False, False, True, True])
LONG = TokenSequence([5, 5, 7, 7, 7, EOS], [False, False, True, True, True, True])


def test_sft_rows_are_padded_on_the_right_to_the_longest():
    """PITFALL 15: not to max_length."""
    batch = collate_sft([SHORT, LONG], PAD)
    assert batch.input_ids.tolist() == [[5, EOS, 6, EOS, PAD, PAD], LONG.input_ids]
    assert batch.input_ids.dtype == torch.long
    assert batch.attention_mask.dtype == batch.loss_mask.dtype == torch.bool


def test_an_eos_that_equals_pad_stays_visible_and_a_label():
    """PITFALL 6: pad token = EOS."""
    batch = collate_sft([SHORT, LONG], PAD)
    assert batch.attention_mask.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert batch.loss_mask.tolist() == [[*SHORT.loss_mask, False, False], LONG.loss_mask]


def test_width_can_be_a_multiple():
    assert collate_sft([SHORT, LONG], PAD, multiple_of=4).input_ids.shape == (2, 8)
    assert collate_sft([SHORT], PAD, multiple_of=4).input_ids.shape == (1, 4)
    pairs = [PreferenceSample(SHORT, LONG, 1.5)]
    assert collate_preference(pairs, PAD, multiple_of=5).input_ids.shape == (2, 10)


def test_width_is_that_of_the_longest_row_if_nothing_else_is_said():
    odd = TokenSequence([5, 6, EOS], [False, True, True])
    assert collate_sft([odd], PAD).input_ids.shape == (1, 3)
    assert collate_preference([PreferenceSample(odd, odd, 0.0)], PAD).input_ids.shape == (2, 3)


def test_preference_rows_are_all_chosen_then_all_rejected():
    samples = [PreferenceSample(SHORT, LONG, 1.5), PreferenceSample(SHORT, SHORT, 0.0, tie=True)]
    assert collate_preference(samples, PAD).tie.tolist() == [False, True]
    batch = collate_preference(samples, pad_id=9)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    assert lengths == [4, 4, 6, 4] and batch.input_ids.shape == (4, 6)
    assert batch.input_ids.tolist() == [[*SHORT.input_ids, 9, 9]] * 2 + [LONG.input_ids, [*SHORT.input_ids, 9, 9]]
    assert batch.loss_mask[:3].tolist() == [[*SHORT.loss_mask, False, False]] * 2 + [LONG.loss_mask]
    assert batch.margin.tolist() == [1.5, 0.0] and batch.margin.dtype == torch.float32


def test_to_moves_every_tensor():
    moved = collate_preference([PreferenceSample(SHORT, LONG, 1.5)], PAD).to("meta")
    tensors = [x for x in vars(moved).values() if x is not None]  # no trainer has put a reference in
    assert len(tensors) == 5 and {x.device.type for x in tensors} == {"meta"}
