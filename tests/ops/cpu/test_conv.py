"""The native convolution against the reference, on every variant that this processor runs."""

import itertools

import torch
from grids import over
from native_variants import OF_CASTS as BACKENDS

from optimum_fp8 import ops
from optimum_fp8.ops.arguments import ConvCall
from optimum_fp8.ops.cpu import casts
from optimum_fp8.ops.cpu import conv as native
from optimum_fp8.ops.cpu.library import load
from optimum_fp8.ops.cpu.windows import windows_of

OF_WINDOWS = [f"cpu_{each}" for each in native.OF_WINDOWS if f"cpu_{each}" in ops.cpu.backends()]

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


def assert_like_reference(arguments, geometry, full_scale=448.0, arithmetic="fused", backends=BACKENDS):
    options = {**geometry, "full_scale": full_scale, "arithmetic": arithmetic}
    with ops.backend("reference"):
        expected = ops.conv(*arguments, **options)
    # Sums in another order round another way now and then: by one unit, where there are two roundings by two.
    eps = torch.finfo(expected.dtype).eps
    tolerance = {"rtol": max(eps if arithmetic == "fused" else 2 * eps, 2e-6), "atol": 2 * eps + 2e-6}
    for backend in backends:
        with ops.backend(backend):
            found = ops.conv(*arguments, **options)
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)
        assert found.dtype == expected.dtype == arguments[0].dtype, backend
        assert found.stride() == expected.stride(), backend


@over(arithmetic=ops.ARITHMETICS, geometry=GEOMETRIES)
def test_geometries(arithmetic, geometry):
    for dtype, (input_scale, per_channel, biased) in itertools.product(
        HIGH, ((None, True, True), (0.03, False, True), (0.03, True, False))
    ):
        x, *rest, bias = operands(dtype, geometry, per_channel=per_channel, input_scale=input_scale)
        assert_like_reference((x, *rest, bias if biased else None), geometry, arithmetic=arithmetic)


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


# --- products of windows, and torch's convolution in bfloat16 ---------------------------------------------------------


def whole(dims, transposed=False, stride=1, padding=0, dilation=1, groups=1, output_padding=0):
    """A geometry that is the same in all dimensions."""
    each = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    return {name: (value,) * dims for name, value in each.items()} | {"groups": groups, "transposed": transposed}


WIDE = [
    whole(1, stride=2, padding=2),
    whole(2),
    whole(2, padding=1, groups=2),
    whole(2, dilation=2, padding=2, stride=3),
    whole(3, padding=1),
    whole(1, True, stride=3, padding=2, output_padding=1),
    whole(1, True, stride=2, dilation=3),
    whole(1, True, stride=4, dilation=2),  # no tap reaches every other phase
    whole(1, True, stride=5),  # nor some here
    whole(2, True, stride=2, padding=1, output_padding=1, groups=2),
    whole(2, True, padding=2),
    whole(3, True, stride=2, padding=1),
]


def wide(geometry, dtype=torch.bfloat16, fp8=E4M3, kernel=3, images=2, powers=False, input_scale=2.0**-5):
    """Operands for 20 channels in and 40 out of a group, more than a vector of either."""
    dims, groups = len(geometry["stride"]), geometry["groups"]
    weight = (torch.randn(40 * groups, 20, *[kernel] * dims) * 20).to(fp8)
    weight_scale = torch.rand(40 * groups, 1, *[1] * dims) * 0.01 + 1e-4
    weight_scale = 2.0 ** weight_scale.log2().round() if powers else weight_scale
    x = torch.randn(images, 20 * groups, *([37], [9, 10], [4, 5, 6])[dims - 1]).to(dtype)
    scale = None if input_scale is None else torch.tensor([input_scale])
    return x, weight, weight_scale, scale, torch.randn(40 * groups).to(dtype)


