"""Convolutions of the emulated operators, against float64."""

import pytest
import torch
from grids import over

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def conv(*args, **kwargs):
    return torch.ops.hpu.conv2d_fp8(*args, **kwargs)


GEOMETRIES = [
    {},
    {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2]},
    {"stride": [2], "padding": [1, 1]},
    {"padding": [1], "groups": 2},
]


@over(geometry=GEOMETRIES, out_dtype=[None, BF16, torch.float32], dtype=[E4M3, E5M2])
def test_convolutions(device, geometry, out_dtype, dtype):
    x, weight = (device.encode(torch.randn(shape), dtype) for shape in ((2, 4, 7, 9), (6, 4, 3, 3)))
    if geometry.get("groups") == 2:
        weight = weight[:, :2].contiguous()
    scales = {"scale_input": torch.tensor([0.5]), "scale_weight": torch.tensor(4.0)}
    out = conv(x, weight, out_dtype=out_dtype, **geometry, **scales)
    geometry = {key: value * 2 if value in ([1], [2]) else value for key, value in geometry.items()}
    exact = torch.nn.functional.conv2d(device.decode(x).double(), device.decode(weight).double(), **geometry) * 2
    assert out.dtype == (out_dtype or BF16) and out.shape == exact.shape
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 if out.dtype == BF16 else 1e-6, atol=1e-5)


def test_scalar_scales_and_their_defaults(gaudi2):
    x, weight = (gaudi2.encode(torch.full((1, 1, 1, 1), value), E4M3) for value in (3.0, 5.0))
    op = torch.ops.hpu.conv2d_fp8
    assert op.scalar(x, weight).item() == 15.0
    assert op(x, weight, scale_input=16.0, scale_weight=0.0625).item() == 15.0
    assert op(x, weight, scale_input=2.0, scale_weight=4.0).item() == 120.0


def test_output_is_rounded_before_the_bias(gaudi2):
    one = gaudi2.encode(torch.ones(1, 1, 1, 1), E4M3)
    product = 1 + 2.0**-8
    assert conv(one, one, torch.tensor([1.0], dtype=BF16), scale_input=product, scale_weight=1.0).item() == 2.0


X, W = torch.ones(1, 4, 5, 5).to(E4M3), torch.ones(6, 4, 3, 3).to(E4M3)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((X.float(), W), {}, "dtype of input"),
        ((X, W.float()), {}, "dtype of weight"),
        ((X[0], W), {}, "must be 4D tensors"),
        ((X, W), {"groups": 2}, "2 groups of a weight"),
        ((X, W, torch.ones(1, 6)), {}, "Bias must be 1D tensor with size equal to weight dim0"),
        ((X, W, torch.ones(4)), {}, "Bias must be 1D tensor with size equal to weight dim0"),
        ((X, W), {"scale_weight": torch.ones(6)}, "Multi-element scale tensors are not supported yet"),
        ((X, W), {"stride": 2}, "Expected a value of type 'List"),
        ((X, W), {"stride": [1, 1, 1]}, "stride takes one or two numbers"),
        ((X, W), {"out_dtype": E4M3}, "out_dtype must be one of"),
        ((X, W), {"dilation": [3, 3]}, "the output would have size"),
    ],
)
def test_refused(gaudi2, args, kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        conv(*args, **kwargs)
    assert gaudi2.calls == []
