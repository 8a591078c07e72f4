"""The native convolution against the reference, on every variant that this processor runs."""

import itertools

import torch
from grids import over
from native_variants import OF_CASTS_AND_ATTENTION as BACKENDS

from optimum_fp8 import ops

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HIGH = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
GEOMETRIES = [
    PLAIN,
    {**PLAIN, "stride": (2, 3), "padding": (1, 2)},
    {**PLAIN, "dilation": (2, 1), "padding": (2, 0)},
    {**PLAIN, "groups": 3, "padding": (1, 1)},
    {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "groups": 6},
]


def operands(dtype, geometry, fp8=E4M3, shape=(2, 6, 9, 11), per_channel=True, input_scale=0.03):
    weight = (torch.randn(12, shape[-3] // geometry["groups"], 3, 3) * 20).to(fp8)
    weight_scale = torch.rand((12, 1, 1, 1) if per_channel else (1,)) * 0.01 + 1e-4
    scale = None if input_scale is None else torch.tensor([input_scale])
    return torch.randn(shape).to(dtype), weight, weight_scale, scale, torch.randn(12).to(dtype)


def assert_like_reference(arguments, geometry, full_scale=448.0, arithmetic="fused"):
    options = {**geometry, "full_scale": full_scale, "arithmetic": arithmetic}
    with ops.backend("reference"):
        expected = ops.conv(*arguments, **options)
    # Sums in another order round another way now and then: by one unit, where there are two roundings by two.
    eps = torch.finfo(expected.dtype).eps
    tolerance = {"rtol": max(eps if arithmetic == "fused" else 2 * eps, 2e-6), "atol": 2 * eps + 2e-6}
    for backend in BACKENDS:
        with ops.backend(backend):
            found = ops.conv(*arguments, **options)
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)
        assert found.dtype == expected.dtype == arguments[0].dtype, backend


@over(arithmetic=ops.ARITHMETICS, geometry=GEOMETRIES)
def test_geometries(arithmetic, geometry):
    for dtype, input_scale, per_channel in itertools.product(HIGH, (None, 0.03), (True, False)):
        arguments = operands(dtype, geometry, per_channel=per_channel, input_scale=input_scale)
        assert_like_reference(arguments, geometry, arithmetic=arithmetic)
        assert_like_reference((*arguments[:4], None), geometry, arithmetic=arithmetic)


@over(arithmetic=ops.ARITHMETICS)
def test_shapes_formats_and_layouts(arithmetic):
    for dtype in HIGH:
        unbatched = operands(dtype, PLAIN, shape=(6, 9, 11))
        assert_like_reference(unbatched, PLAIN, arithmetic=arithmetic)
        assert_like_reference(operands(dtype, PLAIN, E5M2), PLAIN, 57344.0, arithmetic)
        assert_like_reference(operands(dtype, PLAIN, input_scale=0.004), PLAIN, 240.0, arithmetic)
        x, *rest = operands(dtype, PLAIN)
        for layout in (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, 1:, ::2]):
            assert_like_reference((layout, *rest), PLAIN, arithmetic=arithmetic)
        x[1, 2, 3, 4], x[0, 1, 2, 3] = torch.nan, torch.inf
        assert_like_reference((x, *rest), PLAIN, arithmetic=arithmetic)


@over(backend=BACKENDS)
def test_default_dtype_and_device_play_no_part(backend):
    arguments, before = operands(torch.bfloat16, PLAIN), torch.get_default_dtype()
    with torch.device("meta"), ops.backend(backend):
        result = ops.conv(*arguments, **PLAIN, full_scale=448.0)
    assert result.device.type == "cpu"
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            assert_like_reference(arguments, PLAIN)
        finally:
            torch.set_default_dtype(before)
