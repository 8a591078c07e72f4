"""`matmul` on an emulated Gaudi gives the reference's result: products of activations, and with cached codes."""

from __future__ import annotations

import pytest
import torch
from grids import over
from on_gaudi import assert_near, both, constant, fmt_of

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALES = ("static", "constant", "per-token", "none")


def scale_of(kind, shape):
    rows = torch.rand(*shape[:-1], 1) * 0.02 + 0.005
    known = constant(torch.tensor([2.0**-4]))
    return {"static": torch.tensor([0.013]), "constant": known, "per-token": rows, "none": None}[kind]


def matmul(a, b, a_scale, b_scale, fmt, arithmetic="gaudi"):
    return lambda: ops.matmul(a, b, a_scale, b_scale, dtype=fmt.dtype, full_scale=fmt.full_scale, arithmetic=arithmetic)


def cached(x, scale, fmt):
    return ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale)


@over(
    kind=[
        (BF16, "gaudi", True),
        (BF16, "gaudi", False),
        (BF16, "qdq", True),
        (FP16, "gaudi", False),
        (FP32, "gaudi", True),
    ],
    a_scale=("static", "per-token", "none"),
    b_scale=SCALES,
    transposed=[True, False],
)
def test_value(gaudi2, kind, a_scale, b_scale, transposed):
    (dtype, arithmetic, codes), fmt = kind, fmt_of(gaudi2)
    a, b = torch.randn(2, 3, 5, 16).to(dtype), torch.randn(2, 3, 7, 16).to(dtype)  # queries and keys
    b = b if transposed else torch.randn(2, 3, 16, 7).to(dtype)  # or probabilities and values
    b_scale = scale_of(b_scale, b.shape)
    if codes and b_scale is not None:
        b = cached(b, b_scale, fmt)
    if transposed:
        b, b_scale = b.mT, b_scale.mT if b_scale is not None and b_scale.ndim > 1 else b_scale
    assert_near(*both(matmul(a, b, scale_of(a_scale, a.shape), b_scale, fmt, arithmetic)), terms=16)


@over(shapes=[((4, 8), (8, 3)), ((1, 8), (8, 1)), ((3, 4, 8), (8, 5)), ((2, 3, 4, 8), (2, 1, 8, 5)), ((0, 8), (8, 2))])
def test_shapes(device, shapes):
    fmt = fmt_of(device)
    a, b = (torch.randn(shape).bfloat16() for shape in shapes)
    scale = torch.tensor([0.02])
    assert_near(*both(matmul(a, b, scale, scale, fmt)), terms=8)


def test_a_product_with_cached_keys_reads_them_as_they_lie_in_memory(gaudi2):
    fmt = fmt_of(gaudi2)
    q, scale = torch.randn(1, 2, 3, 8).bfloat16(), constant(torch.tensor([2.0**-4]))
    keys = cached(torch.randn(1, 2, 6, 8).bfloat16(), scale, fmt)
    with ops.backend("hpu"):
        matmul(q, keys.mT, scale, scale, fmt)()
    cast, gemm = gaudi2.calls
    assert (cast.name, cast.overload) == ("cast_to_fp8_v2", "scalar")
    assert (gemm.name, gemm.overload) == ("fp8_gemm_v2", "scalar") and gemm.free_scales
    assert gemm.arguments["trans_B"] and gemm.arguments["B"].shape == (1, 2, 6, 8)
    assert gemm.arguments["out_dtype"] == BF16


def test_a_transposed_operand_is_cast_as_it_lies_in_memory(gaudi2):
    q, keys, scale = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 6, 8).bfloat16(), torch.tensor([0.02])
    assert_near(*both(matmul(q, keys.mT, scale, scale, fmt_of(gaudi2))), terms=8)
    _, cast, gemm = gaudi2.calls
    assert cast.arguments["input"].shape == gemm.arguments["B"].shape == (1, 2, 6, 8) and gemm.arguments["trans_B"]


def test_values_with_a_scale_for_each_position_are_dequantized(gaudi2):
    fmt = fmt_of(gaudi2)
    p = torch.rand(1, 2, 3, 6).bfloat16()
    scale = torch.rand(1, 2, 6, 1) * 0.02 + 0.005
    values = cached(torch.randn(1, 2, 6, 8).bfloat16(), scale, fmt)
    assert_near(*both(matmul(p, values, torch.tensor([2.0**-8]), scale, fmt)), terms=6)
    assert [call.name for call in gaudi2.calls] == ["cast_to_fp8_v2", "cast_from_fp8", "cast_from_fp8"]


def test_what_does_not_fit_is_refused(gaudi2):
    fmt, one = fmt_of(gaudi2), torch.ones(1)
    a, b = torch.randn(4, 8).bfloat16(), torch.randn(8, 3).bfloat16()
    codes = cached(b, one, fmt)
    wrong = [
        (a.double(), b, one, one),
        (a, b[:4], one, one),
        (a, codes, one, None),
        (a, b, torch.ones(1, 8), one),
        (a, b, one, torch.ones(8, 3)),
        (a, b, one, torch.ones(5, 1)),
    ]
    with ops.backend("hpu"):
        for data in wrong:
            with pytest.raises(FP8NotAvailableError, match="backend 'hpu' cannot run 'matmul' here"):
                matmul(*data, fmt)()
        with pytest.raises(FP8NotAvailableError, match="reads those above 240 as Inf"):
            ops.matmul(a, b, one, one, dtype=fmt.dtype, full_scale=448.0)
