"""A batch norm folded into the convolution before it, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from optimum_fp8.modules.folded_batch_norm import Folded, fold, unfold

CASES = {
    "1d": (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9), {}),
    "2d, groups": (nn.Conv2d, nn.BatchNorm2d, (2, 4, 9, 9), {"groups": 2, "padding": 1}),
    "3d": (nn.Conv3d, nn.BatchNorm3d, (2, 4, 5, 5, 5), {"stride": 2}),
    "transposed": (nn.ConvTranspose2d, nn.BatchNorm2d, (2, 4, 5, 5), {"stride": 2}),
}


def made(case, *, bias=False, affine=True, dtype=torch.float64):
    torch.manual_seed(0)
    conv, norm, shape, options = CASES[case]
    model = nn.Sequential(conv(4, 6, 3, bias=bias, **options), norm(6, affine=affine, eps=1e-3)).to(dtype).eval()
    for tensor in (model[1].running_mean, *model[1].parameters()):
        nn.init.uniform_(tensor, -1, 1)
    nn.init.uniform_(model[1].running_var, 0.3, 2)
    return model, torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_folded_it_computes_the_same_and_undone_to_the_bit(case, bias, affine):
    model, x = made(case, bias=bias, affine=affine)
    expected, state, norm = model(x), copy.deepcopy(model.state_dict()), model[1]
    change = fold(model, *model)
    assert isinstance(model[1], nn.Identity) and set(model.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(model(x), expected)
    change.undo()
    assert model[1] is norm and (model[0].bias is None) != bias
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_unfolded_it_has_the_structure_of_its_class_again(bias, affine):
    model, x = made("2d, groups", bias=bias, affine=affine)
    expected, state = model(x), {name: tensor.shape for name, tensor in model.state_dict().items()}
    fold(model, *model)
    copied = copy.deepcopy(model)
    unfold(copied)
    assert isinstance(model[1], Folded), "the copy has its own"
    assert {name: tensor.shape for name, tensor in copied.state_dict().items()} == state
    assert not copied[1].training and copied[1].num_batches_tracked == 0
    torch.testing.assert_close(copied(x), expected)


def test_in_bfloat16_it_is_folded_in_float32():
    model, _ = made("1d", dtype=torch.float32)
    half = copy.deepcopy(model).bfloat16()
    wide = copy.deepcopy(half).double()
    for each in (half, wide):
        fold(each, *each)
    assert half[0].weight.dtype is half[0].bias.dtype is torch.bfloat16
    assert torch.equal(half[0].weight, wide[0].weight.bfloat16())
    assert torch.equal(half[0].bias, wide[0].bias.bfloat16())


def test_on_meta_there_is_the_structure():
    model, _ = made("2d, groups")
    model = model.to("meta")
    fold(model, *model)
    assert model[0].bias.is_meta and model[0].bias.shape == (6,)
