"""The native grouped products, of each expert's rows, against float64 products; how much is allowed says
`product_bounds`."""

import itertools

import hypothesis
import pytest
import torch
from grids import over
from hypothesis import strategies
from product_bounds import codes_like, excess, products, uses_pairs

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FULL_SCALES = {E4M3: 448.0, E5M2: 57344.0}
HIGH = [torch.bfloat16, torch.float16, torch.float32]
BACKENDS = ops.cpu.backends()
EDGES = [1, 2, 0, 4, 5, 8, 9, 12, 13, 25, 33, 513, 0]  # rows of an expert, on both sides of what kernels take at a time


def scales_for(weight, kind):
    """Scales that make weights of about 1."""
    count, out, into = weight.shape
    blocks = (count, -(-out // 128), -(-into // 128))
    groups = {f"groups of {group}": (count, out, -(-into // group)) for group in (128, 32)}
    others = {"expert": (count, 1, 1), "halves": (count, 2, 1), "channels": (count, out, 1), "blocks": blocks}
    shape = {**groups, **others}[kind]
    return (torch.rand(shape) + 0.5) / torch.finfo(weight.dtype).max


def on(backend, *operands, full_scale, arithmetic="fused"):
    with ops.backend(backend):
        return ops.grouped_linear(*operands, full_scale=full_scale, arithmetic=arithmetic)


def of_expert(expert, rows, x, weight, weight_scale, input_scale, bias):
    """The operands of `ops.linear` for some rows of an expert."""
    scale = weight_scale[expert]
    if scale.shape == (2, 1) and weight.shape[1] % 2 == 0:
        scale = torch.cat([half.expand(weight.shape[1] // 2, 1) for half in scale.split(1)])
    if input_scale is not None and input_scale.ndim > 1:
        input_scale = input_scale[expert, 0] if input_scale.ndim == 3 else input_scale[rows]
    return x[rows], weight[expert], scale, input_scale, None if bias is None else bias[expert]


def assert_right(x, experts, weight, weight_scale, input_scale, bias, full_scale, arithmetic="fused"):
    operands = (x, experts, weight, weight_scale, input_scale, bias)
    found = {backend: on(backend, *operands, full_scale=full_scale, arithmetic=arithmetic) for backend in BACKENDS}
    here = (experts >= 0) & (experts < len(weight))
    for y in found.values():
        assert y.shape == (len(x), weight.shape[1]) and y.dtype == x.dtype and not y[~here].any()
    for expert in experts[here].unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        *own, offsets = of_expert(expert, rows, x, weight, weight_scale, input_scale, bias)
        exact = {pairs: products(*own, full_scale, pairs) for pairs in (False, True)}
        for backend, y in found.items():
            beyond = excess(y[rows], *exact[uses_pairs(backend, *own[::2], own[3])], offsets, arithmetic)
            assert beyond.max() <= 0, (backend, expert, len(rows))
    return found


def rows_of(counts):
    """Which expert each row is of, mixed: `counts` of them, and two of none."""
    experts = torch.cat(
        [torch.full((count,), expert) for expert, count in enumerate(counts)] + [torch.tensor([-3, 99])]
    )
    return experts[torch.randperm(len(experts))]


@strategies.composite
def calls(draw):
    """Arguments of a call of any kind."""
    torch.manual_seed(draw(strategies.integers(0, 2**32)))
    one_of = lambda *options: draw(strategies.sampled_from(options))  # noqa: E731
    counts = draw(strategies.lists(strategies.integers(0, one_of(2, 40)), min_size=1, max_size=6))
    experts, out, into = rows_of(counts), draw(strategies.integers(1, 140)), draw(strategies.integers(1, 300))
    dtype, fp8, rows = one_of(*HIGH), one_of(E4M3, E5M2), len(experts)
    weight = codes_like((len(counts), out, into), fp8)
    kinds = ("expert", "channels", "blocks", "groups of 128", "groups of 32", *["halves"] * (out % 2 == 0))
    weight_scale = scales_for(weight, one_of(*kinds))
    kind = one_of(None, (1,), (rows, 1), (len(counts), 1, 1), (rows, -(-into // 128)), (rows, -(-into // 32)))
    input_scale = None if kind is None else torch.rand(kind) * 0.05 + 1e-3
    bias = one_of(None, torch.bfloat16, torch.float32, dtype)
    bias = None if bias is None else torch.randn(len(counts), out).to(bias)
    full_scale = one_of(240.0, 448.0) if fp8 == E4M3 else 57344.0
    x = (torch.randn(rows, into) * one_of(1e-3, 1.0, 8.0)).to(dtype)
    return x, experts, weight, weight_scale, input_scale, bias, full_scale, one_of("fused", "gaudi")


@hypothesis.settings(max_examples=30)
@hypothesis.given(data=calls())
def test_any_call(data):
    assert_right(*data)


@over(case=[(torch.bfloat16, "channels", "row"), (torch.float16, "blocks", None), (torch.float32, "halves", "expert")])
def test_all_edges(case):
    """Experts with as many rows as kernels take at a time, and one more, side by side in a call."""
    dtype, kind, activations = case
    experts, (out, into) = rows_of(EDGES), (130, 65)
    weight, x = codes_like((len(EDGES), out, into), E4M3), torch.randn(len(experts), into).to(dtype)
    shape = {"row": (len(x), 1), "expert": (len(EDGES), 1, 1), None: None}[activations]
    input_scale = None if shape is None else torch.rand(shape) * 0.05 + 1e-3
    bias = torch.randn(len(EDGES), out).to(dtype)
    assert_right(x, experts, weight, scales_for(weight, kind), input_scale, bias, 448.0)


@over(backend=BACKENDS)
def test_any_number_of_threads_gives_the_same(backend):
    weight = codes_like((5, 96, 130), E4M3)
    scale, before = scales_for(weight, "channels"), torch.get_num_threads()
    for counts in ([1, 1, 0, 1, 1], [0, 300, 3, 17, 1]):
        experts = rows_of(counts)
        x, found = torch.randn(len(experts), 130), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                found.append(on(backend, x, experts, weight, scale, torch.tensor([0.02]), None, full_scale=448.0))
            finally:
                torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_more_rows_than_are_packed_at_a_time():
    """Beyond 2²⁵ packed values a call is done in several passes: each row is what it is in a call of its own."""
    into, rows = 8192, 4200
    weight = codes_like((3, 5, into), E4M3)
    x, experts, scale = torch.randn(rows, into).bfloat16(), torch.arange(rows) % 4, scales_for(weight, "channels")
    run = lambda part: on(BACKENDS[0], x[part], experts[part], weight, scale, full_scale=448.0)  # noqa: E731
    found = run(slice(None))
    assert not found[3::4].any()
    for part in (slice(0, 9), slice(4090, 4105), slice(rows - 9, rows)):
        expected = run(part)
        assert expected.any() and (found[part] - expected).abs().max() <= 2.0**-7 * expected.abs().max()


@over(backend=BACKENDS, fp8=[E4M3, E5M2], dtype=HIGH, activations=[None, "row"])
def test_qdq_is_as_the_reference_has_it(backend, fp8, dtype, activations):
    experts = rows_of([2, 0, 5])
    weight, x = codes_like((3, 33, 70), fp8), torch.randn(len(experts), 70).to(dtype)
    input_scale = torch.rand(len(x), 1) * 0.05 + 1e-3 if activations else None
    operands = (x, experts, weight, scales_for(weight, "channels"), input_scale, torch.randn(3, 33).to(dtype))
    options = {"full_scale": FULL_SCALES[fp8], "arithmetic": "qdq"}
    expected = on("reference", *operands, **options)
    torch.testing.assert_close(on(backend, *operands, **options), expected, rtol=2e-2, atol=1e-5)


def test_nan_and_inf_of_codes_stay_in_their_expert_and_column():
    for fp8, rows in itertools.product((E4M3, E5M2), (1, 6, 20)):
        weight = codes_like((3, 40, 139), fp8)
        weight.view(torch.uint8)[1, 7, 11] = 0x7F
        x, experts = torch.randn(3 * rows, 139).bfloat16(), torch.arange(3 * rows) % 3
        for input_scale in (None, torch.tensor([0.02])):
            operands = (x, experts, weight, scales_for(weight, "channels"), input_scale, None, FULL_SCALES[fp8])
            for y in assert_right(*operands).values():
                expected = torch.zeros_like(y, dtype=torch.bool)
                expected[1::3, 7] = True
                assert torch.equal(y.isnan(), expected)


@over(
    changes=[
        {"weight": lambda w: w.mT},
        {"weight_scale": lambda s: s.double()},
        {"input_scale": lambda s: s.double()},
        {"bias": lambda b: b.double()},
    ]
)
def test_what_the_library_does_not_take_is_left_to_the_reference(changes):
    weight = codes_like((2, 200, 200), E4M3)
    data = {
        "x": torch.randn(4, 200),
        "experts": torch.tensor([0, 1, 1, 0]),
        "weight": weight,
        "weight_scale": scales_for(weight, "channels"),
        "input_scale": torch.full((4, 1), 0.02),
        "bias": torch.randn(2, 200),
    }
    data |= {name: change(data[name]) for name, change in changes.items()}
    record = ops.CallRecord()
    ops.grouped_linear(**data, full_scale=448.0, record=record)
    assert record.kernels == {("grouped_linear", "reference"): 1} and len(record.fallbacks) == 1
    with pytest.raises(FP8NotAvailableError, match="cannot run 'grouped_linear'"):
        on(BACKENDS[0], *data.values(), full_scale=448.0)
