"""The native gradient of a product's input against float64, on every variant this processor runs."""

import torch
from grids import over
from product_bounds import codes_like, scale_for, step_at

from optimum_fp8 import ops
from optimum_fp8.ops.operands import broadcast_scale

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HIGH = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["tensor", "channel", "blocks", "groups of 128", "groups of 32"]
SIZES = [(0, 3, 5), (1, 1, 1), (6, 2, 31), (7, 15, 64), (12, 33, 65), (13, 127, 127), (25, 257, 129), (3, 300, 513)]
BACKENDS = ops.cpu.backends()


def assert_right(grad, weight, scale, x=None, input_scale=None, full_scale=448.0):
    """On every variant: within the roundings of sums in float32 and of the result."""
    dense = weight.double() * broadcast_scale(scale, weight).double()
    expected, magnitudes = grad.double() @ dense, grad.double().abs() @ dense.abs()
    if x is not None:
        expected = expected.masked_fill((x.float() * (1 / input_scale)).abs() > full_scale, 0)
    bound = magnitudes * (2 + weight.shape[0] ** 0.5) * 2**-23 + step_at(expected, grad.dtype) / 2 * 1.01
    for backend in BACKENDS:
        with ops.backend(backend):
            y = ops.linear_input_gradient(grad, weight, scale, x, input_scale, full_scale=full_scale)
        assert y.dtype is grad.dtype and y.shape == (*grad.shape[:-1], weight.shape[1])
        same = (y.double() == expected) | (y.isnan() & expected.isnan())
        assert bool((same | ((y.double() - expected).abs() <= bound)).all()), backend


@over(sizes=SIZES, kind=KINDS, dtype=[torch.bfloat16, torch.float32], fp8=[E4M3, E5M2])
def test_sizes(sizes, kind, dtype, fp8):
    rows, out, size = sizes
    weight = codes_like((out, size), fp8)
    assert_right(torch.randn(rows, out).to(dtype), weight, scale_for(weight, kind))


@over(kind=["tensor", "blocks"])
def test_more_rows_than_are_packed_at_a_time(kind):
    weight = codes_like((140, 70), E4M3)
    assert_right(torch.randn(520, 140).bfloat16(), weight, scale_for(weight, kind))


@over(rows=[1, 5, 40], kind=["tensor", "channel"], dtype=HIGH)
def test_powers_of_two(rows, kind, dtype):
    weight = codes_like((259, 150), E4M3)
    scale = 2.0 ** torch.randint(-9, 3, (259, 1) if kind == "channel" else (1,))
    assert_right(torch.randn(rows, 259).to(dtype), weight, scale)


@over(dtype=HIGH, x_dtype=HIGH, kind=["tensor", "blocks"])
def test_zero_where_the_input_saturates(dtype, x_dtype, kind):
    weight, x = codes_like((66, 130), E4M3), torch.randn(9, 130).to(x_dtype)
    x[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    grad = torch.randn(9, 66).to(dtype)
    assert_right(grad, weight, scale_for(weight, kind), x, torch.tensor([1 / 448]))


@over(layout=["transposed", "sliced", "expanded", "batched", "one row"])
def test_layouts(layout):
    weight = codes_like((64, 96), E4M3)
    grad = {
        "transposed": torch.randn(64, 10).t(),
        "sliced": torch.randn(10, 70)[:, 3:67],
        "expanded": torch.randn(()).expand(10, 64),
        "batched": torch.randn(2, 3, 5, 64),
        "one row": torch.randn(64),
    }[layout]
    scale = torch.rand(1, 64).t()[::1]
    assert_right(grad.bfloat16(), weight, scale, torch.randn(*grad.shape[:-1], 192)[..., ::2], torch.tensor([0.002]))


@over(kind=["tensor", "channel", "blocks"], dtype=HIGH)
def test_nan_and_infinity_go_through(kind, dtype):
    weight = codes_like((40, 70), E4M3)
    grad = torch.randn(6, 40).to(dtype)
    grad[1, 3], grad[4, 0] = torch.nan, torch.inf
    assert_right(grad, weight, scale_for(weight, kind))


@over(backend=BACKENDS)
def test_codes_that_are_nan_go_through(backend):
    weight = torch.zeros(4, 8).to(E4M3)
    weight.view(torch.uint8)[2, 5] = 0x7F
    with ops.backend(backend):
        y = ops.linear_input_gradient(torch.ones(3, 4).bfloat16(), weight, torch.ones(1), None, None, full_scale=448.0)
    assert y[:, 5].isnan().all() and y.isnan().sum() == 3


def test_it_is_what_serves_the_processor():
    weight, record = codes_like((16, 16), E4M3), ops.CallRecord()
    operands = (torch.randn(2, 16), weight, torch.ones(1))
    ops.linear_input_gradient(*operands, None, None, full_scale=448.0, record=record)
    ops.linear_input_gradient(*operands, torch.randn(2, 16), torch.ones(2, 1), full_scale=448.0, record=record)
    assert record.kernels == {
        ("linear_input_gradient", BACKENDS[0]): 1,
        ("linear_input_gradient", "reference"): 1,
    }


def test_threads_find_the_same():
    weight, grad = codes_like((300, 1500), E4M3), torch.randn(50, 300).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.linear_input_gradient(grad, weight, torch.ones(1), None, None, full_scale=448.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
