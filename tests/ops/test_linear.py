"""`ops.linear` against float64 numpy: its value everywhere, and where it rounds on data whose products are exact."""

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8OperandError, FP8ScaleError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NUMPY_DTYPES = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
}
HIGH = [torch.bfloat16, torch.float16, torch.float32]
SCALES = {"weight-only": None, "static": torch.tensor([0.043]), "per-token": "per-token"}


def rounded(value, dtype):
    return np.asarray(value).astype(NUMPY_DTYPES[dtype]).astype(np.float64)


def as_numpy(tensor):
    return tensor.float().numpy().astype(np.float64)


def dequantized(x, scale, dtype, full_scale):
    """x as FP8 codes times their scale, in float64: 1/s and x/s in float32."""
    scale = scale.numpy()
    scaled = x.float().numpy() * (np.float32(1) / scale)
    return rounded(scaled.clip(-full_scale, full_scale), dtype) * scale


def by_hand(x, weight, weight_scale, input_scale, bias, full_scale, arithmetic):
    """The result, and a bound of its error: one unit in the last place for each rounding, and the float32 sum's."""
    out = x.dtype
    a = as_numpy(x) if input_scale is None else dequantized(x, input_scale, weight.dtype, full_scale)
    b = as_numpy(weight) * as_numpy(weight_scale)
    if arithmetic == "qdq":
        a, b = rounded(a.astype(np.float32), out), rounded(b.astype(np.float32), out)
    product = a @ b.T
    bound = np.abs(a) @ np.abs(b).T * (x.shape[-1] + 4) * 2.0**-24
    ulp = torch.finfo(out).eps
    tiny = torch.finfo(out).smallest_normal
    offset = 0.0 if bias is None else as_numpy(bias)
    if arithmetic == "gaudi":
        bound += np.abs(product) * ulp + tiny * ulp
    result = product + offset
    return result, bound + np.abs(result) * ulp + tiny * ulp


def operands(shape, out_features, dtype, *, fp8=E4M3, input_scale=None, per_channel=True, bias=True):
    x = torch.randn(shape, dtype=torch.float32).to(dtype)
    weight = (torch.randn(out_features, shape[-1]) * 20).to(fp8)
    weight_scale = torch.rand((out_features, 1) if per_channel else (1,)) * 0.01 + 1e-4
    if isinstance(input_scale, str):
        input_scale = torch.rand((*shape[:-1], 1)) * 0.05 + 0.005
    return x, weight, weight_scale, input_scale, torch.randn(out_features).to(dtype) if bias else None


def assert_close(operands, arithmetic="fused", full_scale=448.0):
    result = ops.linear(*operands, full_scale=full_scale, arithmetic=arithmetic)
    x, weight = operands[:2]
    assert result.shape == (*x.shape[:-1], weight.shape[0]) and result.dtype == x.dtype
    expected, bound = by_hand(*operands, full_scale, arithmetic)
    excess = np.abs(as_numpy(result) - expected) - bound
    assert excess.size == 0 or excess.max() <= 0


@pytest.mark.core
@over(
    dtype=HIGH, arithmetic=ops.ARITHMETICS, input_scale=SCALES.values(), per_channel=[True, False], bias=[True, False]
)
def test_value(dtype, arithmetic, input_scale, per_channel, bias):
    data = operands((7, 65), 33, dtype, input_scale=input_scale, per_channel=per_channel, bias=bias)
    assert_close(data, arithmetic)


@over(
    shape=[(13,), (0, 16), (1, 1), (2, 3, 5), (2, 0, 8), (1, 300), (2, 1, 3, 17)],
    arithmetic=ops.ARITHMETICS,
    input_scale=SCALES.values(),
)
def test_shapes(shape, arithmetic, input_scale):
    assert_close(operands(shape, 11, torch.bfloat16, input_scale=input_scale), arithmetic)


@over(form=[(E4M3, 240.0), (E4M3, 448.0), (E5M2, 57344.0)], arithmetic=ops.ARITHMETICS)
def test_activations_saturate_at_the_full_scale(form, arithmetic):
    fp8, full_scale = form
    x, weight, weight_scale, _, bias = operands((4, 32), 8, torch.float32, fp8=fp8)
    scale = torch.tensor([1.0 / full_scale])  # whatever is larger than 1 saturates
    assert (x.abs() > 1).any()
    assert_close((x, weight, weight_scale, scale, bias), arithmetic, full_scale)


def exact_operands(dtype, out_features=64, bias=True):
    """Small integers and powers of two as scales: whatever the order, products and sums are exact in float32."""
    x = (torch.randint(-15, 16, (32, 48)) * 2 ** torch.randint(0, 5, (32, 48))).to(dtype)
    weight = torch.randint(-15, 16, (out_features, 48)).float().to(E4M3)
    weight_scale = 2.0 ** torch.randint(-9, -3, (out_features, 1)).float()
    offsets = (torch.randint(-999, 1000, (out_features,)) / 64).to(dtype) if bias else None
    return x, weight, weight_scale, torch.tensor([1.0]), offsets


@pytest.mark.core
@over(dtype=HIGH)
def test_where_it_rounds(dtype):
    x, weight, weight_scale, input_scale, bias = data = exact_operands(dtype)
    product = as_numpy(x) @ (as_numpy(weight) * as_numpy(weight_scale)).T
    once = rounded((product + as_numpy(bias)).astype(np.float32), dtype)
    twice = rounded((rounded(product, dtype) + as_numpy(bias)).astype(np.float32), dtype)
    assert np.array_equal(once, twice) == (dtype == torch.float32), "the data must tell the two apart"
    assert np.array_equal(as_numpy(ops.linear(*data, full_scale=448.0, arithmetic="fused")), once)
    assert np.array_equal(as_numpy(ops.linear(*data, full_scale=448.0, arithmetic="gaudi")), twice)


