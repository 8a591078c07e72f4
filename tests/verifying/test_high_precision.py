"""What stayed in high precision, against the model it was made of."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from verifying.conftest import changed, told

from optimum_fp8.verifying.high_precision import check_high_precision_against
from optimum_fp8.verifying.layers import layers_in
from optimum_fp8.verifying.opened import open_folder

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize(
    "name, change",
    [
        (EMBEDDING, torch.randn_like),
        (EMBEDDING, lambda tensor: tensor.roll(1, 0)),
        (NORM, lambda tensor: 3 * tensor),
        (NORM, lambda tensor: 1.02 * tensor),
        (NORM, lambda tensor: tensor * torch.nan),
    ],
)
def test_other_values(copied, made, name, change):
    folder = copied("compressed-tensors")
    changed(folder, name, change)
    assert any(f"error: {name}: found a relative error of" in each for each in told(folder, against=made["base"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1e-7])
def test_rounding_to_another_dtype(copied, dtype, size):
    folder, base = copied("compressed-tensors"), copied("base")
    changed(base, EMBEDDING, lambda tensor: size * torch.randn(tensor.shape))
    original = load_file(open_folder(base).tensors[EMBEDDING].path)[EMBEDDING]
    changed(folder, EMBEDDING, lambda _: original.to(dtype))
    opened = open_folder(folder)
    assert list(check_high_precision_against(opened, layers_in(opened), base)) == []


def test_values_of_zero_that_are_not(copied):
    folder, base = copied("compressed-tensors"), copied("base")
    changed(base, NORM, torch.zeros_like)
    assert any(f"{NORM}: found a relative error of inf" in each for each in told(folder, against=base))


def test_another_shape_is_not_compared(copied, made):
    folder = copied("compressed-tensors")
    changed(folder, EMBEDDING, lambda tensor: torch.randn(128, tensor.shape[1]))
    assert not any("in high precision" in each for each in told(folder, against=made["base"]))
