"""Attention in steps on an emulated Gaudi against the ordinary CPU path: every dataflow, the same roundings.

Sums in another order and exponentials of another make differ in their last bit, so that a score or a probability on the
edge between two values may fall either way: how many do is bounded, and where none did, outputs differ by one unit in
the last place at most.
"""

from __future__ import annotations

import pytest
import torch
from grids import over
from on_gaudi import assert_near, constant, fmt_of
from torch._subclasses.fake_tensor import FakeTensorMode

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError
from optimum_fp8.ops import dispatch
from optimum_fp8.ops.arguments import AttentionCall, AttentionWeightsCall
from optimum_fp8.ops.reference_attention import FUSED
from optimum_fp8.test_utils import gaudi

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DATAFLOWS = list(ops.DATAFLOWS)
LEAST = torch.finfo(BF16).min
B, H, HKV, S, T, D, DV = 2, 4, 2, 5, 24, 16, 8
MOST_FLIPS = 1e-4  # of probabilities


def scales(kind):
    """The five scales of a call; "cache": of keys and values alone."""
    if kind == "constant":
        return {name: constant(torch.tensor([2.0**-4])) for name in "qkvpo"}
    one = {name: torch.tensor([value]) for name, value in zip("qkvpo", (0.03, 0.05, 0.04, 1 / 61, 0.012), strict=True)}
    rows, keys = torch.rand(B, H, S, 1) * 0.03 + 0.01, torch.rand(2, B, HKV, T, 1) * 0.03 + 0.01
    return {
        "static": one,
        "per head": one | {"q": rows[0, :, :1], "k": keys[0, 0, :, :1], "v": keys[1, 0, :, :1]},
        "per token": one | {"q": rows, "k": keys[0], "v": keys[1], "o": None},
        "cache": dict.fromkeys("qkvpo") | {"k": one["k"], "v": one["v"]},
        "cache per token": dict.fromkeys("qkvpo") | {"k": keys[0], "v": keys[1]},
        "probabilities": dict.fromkeys("qkvo") | {"p": one["p"]},
        "products": one | {"p": None, "o": None},
        "none": dict.fromkeys("qkvpo"),
    }[kind]


def call_of(device, dataflow, kind="static", fp8="E4M3", dtype=BF16, key_heads=HKV, **given):
    """Causal attention of random operands in a format of a card."""
    fmt, s = fmt_of(device, fp8), scales(kind)
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((B, H, S, D), (B, key_heads, T, D), (B, key_heads, T, DV)))
    if kind.startswith("cache"):
        k, v = (ops.cast_to_fp8(x, s[name], fmt.dtype, fmt.full_scale) for x, name in ((k, "k"), (v, "v")))
    mask = torch.full((S, T), torch.finfo(dtype).min, dtype=dtype).triu(T - S + 1)
    options = (None, D**-0.5, 0.0, fmt.dtype, fmt.full_scale, dataflow)
    return AttentionCall(q, k, v, *(s[name] for name in "qkvpo"), mask, *options)._replace(**given)


def run(call, record=None):
    fields = call._asdict()
    weights = isinstance(call, AttentionWeightsCall)
    return (ops.attention_weights if weights else ops.attention)(**fields, record=record)


def weights_of(call):
    return AttentionWeightsCall(**{name: getattr(call, name) for name in AttentionWeightsCall._fields})


def on_gaudi(device, call, record=None):
    """What an emulated card computes, and the calls of its operators."""
    device.calls.clear()
    with ops.backend("hpu"):
        return run(call, record), list(device.calls)