def ways_of(arguments, geometry):
    """The names of what is tried for a call."""
    call = ConvCall(*arguments, **{"transposed": False, "output_padding": []} | geometry, full_scale=448, arithmetic="")
    return [way.__name__ for way in native.Conv(casts.Casts(load(), "portable"), "avx512bf16")._ways(call)]


@over(geometry=WIDE, arithmetic=["fused", "gaudi"])
def test_windows(geometry, arithmetic):
    assert_like_reference(wide(geometry), geometry, arithmetic=arithmetic, backends=OF_WINDOWS)
    assert_like_reference(wide(geometry, input_scale=None), geometry, arithmetic=arithmetic, backends=OF_WINDOWS)


@over(geometry=WIDE)
def test_windows_in_all_dtypes_and_formats(geometry):
    for dtype in HIGH:
        assert_like_reference((*wide(geometry, dtype, E5M2)[:4], None), geometry, 57344.0, backends=OF_WINDOWS)
    x, *rest = wide(geometry)
    assert_like_reference((x[0], *rest), geometry, backends=OF_WINDOWS)
    assert_like_reference((x[..., ::2], *rest), geometry, backends=OF_WINDOWS)


@over(arithmetic=["fused", "gaudi"], input_scale=[None, 2.0**-5])
def test_channels_last_stay_last(arithmetic, input_scale):
    for geometry, kernel in itertools.product((whole(2, padding=1), whole(2, stride=2), whole(2, True)), (1, 3)):
        x, weight, *rest = wide(geometry, kernel=kernel, input_scale=input_scale)
        last, weight_last = (each.to(memory_format=torch.channels_last) for each in (x, weight))
        for operands_last in ((last, weight), (x, weight_last), (last, weight_last), (last[0], weight)):
            assert_like_reference((*operands_last, *rest), geometry, arithmetic=arithmetic, backends=OF_WINDOWS)


@over(kernel=[4, 6], stride=[(2, 2), (2, 1), (1, 2)])
def test_phases_of_as_many_taps(kernel, stride):
    geometry = whole(2, True, padding=1) | {"stride": stride}
    assert_like_reference(wide(geometry, kernel=kernel), geometry, backends=OF_WINDOWS)


def test_more_products_than_are_run_at_a_time():
    geometry = whole(2, True, stride=2, padding=1, groups=17)
    assert_like_reference(wide(geometry, images=1), geometry, backends=OF_WINDOWS)


def test_more_windows_than_are_packed_at_a_time():
    geometry = whole(2, padding=1)
    x, *rest = wide(geometry, images=1)
    assert_like_reference((torch.randn(3, 20, 19, 20).bfloat16(), *rest), geometry, backends=OF_WINDOWS)


@over(arithmetic=["fused", "gaudi"], input_scale=[None, 2.0**-5])
def test_torchs_bfloat16_where_scales_are_powers_of_two(arithmetic, input_scale):
    for geometry in (whole(2, padding=1), whole(2, padding=1, groups=3)):
        x, *rest = wide(geometry, powers=True, input_scale=input_scale)
        assert ways_of((x, *rest), geometry)[0] == "_by_torch"
        assert_like_reference((x, *rest), geometry, arithmetic=arithmetic, backends=OF_WINDOWS)
        assert_like_reference((x, *rest[:3], rest[3].float()), geometry, arithmetic=arithmetic, backends=OF_WINDOWS)
        few = torch.full_like(rest[1], 2.0**-100)
        assert_like_reference((x, rest[0], few, *rest[2:]), geometry, arithmetic=arithmetic, backends=OF_WINDOWS)


def test_which_way_is_taken():
    few, many = wide(whole(2), images=1), wide(whole(2), images=8)
    assert ways_of(few, whole(2)) == ["_by_windows", "_by_torch"]
    assert ways_of(many, whole(2)) == ["_by_torch", "_by_windows"]
    x, weight, *rest = wide(whole(2))
    assert ways_of((x, weight[:8], *rest), whole(2)) == ["_by_torch"]
    assert ways_of((x.half(), weight, rest[0], None, rest[2]), whole(2)) == []


