"""What DeepSpeed's ZeRO-3 has cut into parts is refused by name."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama

from optimum_fp8 import FP8Config, convert, load, prepare
from optimum_fp8.errors import FP8NotAvailableError


def cut(model):
    """As ZeRO-3 leaves parameters between its calls: empty, with its own attributes."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.data = torch.empty(0)
    return model


@pytest.mark.parametrize(
    "action",
    [
        lambda model: prepare(model, FP8Config()),
        lambda model: convert(model, FP8Config(activation_scheme="dynamic")),
        lambda model: load("nowhere", model),
    ],
)
def test_zero_3(action):
    with pytest.raises(FP8NotAvailableError, match=r"ZeRO-3 has cut model.embed_tokens.weight into parts.*FSDP2"):
        action(cut(tiny_llama()))