class Comparison:
    """Results of emulated cards beside those of the CPU; how many probabilities fell to another side."""

    flips = count = 0

    def __call__(self, device, call):
        """Compare attention, and its probabilities alone, and give the names of the operators of the former."""
        found, calls = on_gaudi(device, call)
        weights, _ = on_gaudi(device, weights_of(call))
        expected, wanted = run(call), run(weights_of(call))
        assert found.shape == (B, S, H, DV) and found.is_contiguous() and found.dtype == call.query.dtype
        assert weights.shape == (B, H, S, T) and weights.is_contiguous() and weights.dtype == call.query.dtype
        assert expected.float().abs().amax() > 0.05
        if call.p_scale is None:  # no edges of FP8: what differs is a rounding of the dtype
            unit = max(2 * torch.finfo(wanted.dtype).eps, 4e-6)
            torch.testing.assert_close(weights, wanted, rtol=unit, atol=1e-6)
            torch.testing.assert_close(found, expected, rtol=unit, atol=unit * float(expected.abs().max()))
            return [each.name for each in calls]
        flips, step = weights != wanted, torch.finfo(call.dtype).eps
        self.flips, self.count = self.flips + int(flips.sum()), self.count + flips.numel()
        assert ((weights - wanted).abs() <= 2 * step * wanted + call.p_scale * 2.0**-9).all()
        same = ~flips.any(-1).mT
        assert_near(found[same], expected[same], terms=T)
        return [each.name for each in calls]


@pytest.fixture
def compare():
    comparison = Comparison()
    yield comparison
    assert comparison.flips <= 1 + MOST_FLIPS * comparison.count


GEMM, CAST, BACK, SOFTMAX = "fp8_gemm_v2", "cast_to_fp8_v2", "cast_from_fp8", "softmax_fp8"
STEPS = {  # what is called where both products are of codes
    "fused": [CAST, CAST, GEMM, CAST, CAST, GEMM],
    "fused_gaudi": [CAST, CAST, GEMM, CAST, CAST, GEMM],
    "unfused": [CAST, CAST, GEMM, CAST, CAST, GEMM],
    "unfused_gaudi": [CAST, CAST, GEMM, SOFTMAX, CAST, GEMM],
    "qdq": [CAST, CAST, BACK, BACK, CAST, BACK, CAST, BACK],
}
ROUNDED_OUTPUT = [CAST, BACK]


@over(dataflow=DATAFLOWS, kind=["static", "constant", "per head", "per token"])
def test_rounded_products(device, compare, dataflow, kind):
    names = compare(device, call_of(device, dataflow, kind))
    fused = dataflow in FUSED
    if fused and kind in ("static", "constant"):
        assert names == [CAST, CAST, CAST, "fp8_sdpa_recomp_fwd", BACK]
    elif kind == "per token" and dataflow != "qdq":  # of values: along what is summed over
        assert names == [*STEPS[dataflow][:-2], BACK, CAST, BACK]  # each operand as it is needed
    else:
        assert names == STEPS[dataflow] + ROUNDED_OUTPUT * fused


@over(dataflow=DATAFLOWS, kind=["cache", "cache per token", "probabilities", "products", "none"])
def test_operands_that_are_not_rounded(gaudi3, compare, dataflow, kind):
    names = compare(gaudi3, call_of(gaudi3, dataflow, kind))
    if kind.startswith("cache"):
        assert names == [BACK, BACK], "codes of keys and values, and nothing else"
    elif kind == "none":
        assert names == []


@over(dataflow=DATAFLOWS, kind=["static", "per head", "cache"])
def test_e5m2(gaudi2, compare, dataflow, kind):
    assert SOFTMAX not in compare(gaudi2, call_of(gaudi2, dataflow, kind, "E5M2")), "which gives E4M3"


@over(dataflow=["fused_gaudi", "unfused_gaudi", "qdq"], dtype=[FP16, FP32], kind=["static", "cache"])
def test_other_dtypes(gaudi2, compare, dataflow, dtype, kind):
    assert SOFTMAX not in compare(gaudi2, call_of(gaudi2, dataflow, kind, dtype=dtype)), "which takes bfloat16"


@over(dataflow=["fused_gaudi", "unfused_gaudi"], key_heads=[1, 2, 4])
def test_heads_that_share_keys(gaudi2, compare, dataflow, key_heads):
    compare(gaudi2, call_of(gaudi2, dataflow, key_heads=key_heads, softcap=5.0))