@over(geometry=WIDE, arithmetic=["fused", "gaudi"])
def test_all_ways_are_equal_where_sums_are_exact(geometry, arithmetic):
    """On small integers they are: then what rounds at all are outputs, and the bias of "gaudi"."""
    x, weight, _, _, bias = wide(geometry)
    x, weight = torch.randint_like(x, -8, 9), torch.randint(-8, 9, weight.shape).to(E4M3)
    for scale in (torch.full((len(weight), *[1] * (weight.ndim - 1)), 0.25), torch.ones(1)):
        options = geometry | {"full_scale": 448.0, "arithmetic": arithmetic}
        with ops.backend("reference"):
            expected = ops.conv(x, weight, scale, torch.ones(1), bias, **options)
        call = ConvCall(x, weight, scale, torch.ones(1), bias, **options)
        for backend in OF_WINDOWS:
            conv = native.Conv(casts.Casts(load(), backend.removeprefix("cpu_")), backend.removeprefix("cpu_"))
            found = conv._by_windows(call, scale)
            assert found is None if windows_of(call) is None else torch.equal(found, expected), backend
            found, can = conv._by_torch(call, scale), conv.uses_torchs_bfloat16 and not geometry["transposed"]
            assert torch.equal(found, expected) if can else found is None, backend


def test_it_rounds_where_it_should_on_every_way():
    """On small integers every sum is exact, so results are equal to the last bit."""
    geometry = whole(2, padding=1)
    for images, scale in ((1, 3.0), (1, 1.0), (16, 0.25)):
        x, weight = torch.randint(-8, 9, (images, 20, 8, 8)).bfloat16(), torch.randint(-8, 9, (40, 20, 3, 3)).float()
        bias = (torch.randint(-999, 1000, (40,)) / 64).bfloat16()
        product = torch.nn.functional.conv2d(x.double(), weight.double() * scale, padding=1)
        offset = bias.double()[:, None, None]
        expected = {"fused": (product + offset).bfloat16(), "gaudi": (product.bfloat16() + offset).bfloat16()}
        assert not torch.equal(*expected.values())
        operands = (x, weight.to(E4M3), torch.full((40, 1, 1, 1), scale), torch.ones(1), bias)
        for backend, arithmetic in itertools.product(OF_WINDOWS, expected):
            with ops.backend(backend):
                found = ops.conv(*operands, **geometry, full_scale=448.0, arithmetic=arithmetic)
            assert torch.equal(found, expected[arithmetic]), (backend, arithmetic, scale)


def test_the_kernel_that_no_window_fits_has_none():
    x, weight, *rest = wide(whole(1, True, stride=5))
    call = ConvCall(x, weight, *rest, **whole(1, True, stride=5), full_scale=448.0, arithmetic="fused")
    assert windows_of(call) is None
    assert windows_of(call._replace(x=x[..., :2], transposed=False)) is None


@over(backend=BACKENDS)
def test_bias_in_double(backend):
    x, weight, scale, input_scale, bias = wide(whole(2))
    assert_like_reference((x, weight, scale, input_scale, bias.double()), whole(2), backends=[backend])


@over(backend=OF_WINDOWS)
def test_channels_last_by_strides_that_could_be_read_in_two_ways(backend):
    for shape, kernel in (
        ((2, 20, 1, 1), 1),
        ((2, 20, 1, 9), 1),
        ((1, 20, 7, 1), 1),
        ((3, 1, 5, 5), 3),
        ((2, 1, 3, 1), 1),
    ):
        weight, scale = torch.randn(40, shape[1], kernel, kernel).to(E4M3), torch.ones(1)
        for x_form, weight_form in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
            x = torch.empty(shape, memory_format=x_form).normal_().bfloat16()
            laid = torch.empty(weight.shape, dtype=E4M3, memory_format=weight_form).copy_(weight)
            assert_like_reference((x, laid, scale, None, None), whole(2), backends=[backend])
