"""`linear` on an emulated Gaudi gives the reference's result, by the operators that Gaudi has for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from grids import over
from on_gaudi import assert_near, both, constant, fmt_of, same_codes

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError, FP8OperandError
from optimum_fp8.test_utils import gaudi

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INPUT_SCALES = ("static", "constant", "per-token", "weight-only")
WEIGHT_SCALES = ("tensor", "constant", "channel")


def operands(fmt, shape, out, dtype, *, input_scale="static", weight_scale="channel", bias=True, packed=True):
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(out, shape[-1]) * fmt.full_scale / 6).clamp(-fmt.full_scale, fmt.full_scale).to(fmt.dtype)
    weight = weight.t().contiguous().t() if packed else weight
    scales = {
        "tensor": torch.rand(1) * 0.01 + 1e-3,
        "channel": torch.rand(out, 1) * 0.01 + 1e-3,
        "constant": constant(torch.tensor([2.0**-8])),
    }
    inputs = {
        "static": torch.tensor([0.013]),
        "constant": constant(torch.tensor([2.0**-4])),
        "per-token": torch.rand(*shape[:-1], 1) * 0.02 + 0.005,
        "weight-only": None,
    }
    return x, weight, scales[weight_scale], inputs[input_scale], torch.randn(out).to(dtype) if bias else None


def linear(data, fmt, arithmetic="gaudi"):
    return lambda: ops.linear(*data, full_scale=fmt.full_scale, arithmetic=arithmetic)


def assert_linear(data, fmt, arithmetic="gaudi"):
    x, weight, weight_scale, input_scale, bias = data
    found, expected = both(linear(data, fmt, arithmetic))
    before = None
    if bias is not None and arithmetic != "fused":  # two roundings
        with ops.backend("reference"):
            before = linear((x, weight, weight_scale, input_scale, None), fmt, arithmetic)()
    assert_near(found, expected, x.shape[-1], before)


def names(device):
    return [f"{call.name}.{call.overload}" for call in device.calls]


@over(
    arithmetic=ops.ARITHMETICS,
    dtype=[BF16, FP16, FP32],
    input_scale=INPUT_SCALES,
    weight_scale=WEIGHT_SCALES,
)
def test_value(device, arithmetic, dtype, input_scale, weight_scale):
    fmt = fmt_of(device)
    data = operands(fmt, (3, 40), 8, dtype, input_scale=input_scale, weight_scale=weight_scale)
    assert_linear(data, fmt, arithmetic)


@over(fp8_config=["E4M3", "E5M2"], arithmetic=ops.ARITHMETICS, bias=[True, False])
def test_formats(device, fp8_config, arithmetic, bias):
    fmt = fmt_of(device, fp8_config)
    assert_linear(operands(fmt, (2, 3, 40), 8, BF16, bias=bias), fmt, arithmetic)


@over(
    shape=[(16,), (0, 16), (1, 16), (2, 0, 16), (2, 1, 3, 16), (5, 1)],
    out=[1, 8],
    input_scale=INPUT_SCALES,
    packed=[True, False],
)
def test_shapes(gaudi2, shape, out, input_scale, packed):
    fmt = fmt_of(gaudi2)
    assert_linear(operands(fmt, shape, out, BF16, input_scale=input_scale, packed=packed), fmt)


def exact(fmt, dtype, weight_scale=None):
    """Small integers, and powers of two as scales: whatever the order, products and sums are exact in float32."""
    x = (torch.randint(-15, 16, (32, 48)) * 2 ** torch.randint(0, 3, (32, 48))).to(dtype)
    weight = torch.randint(-15, 16, (64, 48)).float().to(fmt.dtype).t().contiguous().t()
    if weight_scale is None:
        weight_scale = 2.0 ** torch.randint(-9, -3, (64, 1)).float()
    return x, weight, weight_scale, torch.tensor([1.0]), (torch.randint(-999, 1000, (64,)) / 64).to(dtype)


@over(dtype=[BF16, FP16, FP32], weight_only=[True, False], constants=[True, False])
def test_rounds_where_the_arithmetic_says(device, dtype, weight_only, constants):
    fmt = fmt_of(device)
    x, weight, weight_scale, input_scale, bias = exact(fmt, dtype, torch.tensor([2.0**-4]) if constants else None)
    if constants:
        constant(weight_scale), constant(input_scale)
    results = []
    for arithmetic in ("fused", "gaudi", "qdq"):
        data = (x, weight, weight_scale, None if weight_only else input_scale, bias)
        found, expected = both(linear(data, fmt, arithmetic))
        if arithmetic != "qdq":  # whose rounding is that of torch's own product
            assert torch.equal(found, expected)
            results.append(found)
        assert_near(found, expected)
    assert torch.equal(*results) == (dtype == FP32), "the data must tell the arithmetics apart"


def test_a_static_layer_is_a_cast_and_a_product_without_bias(gaudi2):
    fmt = fmt_of(gaudi2)
    x, weight, *_, bias = data = operands(fmt, (4, 16), 8, BF16, input_scale="constant", weight_scale="constant")
    with ops.backend("hpu"):
        linear(data, fmt)()
    assert names(gaudi2) == ["cast_to_fp8_v2.scalar", "fp8_gemm_v2.scalar"]
    cast, gemm = gaudi2.calls
    assert cast.scales["scale"][0].values == (2.0**4,) and cast.free_scales and gemm.free_scales
    assert gemm.arguments["A_scale_inv"] == 2.0**-4 and gemm.arguments["B_scale_inv"] == 2.0**-8
    assert gemm.arguments["bias"] is None and gemm.arguments["D"] is None and gemm.arguments["accumulate"] is False
    assert gemm.arguments["B"].shape == (16, 8) and not gemm.arguments["trans_B"], "[in, out], as it lies in memory"
    assert gemm.arguments["out_dtype"] == BF16


def test_a_weight_that_was_not_packed_is_read_transposed(gaudi2):
    fmt = fmt_of(gaudi2)
    data = operands(fmt, (4, 16), 8, BF16, packed=False)
    assert_linear(data, fmt)
    gemm = gaudi2.calls[1].arguments
    assert gemm["B"].shape == (8, 16) and gemm["trans_B"]


def test_numbers_are_given_only_for_both_scales(gaudi2):
    fmt = fmt_of(gaudi2)
    for kinds in (("constant", "channel"), ("constant", "tensor"), ("static", "constant"), ("per-token", "constant")):
        data = operands(fmt, (4, 16), 8, BF16, input_scale=kinds[0], weight_scale=kinds[1])
        assert_linear(data, fmt)
        gemm, scales = gaudi2.calls[-1], [scale.flatten().tolist() for scale in (data[3], data[2])]
        assert (gemm.name, gemm.overload) == ("fp8_gemm_v2", "default")
        assert [list(gemm.scales[name][0].values) for name in ("A_scale_inv", "B_scale_inv")] == scales
        assert gemm.arguments["bias"] is None and gemm.arguments["D"] is None


def test_fused_arithmetic_adds_the_bias_before_it_rounds(gaudi2):
    fmt = fmt_of(gaudi2)
    with ops.backend("hpu"):
        for arithmetic, bias in (("fused", True), ("fused", False), ("gaudi", True)):
            linear(operands(fmt, (4, 16), 8, BF16, bias=bias), fmt, arithmetic)()
    assert [call.arguments["out_dtype"] for call in gaudi2.calls if call.name == "fp8_gemm_v2"] == [FP32, BF16, BF16]


def test_weight_only_is_a_high_precision_product(gaudi2):
    fmt = fmt_of(gaudi2)
    with ops.backend("hpu"):
        for weight_scale in ("constant", "channel"):
            linear(operands(fmt, (4, 16), 8, BF16, input_scale="weight-only", weight_scale=weight_scale), fmt)()
    assert names(gaudi2) == ["cast_from_fp8.scalar", "cast_from_fp8.default"]
    assert [call.arguments["out_dtype"] for call in gaudi2.calls] == [BF16, FP32], "exact where it need not be wide"


# --- full scales ------------------------------------------------------------------------------------------------------


@over(dtype=[BF16, FP16, FP32], input_scale=["static", "constant", "per-token"], arithmetic=ops.ARITHMETICS)
def test_codes_made_for_gaudi2_on_a_gaudi3(gaudi3, dtype, input_scale, arithmetic):
    with_448 = fmt_of(gaudi3)
    x, *rest = operands(with_448, (9, 64), 8, dtype, input_scale=input_scale, bias=False)
    x = x * 5  # of which many saturate
    narrow, wide = (
        both(lambda full=full: ops.linear(x, *rest, full_scale=full, arithmetic=arithmetic)) for full in (240.0, 448.0)
    )
    assert_near(*narrow, terms=64)
    assert_near(*wide, terms=64)
    assert not torch.equal(narrow[0], wide[0])


def test_codes_saturate_at_the_targets_full_scale(gaudi3):
    x = torch.tensor([1e30, -1e30, torch.nan, 239.0, 247.9, 248.0, 250.0]).repeat(2, 1)
    known = constant(torch.tensor([2.0**-4]))
    for scale in (torch.ones(1), torch.tensor([0.7]), torch.tensor([[0.3], [77.0]]), known):
        for dtype in (BF16, FP16, FP32):
            for full_scale in (240.0, 448.0):
                given = (x * scale).to(dtype)
                found, expected = both(partial(ops.cast_to_fp8, given, scale, torch.float8_e4m3fn, full_scale))
                assert same_codes(found, expected)
                assert gaudi3.calls[-1].arguments["input"].dtype == (FP32 if dtype == FP16 else dtype)


def test_codes_that_the_card_reads_as_inf_are_an_error_and_no_fallback(gaudi2):
    fmt = fmt_of(gaudi2)
    data = operands(fmt, (4, 16), 8, BF16)
    with ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match="up to 448 on a card that reads those above"):
        ops.linear(*data, full_scale=448.0, arithmetic="gaudi")


# --- blocks and groups ------------------------------------------------------------------------------------------------


def by_blocks(fmt, input_scale, weight_scale, size=256, out=128):
    x, weight, *_ = operands(fmt, (3, size), out, BF16)
    inputs = {
        "groups": torch.rand(3, size // 128) * 0.02 + 0.005,
        "per-token": torch.rand(3, 1) * 0.02 + 0.005,
        "static": torch.tensor([0.013]),
        "weight-only": None,
    }
    weights = {
        "blocks": torch.rand(-(-out // 128), size // 128) * 0.01 + 1e-3,
        "groups": torch.rand(out, size // 128) * 0.01 + 1e-3,
        "tensor": torch.rand(1) * 0.01 + 1e-3,
    }
    return x, weight, weights[weight_scale], inputs[input_scale], torch.randn(out).to(BF16)


@over(
    scales=[("groups", "blocks"), ("per-token", "blocks"), ("static", "blocks"), ("groups", "tensor")]
    + [("weight-only", "blocks"), ("weight-only", "groups")],
    arithmetic=ops.ARITHMETICS,
)
def test_scales_by_blocks(device, scales, arithmetic):
    fmt = fmt_of(device)
    assert_linear(by_blocks(fmt, *scales), fmt, arithmetic)
    product = scales[0] != "weight-only" and arithmetic != "qdq"
    assert (device.calls[-1].name == "fp8_gemm_v2") == product


@over(case=[("groups", "groups", 128), ("static", "groups", 128), ("groups", "blocks", 200)])
def test_scales_that_the_product_does_not_take_are_refused(gaudi2, case):
    input_scale, weight_scale, out = case
    fmt = fmt_of(gaudi2)
    data = by_blocks(fmt, input_scale, weight_scale, out=out)
    with ops.backend("hpu"):
        with pytest.raises(FP8NotAvailableError, match="whole square blocks"):
            linear(data, fmt)()
        linear(data, fmt, "qdq")()  # needs no such product


def test_an_older_bridge_takes_no_blocks():
    with gaudi.emulated("gaudi2", bridge="1.19") as device, ops.backend("hpu"):
        fmt = fmt_of(device)
        with pytest.raises(FP8NotAvailableError, match="fp8_gemm_v2 takes none in this bridge"):
            linear(by_blocks(fmt, "groups", "blocks"), fmt)()


def test_what_does_not_fit_is_refused(gaudi2):
    fmt = fmt_of(gaudi2)
    x, weight, weight_scale, input_scale, bias = operands(fmt, (4, 16), 8, BF16)
    wrong = (
        (x.double(), weight, weight_scale, input_scale, bias),
        (x[:, :8], weight, weight_scale, input_scale, bias),
        (x, weight, weight_scale[:4], input_scale, bias),
        (x, weight, weight_scale, torch.ones(3, 1), bias),
        (x, weight, weight_scale, input_scale, bias[:4]),
    )
    with ops.backend("hpu"):
        for data in wrong:
            with pytest.raises(FP8NotAvailableError, match="backend 'hpu' cannot run 'linear' here"):
                linear(data, fmt)()
    with pytest.raises(FP8OperandError):  # unforced, the reference says what was expected
        linear(wrong[1], fmt)()
