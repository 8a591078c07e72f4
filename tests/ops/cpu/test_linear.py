"""The native products against float64 products of the same rounded operands, on every variant this processor runs."""

import itertools

import hypothesis
import torch
from grids import over
from hypothesis import strategies
from product_bounds import codes_like, excess, products, scale_for, step_at, uses_pairs

from optimum_fp8 import ops
from optimum_fp8.ops.operands import group_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FULL_SCALES = {E4M3: 448.0, E5M2: 57344.0}
HIGH = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [0, 1, 4, 5, 8, 9, 12, 13, 24, 25, 32, 33, 512, 513, 520]
OUTS = [1, 15, 16, 17, 31, 33, 127, 129]
INS = [1, 3, 4, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025]
EDGE_CASES = [
    (torch.bfloat16, "channel", 0.02),
    (torch.float16, "blocks", None),
    (torch.float32, "tensor", None),
    (torch.bfloat16, "groups of 32", None),
]
KINDS = ["tensor", "channel", "blocks", "groups of 128", "groups of 32"]
BACKENDS = ops.cpu.backends()


def on(backend, x, weight, weight_scale, input_scale, bias, full_scale, arithmetic="fused"):
    with ops.backend(backend):
        return ops.linear(x, weight, weight_scale, input_scale, bias, full_scale=full_scale, arithmetic=arithmetic)


def assert_right(x, weight, weight_scale, input_scale, bias, full_scale, arithmetic="fused"):
    """On every variant; what they found, by name."""
    arguments = (x, weight, weight_scale, input_scale, bias, full_scale, arithmetic)
    found = {backend: on(backend, *arguments) for backend in BACKENDS}
    for y in found.values():
        assert y.shape == (*x.shape[:-1], weight.shape[0]) and y.dtype == x.dtype
    if arithmetic == "qdq":
        expected = on("reference", *arguments).double()
        _, bound = products(*arguments[:4], full_scale)
        largest = expected.abs() if bias is None else expected.abs() + bias.double().abs() * 2
        allowed = 2 * bound + 2 * step_at(largest, x.dtype)
        for backend, y in found.items():
            same = (y == expected) | (y.isnan() & expected.isnan())
            assert (same | ((y.double() - expected).abs() <= allowed)).all(), backend
        return found
    exact = {pairs: products(*arguments[:4], full_scale, pairs) for pairs in (False, True)}
    for backend, y in found.items():
        beyond = excess(y, *exact[uses_pairs(backend, x, weight_scale, input_scale)], bias, arithmetic)
        assert beyond.numel() == 0 or beyond.max() <= 0, backend
    return found