@over(dtype=HIGH, arithmetic=ops.ARITHMETICS)
def test_without_bias_there_is_one_rounding(dtype, arithmetic):
    x, weight, weight_scale, *_ = data = exact_operands(dtype, bias=False)
    product = as_numpy(x) @ (as_numpy(weight) * as_numpy(weight_scale)).T
    assert np.array_equal(as_numpy(ops.linear(*data, full_scale=448.0, arithmetic=arithmetic)), rounded(product, dtype))


def test_qdq_rounds_the_operands_to_the_input_dtype():
    weight, scale = torch.tensor([[1.875]]).to(E4M3), torch.tensor([0.3])
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    for arithmetic, expected in (("fused", 1.875 * scale), ("qdq", (1.875 * scale).bfloat16())):
        result = ops.linear(x.float(), weight, scale, None, None, full_scale=448.0, arithmetic=arithmetic)
        assert result.item() == pytest.approx((1.875 * scale).item(), rel=1e-7), "float32 keeps what it has"
        half = ops.linear(x, weight, scale, None, None, full_scale=448.0, arithmetic=arithmetic)
        assert half.item() == expected.bfloat16().item()


@over(arithmetic=ops.ARITHMETICS, dtype=[torch.bfloat16, torch.float32])
def test_bias_of_another_dtype(arithmetic, dtype):
    *data, bias = operands((3, 16), 5, dtype)
    wide = bias.double() if dtype == torch.bfloat16 else bias.bfloat16()
    result = ops.linear(*data, wide, full_scale=448.0, arithmetic=arithmetic)
    assert result.dtype == dtype
    assert torch.equal(result, ops.linear(*data, wide.to(dtype), full_scale=448.0, arithmetic=arithmetic))


def test_non_contiguous_input():
    data = operands((6, 32), 9, torch.bfloat16, input_scale=torch.tensor([0.02]))
    x = torch.empty(32, 6, dtype=torch.bfloat16).t().copy_(data[0])
    assert not x.is_contiguous()
    assert_close((x, *data[1:]))


def test_weight_only_equals_a_linear_of_the_dequantized_weight():
    x, weight, weight_scale, _, bias = data = operands((5, 24), 7, torch.float32)
    expected = torch.nn.functional.linear(x, weight.float() * weight_scale, bias)
    torch.testing.assert_close(ops.linear(*data, full_scale=448.0), expected, rtol=1e-5, atol=1e-6)


@over(arithmetic=ops.ARITHMETICS, dtype=[torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(arithmetic, dtype):
    data = operands((4, 64), 16, dtype, input_scale=torch.tensor([0.02]))
    expected = ops.linear(*data, full_scale=448.0, arithmetic=arithmetic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ops.linear(*data, full_scale=448.0, arithmetic=arithmetic)
    assert result.dtype == dtype and torch.equal(result, expected)


def test_nan_stays_in_its_row():
    x, *rest = operands((3, 8), 4, torch.bfloat16, input_scale=torch.tensor([0.02]))
    x[1, 2] = torch.nan
    result = ops.linear(x, *rest, full_scale=448.0)
    assert result[1].isnan().all() and not result[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    "x, weight, bias, message",
    [
        ((2, 7), (4, 8), None, r"an input of shape \(2, 7\).*\(4, 8\).*expected \(…, in\)"),
        ((), (4, 8), None, r"an input of shape \(\)"),
        ((2, 8), (4, 8, 1), None, r"a weight of shape \(4, 8, 1\)"),
        ((2, 8), (4, 8), (8,), r"a bias of shape \(8,\).*expected \(4,\)"),
        ((2, 8), (4, 8), (4, 1), r"a bias of shape \(4, 1\)"),
    ],
)
def test_operands_that_do_not_fit_are_refused(x, weight, bias, message):
    x, weight = torch.ones(x), torch.ones(weight).to(E4M3)
    scale, bias = torch.ones(1), None if bias is None else torch.ones(bias)
    with pytest.raises(FP8OperandError, match=message):
        ops.linear(x, weight, scale, None, bias, full_scale=448.0)


@over(x=[torch.int64, torch.bool, E4M3])
def test_an_input_that_is_not_in_high_precision_is_refused(x):
    with pytest.raises(FP8OperandError, match=f"an input in {x}.*expected an input in high precision"):
        ops.linear(torch.ones(2, 8).to(x), torch.ones(4, 8).to(E4M3), torch.ones(1), None, None, full_scale=448.0)


@over(held_as=[torch.uint8, torch.int8])
def test_codes_held_as_bytes_are_not_taken_for_values(held_as):
    weight = torch.ones(4, 8).to(E4M3).view(held_as)
    with pytest.raises(FP8OperandError, match=f"a weight in {held_as}.*view"):
        ops.linear(torch.ones(2, 8), weight, torch.ones(1), None, None, full_scale=448.0)


def test_input_scales_that_do_not_fit_are_refused():
    for shape in ((8,), (3, 1), (2,)):
        with pytest.raises(FP8ScaleError, match=r"an input scale of shape.*expected \(1,\) or \(2, 1\)"):
            ops.linear(
                torch.ones(2, 8), torch.ones(4, 8).to(E4M3), torch.ones(1), torch.ones(shape), None, full_scale=448.0
            )


def test_rounding_an_input_beyond_what_codes_hold_is_refused():
    operands = torch.ones(2, 8), torch.ones(4, 8).to(E4M3), torch.ones(1), torch.ones(1), None
    with pytest.raises(FP8ConfigError, match="full_scale=57344.0.*448"):
        ops.linear(*operands, full_scale=57344.0)