@over(dataflow=["unfused_gaudi", "qdq", "fused"], kind=[(torch.bool, (1, 1)), (BF16, (B, H)), (FP32, ())])
def test_masks(gaudi2, compare, dataflow, kind):
    dtype, shape = kind
    keep = torch.rand(*shape, S, T + 3) < 0.7  # positions of a static cache that are still to come
    keep[..., 2, :] = False  # a row that attends to nothing
    mask = keep if dtype == torch.bool else torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, LEAST)
    call = call_of(gaudi2, dataflow, mask=mask, softcap=5.0)
    compare(gaudi2, call)
    assert not torch.allclose(run(call), run(call._replace(mask=None)), atol=0.05), "it matters"


@over(dataflow=DATAFLOWS)
def test_no_mask(gaudi2, compare, dataflow):
    compare(gaudi2, call_of(gaudi2, dataflow, mask=None))


@over(dataflow=DATAFLOWS, columns=[True, False])
def test_sinks(gaudi2, compare, dataflow, columns):
    sinks = torch.randn(B, H, S, 1) if columns else torch.randn(H)
    call = call_of(gaudi2, dataflow, "products" if columns else "static", sinks=sinks)
    compare(gaudi2, call)
    assert not torch.allclose(run(call), run(call._replace(sinks=None)), atol=0.05), "they matter"


@over(dataflow=DATAFLOWS)
def test_soft_caps(gaudi3, compare, dataflow):
    call = call_of(gaudi3, dataflow, softcap=0.5)
    compare(gaudi3, call)
    assert not torch.allclose(run(call), run(call._replace(softcap=0.0)), atol=0.02), "they matter"


