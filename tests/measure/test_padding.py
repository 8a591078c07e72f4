"""Padding is left out of what is measured, wherever masks and shapes tell it."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from optimum_fp8 import FP8Config, calibrate, prepare
from optimum_fp8.errors import FP8Error
from optimum_fp8.lifecycle.state import state_of
from optimum_fp8.measure.padding import Padding

VALID = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
ROWS, HEADS, LENGTH, SIZE = 2, 3, 5, 4


def marked():
    """`[batch, length, heads, size]`: NaN where there is padding, 1 elsewhere."""
    return torch.ones(ROWS, LENGTH, HEADS, SIZE).masked_fill(VALID[:, :, None, None] == 0, torch.nan)


SHAPES = {
    "batch, length, size": lambda x: x[:, :, 0],
    "length, batch, size": lambda x: x[:, :, 0].transpose(0, 1),
    "batch · length, size": lambda x: x[:, :, 0].flatten(0, 1),
    "batch, heads, length, size": lambda x: x.transpose(1, 2),
    "batch, length, heads, size": lambda x: x,
    "batch · heads, length, size": lambda x: x.transpose(1, 2).flatten(0, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_of_each_shape(shape):
    x = SHAPES[shape](marked())
    left = Padding([VALID]).rows_of(x, heads=True)
    assert left.numel() == int((x == 1).sum()) and bool((left == 1).all())


def attention_mask(kind):
    seen = VALID.bool()[:, None, :, None] & VALID.bool()[:, None, None, :]
    lowest = {"lowest": torch.finfo(torch.float32).min, "infinite": -torch.inf}.get(kind)
    return seen if lowest is None else torch.zeros(seen.shape).masked_fill(~seen, lowest)


@pytest.mark.parametrize("kind", ["boolean", "lowest", "infinite"])
def test_masks_of_attention_tell_padding_of_lengths_of_their_own(kind):
    padding = Padding(active=True)
    padding.note(attention_mask(kind))
    assert bool((padding.tokens_of(marked()) == 1).all())


def test_masks_that_say_what_is_padding_leave_what_was_given():
    for given in ([torch.ones_like(VALID)], []):
        padding = Padding(given, active=True)
        padding.note(torch.zeros(2, LENGTH, dtype=torch.bool))  # Grounding DINO's `key_padding_mask`: none is padding
        assert padding.rows_of(marked()).shape[:2] == (ROWS, LENGTH)
    padding = Padding([VALID], active=True)
    padding.note(VALID == 0)
    assert bool((padding.rows_of(marked()) == 1).all())
    padding = Padding([torch.ones_like(VALID)], active=True)
    padding.note(VALID == 0)
    assert padding.rows_of(marked()).shape[:2] == (ROWS, LENGTH)


def test_masks_that_say_what_is_masked_tell_nothing():
    causal = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)  # as MPT has it: True is masked
    padding = Padding(active=True)
    padding.note(causal)
    padding.note(torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool))
    assert padding.rows_of(marked()).shape[:2] == (ROWS, LENGTH)


def streaming_speech():
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, **layers}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 64}
    encoder = sizes | {"sliding_windows": [[4, 1], [4, 0]], "max_position_embeddings": 64}
    config = hf.MoonshineStreamingConfig(encoder_config=encoder, **sizes, **tokens, max_position_embeddings=64)
    return hf.MoonshineStreamingForConditionalGeneration(config).eval()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_encoder_whose_padding_is_nan(implementation, attention):
    torch.manual_seed(0)
    model = streaming_speech()
    model.set_attn_implementation(implementation)
    mask = torch.ones(2, 3200, dtype=torch.long)
    mask[1, 1600:] = 0
    inputs = {
        "input_values": torch.randn(2, 3200),
        "attention_mask": mask,
        "decoder_input_ids": torch.ones(2, 2).long(),
    }
    config = FP8Config(dataset=[inputs], attention=attention, decode_steps=2, ignore_modules_wo_measures=True)
    measured = state_of(calibrate(prepare(model, config))).measurements.tensors
    encoder = {key: value.range() for key, value in measured.items() if "encoder" in key[0] and key[1] != "weight"}
    assert encoder and all(bool(torch.isfinite(found)) for found in encoder.values())


@pytest.mark.parametrize("position, finite", [(0, False), (4, True)])
def test_nan_where_nothing_is_masked_is_not_lost(position, finite):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(SIZE, SIZE)

        def forward(self, x, attention_mask):
            return self.fc(x)

    x = torch.ones(ROWS, LENGTH, SIZE)
    x[0, position] = torch.nan
    config = FP8Config(dataset=[{"x": x, "attention_mask": VALID}])
    try:
        measured = state_of(calibrate(prepare(Net(), config))).measurements
        assert bool(torch.isfinite(measured.range("fc"))) is finite
    except FP8Error:
        assert not finite
