"""Softmax of the emulated operators, against float64."""

import pytest
import torch
from grids import over

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


def softmax(*args, **kwargs):
    return torch.ops.hpu.softmax_fp8(*args, **kwargs)


def exact(x, dim=-1):
    return torch.softmax(x.double(), dim)


@over(dim=[-1, 1, -2])
def test_without_scales_it_gives_bf16(device, dim):
    x = (torch.randn(2, 5, 7) * 3).to(BF16)
    out = softmax(x, dim)
    assert out.dtype == BF16
    torch.testing.assert_close(out.double(), exact(x, dim), rtol=2**-8, atol=1e-9)
    halved = softmax(x, dim, None, None, torch.tensor(0.5))
    torch.testing.assert_close(halved.double(), exact(x.double() / 2, dim), rtol=2**-8, atol=1e-9)


@over(form=["tensors", "Scalar_scales", "Scalar"], codes=[False, True])
def test_with_scales_it_gives_codes(device, form, codes):
    x = (torch.randn(2, 5, 7) * 3).to(BF16)
    given = device.encode(x, E4M3) if codes else x
    values = device.decode(given) if codes else x
    heads, add = 0.5, torch.randn(2, 1, 7).to(BF16)
    if form == "tensors":
        out = softmax(given, -1, torch.tensor([2.0]), torch.tensor([16.0]), torch.tensor(heads), add)
    else:
        out = softmax(given, -1, 2.0, 16.0, heads if form == "Scalar" else torch.tensor(heads), add)
    assert out.dtype == E4M3
    expected = exact(values.double() * 2 * heads + add.double()) * 16
    torch.testing.assert_close(device.decode(out).double(), expected, rtol=2**-4, atol=2**-10)
    assert device.calls[-1].overload == ("default" if form == "tensors" else form)


@pytest.mark.core
def test_scales_are_s_of_the_input_and_its_reciprocal_of_the_output(gaudi2):
    x = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=BF16)
    out = softmax(x, -1, torch.tensor(1.0), torch.tensor(16.0))
    assert gaudi2.decode(out).tolist() == [[8.0, 8.0, 0.0]]


X, ONE = torch.ones(2, 3, 4).to(BF16), torch.ones(1)


@pytest.mark.parametrize(
    "args, message",
    [
        ((X.float(), -1), "must be of torch.bfloat16 or torch.float8_e4m3fn"),
        ((X.to(E4M3), -1), "then input scale must be given"),
        ((X, -1, ONE), "must be both given or None"),
        ((X, -1, ONE.to(BF16), ONE), "input_scale must be one of"),
        ((X, -1, ONE, torch.ones(3)), "output_scale: Multi-element"),
        ((X, -1, None, None, ONE.to(BF16)), "inv_attn_heads must be one of"),
        ((X, -1, None, None, None, X), "FusedAdd available only for Float8 output"),
        ((X, -1, ONE, ONE, None, X.float()), "fused_add dtype"),
        ((X, -1, ONE, ONE, None, X[0]), "same rank"),
        ((X, -1, ONE, ONE, None, X[:1]), "same first and last dim"),
        ((X, -1, ONE, ONE, None, X[:, :2]), "other than first and last"),
        ((X, 3), "there is no dimension 3"),
    ],
)
def test_refused(gaudi2, args, message):
    with pytest.raises(RuntimeError, match=message):
        softmax(*args)
    assert gaudi2.calls == []
