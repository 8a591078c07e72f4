"""The native casts, maxima and dynamic scales: the reference's bits, on every variant that this processor runs."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from grids import over
from native_variants import OF_CASTS as BACKENDS

from optimum_fp8 import ops
from optimum_fp8.formats import FP8_DTYPES, TARGETS, number_format
from optimum_fp8.rounding import ROUNDINGS

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = [(E4M3, 448.0), (E4M3, 240.0), (E5M2, 57344.0)]
HIGH = [torch.bfloat16, torch.float16, torch.float32]
SCALES = [1.0, 0.09130859375, 2.0**-8, 3e-5, 1e30, 2.0**-126, 2.0**-100, 2.0**100, 2.0**126]
NO_SCALES = [0.0, torch.inf, -0.75]  # nothing should ask for them, and still there is one right answer
SHAPES = [  # of x, and of the scales that suit it
    ((131, 300), (1,)),
    ((131, 300), (131, 1)),
    ((131, 300), (2, 3)),
    ((128, 257), (1, 3)),
    ((3, 7, 45), (3, 7, 1)),
    ((5, 3, 3, 3), (5, 1, 1, 1)),
    ((3, 20000), (3, 1)),
    ((50001,), (1,)),
]


def bits_of(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same(found, expected):
    """Equal bits; of NaN, any will do where the result is not FP8."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    both_nan = found.isnan() & expected.isnan() & (found.element_size() > 1)
    return bool((both_nan | (bits_of(found) == bits_of(expected))).all())


def assert_like_reference(call):
    """The same tensor, or tensors, from every variant."""
    with ops.backend("reference"):
        expected = call()
    for backend in BACKENDS:
        with ops.backend(backend):
            found = call()
        if isinstance(expected, torch.Tensor):
            assert same(found, expected), backend
        else:
            assert all(map(same, found, expected)), backend


def every(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def float32_patterns():
    """Every FP8 value of both formats and all midpoints, with neighbours; powers of two; any bits at all."""
    values = torch.arange(127, dtype=torch.uint8)
    edges = torch.cat([values.view(E4M3).float(), values[:124].view(E5M2).float()])
    edges = torch.cat([edges, *((part[1:] + part[:-1]) / 2 for part in (edges[:127], edges[127:]))])
    edges = torch.cat([edges, 2.0 ** torch.arange(-149, 128).float(), torch.tensor([0.0, torch.inf, torch.nan])])
    around = (edges.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).flatten().view(torch.float32)
    subnormal = torch.randint(0, 1 << 23, (3000,), dtype=torch.int32).view(torch.float32)
    anything = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    return torch.cat([edges, -edges, around, -around, subnormal, -subnormal, anything])


def scales_of(shape):
    return 2.0 ** (torch.rand(shape) * 16 - 8)


@over(dtype=HIGH, form=FORMATS)
def test_codes_of_every_input(dtype, form):
    x = float32_patterns() if dtype == torch.float32 else every(dtype)
    for scale in map(torch.tensor, SCALES + NO_SCALES):
        assert_like_reference(lambda scale=scale: ops.cast_to_fp8(x, scale.reshape(1), *form))


@over(backend=BACKENDS)
@pytest.mark.parametrize("fp8, numpy_fp8", [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)])
def test_codes_of_ml_dtypes(backend, fp8, numpy_fp8):
    full_scale = torch.finfo(fp8).max
    for x in (float32_patterns(), every(torch.float16).float(), every(torch.bfloat16).float()):
        x = x[x.abs() <= full_scale]
        with ops.backend(backend):
            codes = ops.cast_to_fp8(x, torch.ones(1), fp8, full_scale)
        assert np.array_equal(codes.view(torch.uint8).numpy(), x.numpy().astype(numpy_fp8).view(np.uint8))


