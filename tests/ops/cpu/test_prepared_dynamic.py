"""Products whose dynamic scales the library finds on the way: to the bit what the two steps give."""

import itertools

import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.ops import declare, dispatch
from optimum_fp8.ops.arguments import LinearCall
from optimum_fp8.ops.cpu.casts import Casts
from optimum_fp8.ops.cpu.library import load
from optimum_fp8.ops.cpu.linear import Linear
from optimum_fp8.ops.cpu.prepared import PreparedLinear
from optimum_fp8.ops.cpu.torch_products import NEVER
from optimum_fp8.rounding import ROUNDINGS

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
K, OUT, K2 = 300, 130, 256


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Layer:
    """What an FP8Linear calls `linear` with, by a rule."""

    def __init__(self):
        self.weight, self.weight_scale = torch.randn(OUT, K).to(E4M3), torch.rand(OUT, 1) + 0.5
        self.bias, self.input_scale, self.record = torch.randn(OUT), rule(), ops.CallRecord()

    def __call__(self, x):
        tensors = (self.weight, self.weight_scale, self.input_scale, self.bias)
        return ops.linear(x, *tensors, full_scale=448.0, record=self.record)

    def anew(self, x):
        """In two steps, as if nothing were known."""
        return in_steps(x, self.input_scale, self.weight, self.weight_scale, self.bias, full_scale=448.0)


def inputs(*leading):
    return torch.randn(*leading, K).bfloat16()


def rule(group=-1, rounding="pow2", target="cpu", hp_dtype=torch.bfloat16, fp8="E4M3"):
    return ops.DynamicScale(group, 224.0, rounding, fp8, target, hp_dtype)


def in_steps(x, way, *operands, **options):
    """The scale, then the product."""
    scale = ops.dynamic_scale(x, **way._asdict())
    return ops.linear(ops.inf_as_nan(x), operands[0], operands[1], scale, operands[2], **options)


def of_all_kinds(dtype, *leading, k=K2):
    """Rows with Inf and NaN at some place, of zeros, of what is subnormal, all Inf, large and small."""
    x = torch.randn(*leading, k) * torch.tensor([3.0]).pow(torch.randint(-9, 9, (*leading, 1)))
    rows = x.view(-1, k)
    for row in range(0, len(rows), 9):
        for at, value in enumerate((torch.inf, -torch.inf, torch.nan)):
            rows[(row + at) % len(rows), 5 * row % k] = value
        rows[(row + 3) % len(rows)] = 0
        rows[(row + 4) % len(rows)] *= torch.finfo(dtype).smallest_normal / 8
        rows[(row + 5) % len(rows)] = torch.inf
    return x.to(dtype)


@over(variant=ops.cpu.backends(), dtype=[torch.float32, torch.bfloat16, torch.float16], group=[0, -1, 32, 128])
def test_a_dynamic_scale_is_found_on_the_way_to_the_bit(variant, dtype, group):
    name_of_variant = variant.removeprefix("cpu_")
    kernel = Linear(Casts(load(), name_of_variant), name_of_variant)
    layouts, formats = ((1,), (OUT, 1), (2, 2), (OUT, K2 // 32)), ((E4M3, "E4M3", 240.0), (E5M2, "E5M2", 57344.0))
    ways = zip(ROUNDINGS, itertools.cycle(layouts), itertools.cycle(formats), strict=False)
    for at, (rounding, layout, (fp8, name, full_scale)) in enumerate(ways):
        target, arithmetic = ("cpu", "gaudi2")[(at + group) % 2], ("fused", "gaudi")[at % 3 == 0]
        scale = torch.rand(layout) + 0.5
        scale = scale.log2().round().exp2() if at % 4 == 3 else scale
        operands = torch.randn(OUT, K2).to(fp8), scale, torch.randn(OUT) if at % 3 else None
        way = rule(group, rounding, target, fp8=name)
        shapes = [(), (1, 1), (2, 3), (19,), *([(65,)] if at > 3 else [])]
        known = LinearCall(torch.randn(1, K2).to(dtype), *operands[:2], None, operands[2], full_scale, arithmetic)
        packed = kernel._packed(known)
        prepared = PreparedLinear(packed, known, finds_scales=True, rows_elsewhere=NEVER)
        for x in (of_all_kinds(dtype, *shape) for shape in shapes):
            with ops.backend(variant):
                expected = packed(ops.inf_as_nan(x), ops.dynamic_scale(x, **way._asdict()))
            found = prepared(known._replace(x=x, input_scale=way))
            assert same(found, expected), (rounding, target, layout, x.shape)


def same(found, expected):
    are_nan = expected.isnan()
    is_equal = torch.equal(found.isnan(), are_nan)
    bits = torch.int32 if found.dtype == torch.float32 else torch.int16
    return is_equal and torch.equal(found[~are_nan].view(bits), expected[~are_nan].view(bits))


def test_a_range_that_is_zero_in_bfloat16_alone_has_no_zeros_scale():
    layer = Layer()
    layer.input_scale = rule()
    for size in (0.0, 2.0**-149, 2.0**-134, 2.0**-133, 2.0**-126):
        x = torch.full((2, K), size)
        for _ in range(2):
            assert torch.equal(layer(x), layer.anew(x))


@over(group=[0, -1], dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_later_calls_find_dynamic_scales_themselves(group, dtype, monkeypatch):
    layer, inputs_ = Layer(), [inputs(3), inputs(1, 1), inputs(2, 3), inputs(K).t()]
    layer.input_scale = rule(group)
    expected = [layer.anew(x.to(dtype)) for x in inputs_]
    layer(inputs_[0].to(dtype))
    monkeypatch.setattr(declare, "scaled_input", None)
    assert all(torch.equal(layer(x.to(dtype)), y) for x, y in zip(inputs_, expected, strict=True))
    layer.input_scale = rule(group, "identity")
    monkeypatch.undo()
    assert all(torch.equal(layer(x), layer.anew(x)) for x in inputs_), "another rule"
    assert layer.record.kernels == {("linear", ops.cpu.backends()[0]): 9}


@pytest.mark.parametrize(
    "way",
    [rule(32), rule(128), rule(hp_dtype=torch.float32), rule(hp_dtype=torch.float16)],
    ids=["ragged", "ragged-128", "fp32", "fp16"],
)
def test_rules_that_the_library_does_not_know_are_followed_before(way):
    layer, x = Layer(), inputs(4)
    layer.input_scale = way
    for _ in range(3):
        assert torch.equal(layer(x), layer.anew(x))


def test_no_rows_have_no_range():
    layer = Layer()
    layer.input_scale = rule()
    for x in (inputs(2), inputs(0), inputs(3, 0)):
        assert layer(x).shape == (*x.shape[:-1], OUT)


def test_another_kernel_for_dynamic_scales_has_its_way(monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {op: list(kernels) for op, kernels in dispatch._kernels.items()})
    layer, x = Layer(), inputs(4)
    layer.input_scale = rule()
    before = layer(x)
    ops.register_kernel("dynamic_scale", ops.Kernel("mine", ("cpu",), lambda call: torch.full((1,), 64.0)))
    for _ in range(3):
        found = layer(x)
        assert torch.equal(found, layer.anew(x)) and not torch.equal(found, before)