def test_what_operators_are_given():
    """1/s to what casts, s to what multiplies; numbers where scales are known constants."""
    for kind, overloads in (("constant", ("scalar", "Scalar_scales")), ("static", ("default", "default"))):
        with gaudi.emulated("gaudi2") as device:
            call = call_of(device, "unfused_gaudi", kind)
            call = call._replace(key=call.key.transpose(1, 2).contiguous().transpose(1, 2))  # as projections give them
            calls = on_gaudi(device, call)[1]
        q, k, v, p = (float(scale) for scale in (call.q_scale, call.k_scale, call.v_scale, call.p_scale))
        values = [{name: scale[0].values[0] for name, scale in each.scales.items()} for each in calls]
        expected = [
            {"scale": 1 / q},
            {"scale": 1 / k},
            {"A_scale_inv": q, "B_scale_inv": k},
            {"input_scale": 1.0, "output_scale": 1 / p},
            {"scale": 1 / v},
            {"A_scale_inv": p, "B_scale_inv": v},
        ]
        assert all(found == pytest.approx(given) for found, given in zip(values, expected, strict=True))
        assert [each.overload for each in calls] == [overloads[each.name == SOFTMAX] for each in calls]
        assert kind != "constant" or all(each.free_scales for each in calls)
        scores, softmax, output = calls[2], calls[3], calls[5]
        assert scores.arguments["A"].shape == (B, HKV, H // HKV * S, D) and scores.arguments["out_dtype"] == BF16
        assert calls[1].arguments["input"].shape == scores.arguments["B"].shape == (B, HKV, T, D)
        assert scores.arguments["trans_B"], "keys as they lie"
        assert softmax.arguments["dim"] == -1 and softmax.arguments["inv_attn_heads"] is None
        assert softmax.arguments["input"].shape == (B, HKV, H // HKV, S, T)
        assert softmax.arguments["input"].dtype == BF16 and softmax.arguments["fused_add"] is None
        assert output.arguments["B"].shape == (B, HKV, T, DV) and output.arguments["out_dtype"] == BF16


@over(
    kind=["static", "constant"],
    formats=[(BF16, "E4M3"), (BF16, "E5M2"), (FP16, "E4M3"), (FP32, "E4M3")],
    way=[(None, -1), (0.25, 1)],
)
def test_softmax(device, kind, formats, way):
    (dtype, fp8), (factor, dim) = formats, way
    fmt, scale = fmt_of(device, fp8), scales(kind)["p"]
    x, factor = (torch.randn(2, 6, 33) * 3).to(dtype), None if factor is None else torch.tensor([factor])
    options = {"dim": dim, "dtype": fmt.dtype, "full_scale": fmt.full_scale}
    device.calls.clear()
    with ops.backend("hpu"):
        found = ops.softmax(x, scale, factor, **options)
    expected = ops.softmax(x, scale, factor, **options)
    assert (found != expected).float().mean() <= 1 / 99
    first, last = device.calls
    assert (first.name, last.name) == (SOFTMAX if (dtype, fp8) == (BF16, "E4M3") else CAST, BACK)
    if first.name == SOFTMAX:
        assert first.overload == ("Scalar_scales" if kind == "constant" else "default")
        assert first.scales["output_scale"][0].values == pytest.approx((1 / float(scale),))
        assert (first.arguments["inv_attn_heads"] is None) == (factor is None) and first.arguments["dim"] == dim


def test_softmax_refuses(gaudi2):
    data, one = torch.randn(3, 4), torch.ones(1)
    for x, scale, full_scale in ((data.double(), one, 240.0), (data, torch.ones(2), 240.0), (data, one, 99.0)):
        with ops.backend("hpu"), pytest.raises(FP8NotAvailableError, match="backend 'hpu' cannot run 'softmax' here"):
            ops.softmax(x, scale, dtype=torch.float8_e4m3fn, full_scale=full_scale)


def test_a_fused_dataflow_leaves_float32_between_steps(gaudi2):
    calls = on_gaudi(gaudi2, call_of(gaudi2, "fused_gaudi", softcap=5.0))[1]
    assert [each.arguments["out_dtype"] for each in calls if each.name == GEMM] == [FP32, FP32]
    assert calls[3].arguments["input"].dtype == FP32


def test_codes_that_saturate_earlier_than_the_cards(gaudi3):
    """A softmax that goes up to 448 is not asked for those that go up to 240."""
    p_scale = torch.tensor([1 / 400])
    mask = torch.zeros(S, T, dtype=BF16).index_fill(1, torch.arange(1, T), LEAST)
    call = call_of(gaudi3, "unfused_gaudi", full_scale=240.0, p_scale=p_scale, mask=mask)
    found, calls = on_gaudi(gaudi3, call)
    assert torch.equal(found, run(call)) and SOFTMAX not in [each.name for each in calls]
    assert not torch.equal(found, run(call._replace(full_scale=448.0)))
    with ops.backend("hpu"):
        softmax = ops.softmax(mask, p_scale, dtype=call.dtype, full_scale=240.0)
    assert softmax[:, 0].tolist() == [float(torch.tensor(240 / 400).bfloat16())] * S


IN_STEPS = {
    "soft cap": ({"softcap": 5.0}, "a soft cap: the kernel has none"),
    "sinks": ({"sinks": torch.zeros(H)}, "sinks: fp8_fused_sdpa takes none"),
    "scales": (
        {"k_scale": torch.full((HKV, 1, 1), 0.05)},
        "scales of keys of shape (2, 1, 1): the kernel takes one",
    ),
    "probabilities": ({"p_scale": None}, "no scale of the probabilities"),
    "no scale": ({"q_scale": None}, "queries without a scale"),
    "queries": ({"query": torch.zeros(B, H, S, D, dtype=FP16)}, "queries in torch.float16"),
    "values": ({"value": torch.zeros(B, HKV, T, DV, dtype=FP16)}, "values in torch.float16"),
    "mask": ({"mask": torch.zeros(S, T, dtype=FP16)}, "a mask in torch.float16"),
    "output": (
        {"query": torch.zeros(B, H, S, D), "output_scale": None},
        "queries in torch.float32 without a scale of the output: the kernel's is in bfloat16",
    ),
    "full scale": ({"full_scale": 240.0}, "an output that saturates at 240: that of the kernel does at 448"),
}


@pytest.mark.parametrize("given, reason", IN_STEPS.values(), ids=IN_STEPS)
@pytest.mark.parametrize("dataflow", ["fused", "fused_gaudi"])
def test_what_is_not_in_the_fused_kernel_is_told(gaudi3, dataflow, given, reason):
    record, call = ops.CallRecord(), call_of(gaudi3, dataflow)
    on_gaudi(gaudi3, call, record)
    assert record.kernels == {("attention", "hpu"): 1} and not record.fallbacks
    _, calls = on_gaudi(gaudi3, call._replace(**given), record)
    assert record.kernels == {("attention", "hpu"): 2}
    assert record.fallbacks == {("attention", "hpu", f"in steps, not in the fused kernel: {reason}"): 1}
    assert "fp8_sdpa_recomp_fwd" not in [each.name for each in calls]
    record = ops.CallRecord()
    on_gaudi(gaudi3, call._replace(**given, dataflow="unfused"), record)
    assert not record.fallbacks, "steps are what was asked for"


def test_what_does_not_fit_is_refused(gaudi2):
    call, two = call_of(gaudi2, "unfused_gaudi"), torch.ones(2)
    wrong = [
        {"query": call.query.double()},
        {"query": call.query.to(call.dtype)},
        {"dataflow": "unfsed"},
        {"key": call.key.to(torch.float8_e5m2)},
        {"key": call.key.to(call.dtype), "k_scale": None},
        {"q_scale": two},
        {"k_scale": torch.ones(B, HKV, T, D)},
        {"p_scale": two},
        {"full_scale": 300.0},
        {"dataflow": "qdq", "q_scale": None, "k_scale": None, "key": call.key.float()},
    ]
    for given in wrong:
        changed = call._replace(**given)
        for each in (changed, weights_of(changed)):
            with pytest.raises(FP8NotAvailableError, match="backend 'hpu' cannot run 'attention|reads those above 240"):
                on_gaudi(gaudi2, each)
    for name in ("v_scale", "output_scale"):
        with pytest.raises(FP8NotAvailableError, match="backend 'hpu' cannot run 'attention' here"):
            on_gaudi(gaudi2, call._replace(**{name: two}))


@over(way=[("fused", False), ("unfused_gaudi", True), ("qdq", False)], kind=["constant", "per token", "cache", "none"])
def test_shapes_alone_decide_what_is_called(gaudi2, way, kind):
    """Nothing is read from the device: the kernels run on tensors without values."""
    dataflow, sinks = way
    call = call_of(gaudi2, dataflow, kind, sinks=torch.randn(H) if sinks else None)
    for op, whole in (("attention", call), ("attention_weights", weights_of(call))):
        kernel = next(kernel for kernel in dispatch._kernels[op] if kernel.backend == "hpu")
        expected = on_gaudi(gaudi2, whole)[0]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in whole]
            found = kernel.run(whole._make(fake))
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_compilers_see_gaudis_operators(gaudi2):
    graphs = []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    call = call_of(gaudi2, "unfused_gaudi", "constant", sinks=torch.randn(H))
    with ops.backend("hpu"):
        expected = run(call)
        found = torch.compile(lambda: run(call), backend=look, fullgraph=True)()
    assert torch.equal(found, expected) and len(graphs) == 1
    named = [name for name in graphs[0] if name.startswith("hpu.")]
    assert named == [
        *["hpu.cast_to_fp8_v2.scalar"] * 2,
        *["hpu.fp8_gemm_v2.scalar", "hpu.softmax_fp8.Scalar_scales"],
        *["hpu.cast_to_fp8_v2.scalar", "hpu.fp8_gemm_v2.scalar"],
    ]