@over(shapes=SHAPES)
def test_scales_of_all_shapes(shapes):
    x_shape, scale_shape = shapes
    scale = scales_of(scale_shape)
    for dtype, (fp8, full_scale) in zip(HIGH, FORMATS, strict=True):
        x = (torch.randn(x_shape) * 50).to(dtype)
        codes = torch.randint(0, 256, x_shape, dtype=torch.uint8).view(fp8)
        calls = [
            lambda x=x, fp8=fp8, full_scale=full_scale: ops.cast_to_fp8(x, scale, fp8, full_scale),
            lambda codes=codes, dtype=dtype: ops.cast_from_fp8(codes, scale, dtype),
        ]
        for call in calls:
            assert_like_reference(call)


def test_memory_layouts():
    """Slices and transposes, scales expanded from one, ends that fill no vector, starts that are not aligned."""
    wide = (torch.randn(40, 91) * 30).bfloat16()
    scale = torch.tensor([[0.5]]).expand(40, 1)
    codes = torch.randint(0, 256, (91, 40), dtype=torch.uint8).view(E4M3)
    calls = [
        lambda: ops.cast_to_fp8(wide[:, 3:80], scale, E4M3, 448.0),
        lambda: ops.cast_to_fp8(wide.t(), scales_of((91, 2))[:, :1] * 0 + 0.3, E5M2, 57344.0),
        lambda: ops.cast_from_fp8(codes.t(), scale, torch.float16),
        lambda: ops.maxabs(wide.t(), group=-1),
        lambda: ops.maxabs(wide[:, 5:6]),
    ]
    calls += [
        lambda start=start, size=size: ops.cast_to_fp8(wide.flatten()[start : start + size], torch.ones(1), E4M3, 448.0)
        for start in range(3)
        for size in range(70)
    ]
    for call in calls:
        assert_like_reference(call)


def some_scale_of_every_range():
    return 2.0 ** (torch.rand(1 << 15) * 16 - 12)


@over(dtype=HIGH, shape=[(131, 300), (5, 3, 3, 3), (3, 20000), (1, 50), (40, 1), (50001, 1), (7,)])
def test_scales_by_range(dtype, shape):
    scale_of_range = some_scale_of_every_range()
    x = torch.randn(shape).to(dtype) * 2.0 ** torch.randint(-8, 9, (shape[0], *[1] * (len(shape) - 1))).to(dtype)
    odd = x.clone()
    odd.view(-1)[-1], odd.view(-1)[0] = torch.nan, torch.inf
    transposed = x.transpose(0, -1)
    for case, per_row, (fp8, full_scale) in itertools.product((x, odd, transposed, x * 0), (False, True), FORMATS):
        options = {"per_row": per_row, "dtype": fp8, "full_scale": full_scale}
        for part in range(3):
            assert_like_reference(lambda x=case, i=part, o=options: ops.cast_to_fp8_by_range(x, scale_of_range, **o)[i])


@over(per_row=[False, True])
def test_scales_by_range_are_those_of_the_ranges(per_row):
    scale_of_range, x = some_scale_of_every_range(), torch.randn(9, 2048).bfloat16()
    x[4] *= 300
    codes, scale, maxabs = ops.cast_to_fp8_by_range(
        x.t().contiguous().t(), scale_of_range, per_row=per_row, dtype=E4M3, full_scale=240.0
    )
    assert torch.equal(maxabs, ops.maxabs(x, group=-per_row)) and codes.is_contiguous()
    assert torch.equal(scale, scale_of_range[maxabs.bfloat16().view(torch.int16).long()])
    assert same(codes, ops.cast_to_fp8(x, scale, E4M3, 240.0))


def test_values_of_every_code():
    for fp8, dtype, scale in itertools.product((E4M3, E5M2), HIGH, SCALES + NO_SCALES):
        codes = torch.arange(256, dtype=torch.uint8).view(fp8)
        for some in (codes[:128], codes[128:], codes.repeat(3)):  # few, and so many that they are looked up
            assert_like_reference(lambda c=some, s=scale, d=dtype: ops.cast_from_fp8(c, torch.tensor([s]), d))
        for size in range(1, 67):
            piece = codes[size : 2 * size + 1]
            assert_like_reference(lambda c=piece, d=dtype: ops.cast_from_fp8(c, torch.ones(1), d))


