"""Weight scales: the values that Gaudi cards gave, shapes, and soundness for every weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_methods import FOR_ANY_SHAPE

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8ScaleError
from optimum_fp8.formats import FP8_DTYPES, HP_DTYPES, TARGETS, number_format
from optimum_fp8.scales import SCALE_METHODS, PerChannel, quantized_weight, weight_maxabs, weight_scale

EVERYWHERE = [(target, fp8) for target in TARGETS for fp8 in FP8_DTYPES]
PER_CHANNEL = [name for name, method in FOR_ANY_SHAPE.items() if method.weight.granularity == PerChannel()]


def is_sound(scale):
    return bool((torch.isfinite(scale) & (scale > 0) & torch.isfinite(1 / scale)).all())


@pytest.mark.core
@pytest.mark.parametrize(
    "target, maxabs, expected",
    [
        ("gaudi3", 28.125, 0.125),
        ("gaudi3", 3.546875, 0.015625),
        ("gaudi3", 1.7734375, 0.0078125),
        ("gaudi3", 0.88671875, 0.00390625),
        ("gaudi2", 0.47265625, 0.0625),
    ],
)
def test_cards_multiply_by_the_reciprocal(target, maxabs, expected):
    weight = torch.tensor([[0.0, -maxabs], [maxabs / 2, 0.0]], dtype=torch.bfloat16)
    assert weight_scale(weight, method="maxabs_hw", target=target).tolist() == [expected]


@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3, 3), (1, 1)])
def test_shapes(method, shape):
    expected = (shape[0], *[1] * (len(shape) - 1)) if method in PER_CHANNEL else (1,)
    scale = weight_scale(torch.randn(shape), method=method)
    assert scale.shape == expected and scale.dtype == torch.float32 and not scale.requires_grad


def test_channel_scales_are_those_of_each_channel():
    weight = torch.randn(5, 4, 3, 3) * 2.0 ** torch.arange(-6, 4, 2).reshape(5, 1, 1, 1)
    scales = weight_scale(weight, method="maxabs_pcs_pow2")
    for channel, scale in zip(weight, scales, strict=True):
        needed = channel.abs().max().item() / 224
        assert needed <= scale.item() < 2 * needed


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("hp_dtype", HP_DTYPES)
@pytest.mark.parametrize("dtype", HP_DTYPES.values())
def test_zeros_are_sound(target, fp8, hp_dtype, dtype):
    some = torch.randn(4, 8).to(dtype)
    some[1] = 0
    for weight in (some, torch.zeros(3, 5, dtype=dtype)):
        for method in FOR_ANY_SHAPE:
            scale = weight_scale(weight, method=method, target=target, fp8_config=fp8, hp_dtype=hp_dtype)
            assert is_sound(scale), (method, weight)


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("hp_dtype", HP_DTYPES)
@settings(max_examples=6)
@given(exponents=st.tuples(st.integers(-99, 99), st.integers(-99, 99)))
def test_every_weight_is_sound(target, fp8, hp_dtype, exponents):
    weight = torch.tensor([[1.0, -1.5], [0.3, 1.9]]) * 2.0 ** torch.tensor(exponents)[:, None]
    for method, parts in FOR_ANY_SHAPE.items():
        if parts.weight.value != "search":
            scale = weight_scale(weight, method=method, target=target, fp8_config=fp8, hp_dtype=hp_dtype)
            assert is_sound(scale), method


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("std", [1e-30, 1e-3, 1e5, 1e30])
def test_hardware_methods_stay_in_the_set(target, fp8, std):
    hardware = set(number_format(fp8, target).hardware_scales.descending())
    for method, parts in FOR_ANY_SHAPE.items():
        if parts.weight.rounding == "hardware":
            scale = weight_scale(torch.randn(4, 8) * std, method=method, target=target, fp8_config=fp8)
            assert scale.item() in hardware, method


@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_errors(method, bad):
    weight = torch.ones(2, 3)
    weight[1, 1] = bad
    with pytest.raises(FP8ScaleError, match="NaN or Inf"):
        weight_scale(weight, method=method)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weight_is_an_error(shape):
    with pytest.raises(FP8ScaleError, match="empty"):
        weight_scale(torch.empty(shape), method="maxabs_pow2")


def test_float16_weight_counts_as_bfloat16():
    weight = (torch.randn(8, 16) * 0.02).half()
    for method in FOR_ANY_SHAPE:
        assert torch.equal(weight_scale(weight, method=method), weight_scale(weight.bfloat16(), method=method))


@pytest.mark.parametrize(
    "method, target, expected",
    [
        ("unit_scale", "gaudi2", 1.0),
        ("hw_aligned_single_scale", "gaudi2", 16.0),
        ("hw_aligned_single_scale", "gaudi3", 128.0),
        ("hw_aligned_single_scale", "cpu", 1.0),
    ],
)
def test_fixed_methods(method, target, expected):
    assert weight_scale(torch.randn(3, 4), method=method, target=target).tolist() == [expected]


@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_hw", "maxabs_pcs_pow2"])
def test_backoff(method):
    weight = torch.full((2, 2), 448.0)
    assert weight_scale(weight, method=method).unique().tolist() == [2.0]
    assert weight_scale(weight, method=method, backoff=1.0).unique().tolist() == [1.0]
    assert weight_scale(weight, method=method, backoff=0.25).unique().tolist() == [4.0]


@pytest.mark.parametrize("backoff", [0.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("method", ["maxabs_pow2", "maxabs_pcs_pow2"])
def test_backoff_out_of_range(method, backoff):
    with pytest.raises(FP8ConfigError, match="backoff"):
        weight_scale(torch.ones(2, 2), method=method, backoff=backoff)


def test_maxabs():
    weight = torch.tensor([[1.0, -3.0], [0.5, 0.25]], dtype=torch.bfloat16)
    assert weight_maxabs(weight).tolist() == [3.0]
    assert weight_maxabs(weight, PerChannel()).tolist() == [[3.0], [0.5]]
    assert weight_maxabs(weight).dtype == torch.bfloat16


def test_parameter_is_left_alone():
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    before = parameter.detach().clone()
    for method in FOR_ANY_SHAPE:
        weight_scale(parameter, method=method)
    assert torch.equal(parameter, before) and parameter.grad is None


@pytest.mark.parametrize("wrong, hint", [("maxabs_pow", "maxabs_pow2"), ("unitscale", "unit_scale")])
def test_unknown_method_gives_the_nearest(wrong, hint):
    with pytest.raises(FP8ConfigError, match=f"did you mean '{hint}'"):
        weight_scale(torch.ones(1, 1), method=wrong)


def assert_quantized_as_scaled(weight, fmt, **options):
    """One pass or two: the same codes, scale and range, to the bit."""
    codes, scale, maxabs = quantized_weight(weight, target=fmt.target, fp8_config=fmt.name, **options)
    expected = weight_scale(weight, target=fmt.target, fp8_config=fmt.name, **options)
    assert scale.dtype == torch.float32 and torch.equal(scale, expected), options
    expected_codes = ops.cast_to_fp8(weight.detach(), expected, fmt.dtype, fmt.full_scale)
    assert torch.equal(codes.view(torch.uint8), expected_codes.contiguous().view(torch.uint8)), options
    assert maxabs.dtype == torch.float32 and maxabs.amax() == weight.abs().amax().float()
    assert codes.is_contiguous() and codes.shape == weight.shape and not codes.requires_grad


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("dtype", HP_DTYPES.values())
@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
def test_quantized_in_one_pass_or_two(target, fp8, dtype, method):
    fmt = number_format(fp8, target)
    weight = torch.randn(24, 40) * 2.0 ** torch.randint(-14, 4, (24, 1))
    weight[3] = 0
    for case in (weight, weight.t(), torch.randn(6, 2, 3, 3), torch.zeros(2, 3), torch.nn.Parameter(weight)):
        for hp_dtype, backoff in (("bf16", None), ("fp16", 1.0), ("fp32", 0.3)):
            assert_quantized_as_scaled(case.to(dtype), fmt, method=method, hp_dtype=hp_dtype, backoff=backoff)


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@pytest.mark.parametrize("method", PER_CHANNEL)
def test_quantized_channels_of_every_range(target, fp8, method):
    """All finite non-negative bfloat16 values, each the range of a channel: one at a time too, as they round alone."""
    ranges = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).reshape(-1, 1)
    if SCALE_METHODS[method].weight.value == "maxabs":
        assert_quantized_as_scaled(ranges, number_format(fp8, target), method=method)
        for weight in ranges[torch.randint(0, 0x7F80, (50,))]:
            assert_quantized_as_scaled(weight.reshape(1, 1), number_format(fp8, target), method=method)


@pytest.mark.parametrize("target, fp8", EVERYWHERE)
@settings(max_examples=12)
@given(bits=st.integers(0, 0x7F7F), fraction=st.floats(0, 1), backoff=st.floats(0.01, 1))
def test_quantized_tensors_of_any_range(target, fp8, bits, fraction, backoff):
    largest = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)
    weight = torch.cat([-largest, largest * fraction]).reshape(1, 2)
    for method, parts in FOR_ANY_SHAPE.items():
        if parts.weight.value == "maxabs":
            assert_quantized_as_scaled(weight, number_format(fp8, target), method=method, backoff=backoff)


@pytest.mark.parametrize("method", FOR_ANY_SHAPE)
@pytest.mark.parametrize("dtype", HP_DTYPES.values())
def test_quantizing_refuses_what_has_no_scale(method, dtype):
    weight = torch.ones(3, 5, dtype=dtype)
    weight[1, 4] = torch.nan
    with pytest.raises(FP8ScaleError, match="NaN or Inf"):
        quantized_weight(weight, method=method)
    with pytest.raises(FP8ScaleError, match="empty"):
        quantized_weight(weight[:0], method=method)
    with pytest.raises(FP8ConfigError, match="backoff"):
        quantized_weight(torch.ones(2, 2, dtype=dtype), method="maxabs_pow2", backoff=2.0)