@strategies.composite
def calls(draw):
    """Arguments of a call of any kind."""
    torch.manual_seed(draw(strategies.integers(0, 2**32)))
    one_of = lambda *options: draw(strategies.sampled_from(options))  # noqa: E731
    rows, out, into = (
        draw(strategies.integers(0, 70)),
        draw(strategies.integers(1, 140)),
        draw(strategies.integers(1, 300)),
    )
    dtype, fp8 = one_of(*HIGH), one_of(E4M3, E5M2)
    x = (torch.randn(rows, into) * one_of(1e-3, 1.0, 8.0)).to(dtype)
    layout = one_of("plain", "transposed", "sliced", "expanded", "batched")
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "sliced":
        x = torch.randn(rows, into + 3).to(dtype)[:, 2 : into + 2]
    elif layout == "expanded":
        x = torch.randn(1, into).to(dtype).expand(rows, into)
    elif layout == "batched":
        x = torch.randn(2, rows // 7, 3, into).to(dtype)
    weight = codes_like((out, into), fp8)
    weight_scale = scale_for(weight, one_of(*KINDS))
    kind = one_of(None, (1,), (*x.shape[:-1], 1), *((*x.shape[:-1], -(-into // group)) for group in (128, 32)))
    input_scale = None if kind is None else torch.rand(kind) * 0.05 + 1e-3
    bias = one_of(None, torch.bfloat16, torch.float32, dtype)
    bias = None if bias is None else torch.randn(out).to(bias)
    full_scale = one_of(240.0, 448.0) if fp8 == E4M3 else 57344.0
    scales = [(weight_scale, weight)] + ([] if input_scale is None else [(input_scale, x)])
    by_groups = any(group_of(*each) for each in scales)
    casts = () if by_groups and into % 128 else ("qdq",)  # which take whole groups only
    return x, weight, weight_scale, input_scale, bias, full_scale, one_of("fused", "fused", "gaudi", *casts)


@hypothesis.settings(max_examples=40)
@hypothesis.given(data=calls())
def test_any_call(data):
    assert_right(*data)


@over(case=EDGE_CASES)
def test_all_edges(case):
    """Sizes on both sides of every vector, tile, panel, task and pass: parts of one large product."""
    dtype, kind, static = case
    input_scale = None if static is None else torch.tensor([static])
    for into in INS:
        all_rows, outs = (ROWS, OUTS) if into == 65 else ((1, 8, 13, 25), OUTS[4:6])
        x, bias = torch.randn(all_rows[-1], into).to(dtype), torch.randn(OUTS[-1]).to(dtype)
        weight = codes_like((OUTS[-1], into), E5M2 if into % 2 else E4M3)
        weight_scale = scale_for(weight, kind)
        full_scale = FULL_SCALES[weight.dtype]
        for backend in BACKENDS:
            pairs = uses_pairs(backend, x, weight_scale, input_scale)
            exact, bound = products(x, weight, weight_scale, input_scale, full_scale, pairs)
            for rows, out in itertools.product(all_rows, outs):
                share = {"tensor": 1, "blocks": -(-out // 128)}.get(kind, out)
                y = on(backend, x[:rows], weight[:out], weight_scale[:share], input_scale, bias[:out], full_scale)
                beyond = excess(y, exact[:rows, :out], bound[:rows, :out], bias[:out], "fused")
                assert rows == 0 or beyond.max() <= 0, (backend, rows, out, into)


@over(shape=[(1, 17000), (2, 4240), (3, 2900), (4, 2113), (7, 2113), (20, 1500), (32, 1089)])
def test_sums_kept_from_span_to_span(shape):
    """Rows so long that k is cut into spans, on which sums go on where they were."""
    rows, into = shape
    weight = codes_like((37, into), E4M3)
    for dtype, kind in ((torch.bfloat16, "channel"), (torch.float32, "tensor"), (torch.bfloat16, "blocks")):
        x = torch.randn(rows, into).to(dtype)
        assert_right(x, weight, scale_for(weight, kind), None, None, 448.0)
    for kind, group in (("groups of 32", 32), ("blocks", 128)):
        input_scale = torch.rand(rows, -(-into // group)) * 0.05 + 1e-3
        assert_right(torch.randn(rows, into), weight, scale_for(weight, kind), input_scale, None, 448.0)


@over(layout=[("groups of 32", 32), ("groups of 32", 128), ("blocks", 128), ("blocks", 32), ("channel", 32)])
def test_inputs_by_groups_at_all_edges(layout):
    kind, group = layout
    for rows, into in ((1, 129), (5, 160), (8, 511), (33, 545), (34, 129), (37, 1057), (513, 160)):
        fp8 = E5M2 if rows % 2 else E4M3
        x, weight = torch.randn(rows, into).bfloat16(), codes_like((33, into), fp8)
        input_scale = torch.exp2(torch.randint(-9, -3, (rows, -(-into // group))).float())
        scale = scale_for(weight, kind)
        assert_right(x, weight, scale, input_scale, torch.randn(33), FULL_SCALES[fp8])


def powers_of_two(shape):
    """Of very different sizes; scales of another kind would be further from the product than float32 is."""
    return torch.exp2(torch.randint(-24, 25, shape).float())


@over(kind=["groups of 32", "groups of 128", "blocks"], group=[None, 0, 32, 128])
def test_many_rows_with_scales_that_are_powers_of_two(kind, group):
    """Which may be in the values that are multiplied: zeros, NaN and Inf stay what they are."""
    for rows, into, fp8 in ((48, 96, E4M3), (49, 545, E5M2)):
        x, weight = torch.randn(rows, into).bfloat16(), codes_like((130, into), fp8)
        scale = powers_of_two(scale_for(weight, kind).shape)
        shape = (rows, 1) if not group else (rows, -(-into // group))
        input_scale = None if group is None else powers_of_two(shape)
        x[3, 7], x[5] = 0, 0
        weight.view(torch.uint8)[40:42] = torch.tensor([0x00, 0x80], dtype=torch.uint8)[:, None]
        assert_right(x, weight, scale, input_scale, torch.randn(130).bfloat16(), FULL_SCALES[fp8])
        weight.view(torch.uint8)[range(0, 130, 7), range(0, 19)] = 0x7F if fp8 == E4M3 else 0x7C
        assert_right(x, weight, scale, input_scale, None, FULL_SCALES[fp8])
        scale[-1, -1] *= 1.5  # one that is none
        assert_right(x, weight, scale, input_scale, None, FULL_SCALES[fp8])


@over(kind=["groups of 32", "blocks"])
def test_a_scale_of_each_group_reaches_its_values_alone(kind):
    """One group of the input and of the weight at a time is not 0; a scale that belongs elsewhere would show."""
    into = 300
    weight = codes_like((130, into), E4M3)
    weight_scale = torch.exp2(torch.arange(scale_for(weight, kind).numel()) % 23 - 12.0).reshape_as(
        scale_for(weight, kind)
    )
    for rows, group in itertools.product((1, 40), (32, 128)):
        count = -(-into // group)
        input_scale = torch.exp2(torch.arange(rows * count) % 19 - 9.0).reshape(rows, count)
        for at in range(0, count, 4 if group == 32 else 1):
            x = torch.zeros(rows, into)
            x[:, at * group : (at + 1) * group] = torch.randn(rows, min(group, into - at * group))
            assert_right(x, weight, weight_scale, input_scale, None, 448.0)


@over(fp8=[E4M3, E5M2])
def test_every_code(fp8):
    """Row n of the weight is full of code n: NaN and Inf come out of its own column alone."""
    weight = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 67).view(fp8)
    weight_scale = torch.tensor([1 / FULL_SCALES[fp8]])
    for rows, dtype in itertools.product((1, 5, 8, 9, 26), HIGH):
        x = torch.randn(rows, 67).abs().to(dtype)
        assert_right(x, weight, weight_scale, None, None, FULL_SCALES[fp8])
        for backend in BACKENDS:
            y = on(backend, x, weight, weight_scale, torch.tensor([0.02]), None, FULL_SCALES[fp8])
            assert torch.equal(y.isnan(), weight.float().isnan()[:, 0].expand_as(y)), backend
            assert torch.equal(y.isinf(), weight.float().isinf()[:, 0].expand_as(y)), backend


@over(arithmetic=ops.ARITHMETICS)
def test_codes_with_nan_and_inf_anywhere(arithmetic):
    for fp8, rows, kind in itertools.product((E4M3, E5M2), (1, 6, 20), ("channel", "blocks")):
        weight = codes_like((40, 139), fp8)
        specials = torch.tensor([0x7F, 0xFF, 0x7C, 0xFC] if fp8 == E5M2 else [0x7F, 0xFF], dtype=torch.uint8)
        for n in range(0, 40, 3):
            weight.view(torch.uint8)[n, (n * 17) % 139] = specials[n % len(specials)]
        for input_scale in (None, torch.tensor([0.02])):
            x = torch.randn(rows, 139).bfloat16()
            assert_right(x, weight, scale_for(weight, kind), input_scale, None, FULL_SCALES[fp8], arithmetic)


@over(arithmetic=["fused", "gaudi"])
def test_nan_and_inf_stay_in_their_rows(arithmetic):
    for rows, dtype, input_scale in itertools.product((3, 8, 30, 513), HIGH, (None, torch.tensor([0.02]))):
        x, weight = torch.randn(rows, 70).to(dtype), codes_like((37, 70), E4M3)
        weight_scale = scale_for(weight, "channel")
        arguments = (x, weight, weight_scale, input_scale, None, 448.0, arithmetic)
        clean = {backend: on(backend, *arguments) for backend in BACKENDS}
        x[0, 69], x[rows // 2, 3], x[rows - 1, 5] = torch.nan, torch.inf, -torch.inf
        others = [row for row in range(rows) if row not in (0, rows // 2, rows - 1)]
        for backend, y in assert_right(*arguments).items():
            assert y[0].isnan().all() and torch.equal(y[others], clean[backend][others]), backend


@over(backend=BACKENDS)
def test_weights_of_zeros_leave_the_bias(backend):
    for code, rows, dtype, kind in itertools.product((0x00, 0x80), (1, 7, 30), HIGH, ("channel", "blocks")):
        weight = torch.full((35, 77), code, dtype=torch.uint8).view(E4M3)
        x, bias, scales = torch.randn(rows, 77).to(dtype), torch.randn(35), scale_for(weight, kind)
        for input_scale, arithmetic in itertools.product((None, torch.full((rows, 1), 0.02)), ops.ARITHMETICS):
            y = on(backend, x, weight, scales, input_scale, None, 448.0, arithmetic)
            assert torch.equal(y, torch.zeros_like(y))
            y = on(backend, x, weight, scales, input_scale, bias, 448.0, arithmetic)
            assert torch.equal(y, bias.to(dtype).expand(rows, 35))


def test_subnormal_codes_and_tiny_inputs():
    for fp8, rows, dtype, size in itertools.product((E4M3, E5M2), (1, 6, 20), HIGH, (1.0, 2.0**-20, 2.0**-120)):
        weight = (torch.randint(0, 256, (33, 129), dtype=torch.uint8) & (0x87 if fp8 == E4M3 else 0x83)).view(fp8)
        x = (torch.randn(rows, 129) * size).to(dtype)
        for kind, input_scale in itertools.product(("tensor", "blocks"), (None, torch.tensor([2.0**-8]))):
            weight_scale = scale_for(weight, kind) * 2.0**10
            assert_right(x, weight, weight_scale, input_scale, None, FULL_SCALES[fp8])


@over(arithmetic=ops.ARITHMETICS)
def test_without_input_features_the_bias_is_left(arithmetic):
    """Nothing is added up: zeros, or the bias; never what the memory held (by whichever backend takes the call)."""
    for rows, bias in itertools.product((0, 3, 30), (None, torch.randn(6))):
        torch.full((rows, 6), torch.nan)  # what an uninitialised result would likely find
        arguments = (torch.empty(rows, 0), torch.empty(6, 0).to(E4M3), torch.ones(1), None, bias)
        y = ops.linear(*arguments, full_scale=448.0, arithmetic=arithmetic)
        assert torch.equal(y, torch.zeros(rows, 6) if bias is None else bias.expand(rows, 6))


@over(backend=BACKENDS, arithmetic=ops.ARITHMETICS)
def test_arguments_of_any_layout_are_read_right(backend, arithmetic):
    """Strided or refused, but never misread: scales and biases that are views of others."""
    x, weight = torch.randn(5, 40), codes_like((6, 40), E4M3)
    wide, whole = torch.rand(5, 3) * 0.1 + 0.01, scale_for(weight, "channel")
    input_scales = [torch.tensor([[0.02]]).expand(5, 1), wide[:, :1], wide[:, 1:2]]
    biases = [torch.arange(18.0)[::3], torch.tensor([2.0]).expand(6), torch.arange(12.0).reshape(6, 2)[:, 0]]
    weight_scales = [whole, torch.rand(6, 2)[:, :1] * whole, torch.tensor([[0.003]]).expand(6, 1)]
    for input_scale, bias, weight_scale in itertools.product(input_scales, biases, weight_scales):
        dense = [input_scale.clone(memory_format=torch.contiguous_format), bias.contiguous(), weight_scale.contiguous()]
        expected = on(backend, x, weight, dense[2], dense[0], dense[1], 448.0, arithmetic)
        found = ops.linear(x, weight, weight_scale, input_scale, bias, full_scale=448.0, arithmetic=arithmetic)
        torch.testing.assert_close(found, expected)