@over(dtype=HIGH)
def test_largest_magnitudes(dtype):
    for shape in [(7,), (5, 1), (3, 4, 33), (2, 40000), (20000, 2), (1, 16385), (0,), (0, 5), (5, 0)]:
        x = torch.randn(shape).to(dtype)
        cases = [x]
        if x.numel() > 2:
            for special in (torch.nan, -torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).smallest_normal / 4):
                cases.append(x.clone())
                cases[-1].view(-1)[x.numel() // 2] = special
            cases += [torch.zeros_like(x), -torch.zeros_like(x)]
        for case, group in itertools.product(cases, (0, -1)):
            assert_like_reference(lambda x=case, group=group: ops.maxabs(x, group=group))


def assert_like_reference_scales(x, group, hp_dtype, targets=TARGETS):
    for rounding, target, fp8_config in itertools.product(ROUNDINGS, targets, FP8_DTYPES):
        divisor = number_format(fp8_config, target).full_scale * (0.5 if rounding == "pow2" else 1.0)
        assert_like_reference(
            lambda r=rounding, t=target, f=fp8_config, d=divisor: ops.dynamic_scale(
                x, group=group, divisor=d, rounding=r, fp8_config=f, target=t, hp_dtype=hp_dtype
            ),
        )


@over(dtype=HIGH)
def test_dynamic_scale_of_every_range(dtype):
    """All 32768 non-negative patterns of 16 bits, Inf and NaN among them, each the range of a row."""
    ranges = every(torch.float16 if dtype == torch.float16 else torch.bfloat16)[1 << 15 :].to(dtype).reshape(-1, 1)
    for hp_dtype in {torch.bfloat16, dtype}:
        assert_like_reference_scales(ranges, -1, hp_dtype, ("gaudi2", "cpu"))


def test_dynamic_scale_of_a_tensor():
    cases = [torch.zeros(3, 40), torch.full((3, 40), torch.nan), torch.full((3, 40), torch.inf), torch.empty(0, 4)]
    cases += [torch.randn(3, 40) * size for size in (1e-30, 1e-4, 1.0, 300.0, 1e30)]
    cases.append(torch.randn(40, 64))
    cases[-1][3, 4] = torch.nan
    for x, dtype in itertools.product(cases, HIGH):
        if x.numel():
            assert_like_reference_scales(x.to(dtype), 0, dtype)
            assert_like_reference_scales(x.to(dtype), -1, torch.bfloat16)


@over(dtype=HIGH, rows=[1, 3, 129])
def test_dynamic_scale_of_groups(dtype, rows):
    """Of a single row, scales by groups of 128 have the shape that those of blocks would have."""
    x = (torch.randn(rows, 256) * 2.0 ** torch.randint(-20, 8, (rows, 1))).to(dtype)
    for group, rounding in itertools.product((32, 128), (*ROUNDINGS, "e8m0_ceil", "e8m0_above", "e8m0_floor")):
        options = {"divisor": 448.0, "rounding": rounding, "fp8_config": "E4M3", "target": "cpu", "hp_dtype": dtype}
        assert_like_reference(lambda g=group, o=options: ops.dynamic_scale(x, group=g, **o))


@over(default=[torch.float64, torch.bfloat16])
def test_the_default_dtype_plays_no_part(default):
    x, before = torch.randn(3, 40).bfloat16(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for group in (0, -1):
            assert_like_reference(lambda group=group: ops.maxabs(x, group=group))
            assert_like_reference_scales(x, group, torch.bfloat16)
    finally:
        torch.set_default_dtype(before)


@over(backend=BACKENDS)
def test_the_default_device_plays_no_part(backend):
    x = torch.randn(3, 40).bfloat16()
    options = {"group": -1, "rounding": "pow2", "fp8_config": "E4M3", "target": "cpu", "hp_dtype": torch.bfloat16}
    with ops.backend(backend):
        with torch.device("meta"):
            found = ops.dynamic_scale(x, divisor=448.0 * 0.75, **options)
        assert found.device.type == "cpu"
        assert torch.equal(found, ops.dynamic_scale(x, divisor=448.0 * 0.75, **options))
