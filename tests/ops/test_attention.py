"""attention, attention_weights and matmul against float64 arithmetic in numpy that rounds where they say they do."""

from __future__ import annotations

import ml_dtypes
import numpy
import pytest
import torch
from grids import over
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8ScaleError
from optimum_fp8.ops import reference_attention
from optimum_fp8.ops.arguments import AttentionCall

E4M3 = torch.float8_e4m3fn
B, H, HKV, S, T, D, DV = 2, 4, 2, 5, 9, 16, 12
DTYPES = {torch.float32: numpy.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: numpy.float16}
CAUSAL = torch.full((S, T), torch.finfo(torch.bfloat16).min).triu(T - S + 1)


@pytest.fixture(autouse=True)
def reference():
    """What is tested here is the definition; kernels are compared with it elsewhere."""
    with ops.backend("reference"):
        yield


def fp8(x, scale, full_scale=448.0):
    """Codes as float64, by ml_dtypes."""
    return numpy.clip(x / scale, -full_scale, full_scale).astype(ml_dtypes.float8_e4m3fn).astype(numpy.float64)


def rounded(x, dtype):
    return x.astype(DTYPES[dtype]).astype(numpy.float64)


def array(x):
    return None if x is None else x.double().numpy()


def per_head(scale, heads):
    """A scale of keys, `(1,)`, `(Hkv, 1, 1)` or `[B, Hkv, T, 1]`, for each of `heads` heads of queries."""
    scale = numpy.asarray(array(scale))
    return scale if scale.size == 1 else numpy.repeat(scale, heads // HKV, axis=-3)


def oracle(q, k, v, s, mask, sinks=None, scaling=0.25, softcap=0.0, full_scale=448.0, dataflow="fused"):
    """Attention in float64; `s` holds the five scales by name. Written for clarity: heads are simply repeated."""
    fused = dataflow.startswith("fused")
    step = (lambda x: x) if fused else (lambda x: rounded(x, q.dtype))
    sq, sk, sv = (None if s[n] is None else per_head(s[n], H if n != "q" else HKV) for n in "qkv")
    k, v = (numpy.repeat(array(x), H // HKV, axis=1) for x in (k, v))

    def operand(x, scale):
        if scale is None:
            return x
        value = fp8(x, scale, full_scale) * scale
        return rounded(value, q.dtype) if dataflow == "qdq" else value

    scores = step(operand(array(q), sq) @ operand(k, sk).swapaxes(-1, -2))
    scores = step(scores * scaling)
    if softcap:
        scores = step(step(numpy.tanh(step(scores / softcap))) * softcap)
    if mask is not None:
        scores = step(scores + array(mask))
    column = numpy.zeros((B, H, S, 0))
    if sinks is not None:
        column = numpy.broadcast_to(array(sinks).reshape(1, H, 1, 1), (B, H, S, 1))
    scores = numpy.concatenate([scores, column], axis=-1)
    exp = numpy.exp(scores - scores.max(-1, keepdims=True))
    p = (exp / exp.sum(-1, keepdims=True))[..., :T]
    rounds = s["p"] is None if dataflow.endswith("gaudi") else not fused
    p = rounded(p, q.dtype) if rounds else p
    p = operand(p, array(s["p"]))
    out = (p @ operand(v, sv)).swapaxes(1, 2)
    if s["o"] is not None and fused:
        out = operand(out, array(s["o"]))
    return out, p


def scales(kind):
    one = {name: torch.tensor([value]) for name, value in zip("qkvpo", (0.02, 0.03, 0.05, 1 / 64, 0.01), strict=True)}
    if kind == "tensor":
        return one
    if kind == "head":
        return one | {"q": torch.rand(H, 1, 1) * 0.02 + 0.01, "k": torch.rand(HKV, 1, 1) * 0.02 + 0.01, "o": None}
    if kind == "token":
        return one | {n: torch.rand(B, HKV if n != "q" else H, S if n == "q" else T, 1) * 0.02 + 0.01 for n in "qkv"}
    return dict.fromkeys("qkvpo")


def inputs(dtype=torch.bfloat16):
    return [torch.randn(B, h, n, d).to(dtype) for h, n, d in ((H, S, D), (HKV, T, D), (HKV, T, DV))]


def run(op, q, k, v, s, mask, full_scale=448.0, **options):
    options = {"scaling": 0.25, "dtype": E4M3, "full_scale": full_scale} | options
    if op is ops.attention:
        return op(q, k, v, s["q"], s["k"], s["v"], s["p"], s["o"], mask, **options)
    return op(q, k, s["q"], s["k"], s["p"], mask, **options)


def assert_close(found, expected, dtype, tolerance=2e-2):
    """A value on the edge between two codes may fall either way: most agree to a rounding, all to a code."""
    error = numpy.abs(array(found) - expected)
    # Two bf16 roundings near a tie, or an FP8 step of one probability.
    assert numpy.quantile(error, 0.5) <= {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert error.max() <= tolerance * numpy.abs(expected).max()


@pytest.mark.core
@over(dtype=DTYPES, kind=["tensor", "head", "token", "none"], dataflow=ops.DATAFLOWS)
def test_attention_rounds_where_its_definition_says(dataflow, kind, dtype):
    (q, k, v), s, mask = inputs(dtype), scales(kind), CAUSAL.to(dtype).expand(B, 1, S, T)
    expected, p = oracle(q, k, v, s, mask, dataflow=dataflow)
    tolerance = 2e-2 if dataflow.startswith("fused") else 4e-2
    assert_close(run(ops.attention, q, k, v, s, mask, dataflow=dataflow), expected, dtype, tolerance)
    assert_close(run(ops.attention_weights, q, k, v, s, mask, dataflow=dataflow), p, dtype, 7e-2)


@over(dataflow=["fused", "unfused"])
def test_softcap_sinks_and_position_bias(dataflow):
    (q, k, v), s, sinks = inputs(torch.float32), scales("tensor"), torch.randn(H)
    bias = torch.randn(1, H, S, T) + CAUSAL
    expected, _ = oracle(q, k, v, s, bias, sinks, softcap=3.0, dataflow=dataflow)
    found = run(ops.attention, q, k, v, s, bias, sinks=sinks, softcap=3.0, dataflow=dataflow)
    assert_close(found, expected, torch.float32)
    columns = sinks.view(1, H, 1, 1).expand(B, H, S, 1)
    assert torch.equal(run(ops.attention, q, k, v, s, bias, sinks=columns, softcap=3.0, dataflow=dataflow), found)
    plain, _ = oracle(q, k, v, s, CAUSAL, dataflow=dataflow)
    assert numpy.abs(plain - expected).max() > 0.1  # they matter


def test_gaudi2_saturates_earlier():
    (q, k, v), s = inputs(torch.float32), scales("tensor") | {"q": torch.tensor([0.006]), "k": torch.tensor([0.006])}
    expected, _ = oracle(q, k, v, s, None, full_scale=240.0)
    assert_close(run(ops.attention, q, k, v, s, None, full_scale=240.0), expected, torch.float32)
    assert numpy.abs(array(run(ops.attention, q, k, v, s, None)) - expected).max() > 0.05


@over(kind=["tensor", "head", "token"])
def test_codes_of_a_cache_give_the_same_as_rounding_here(kind):
    (q, k, v), s = inputs(), scales(kind)
    codes = [ops.cast_to_fp8(x, s[n], E4M3, 448.0) for x, n in ((k, "k"), (v, "v"))]
    assert torch.equal(run(ops.attention, q, *codes, s, CAUSAL), run(ops.attention, q, k, v, s, CAUSAL))


def test_long_caches_are_taken_in_blocks():
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5000, 8), torch.randn(1, 2, 5000, 8)
    one = torch.tensor([0.02])
    codes = [ops.cast_to_fp8(x, one, E4M3, 448.0) for x in (k, v)]
    s = dict.fromkeys("qpo") | {"k": one, "v": one}
    values = [ops.cast_from_fp8(x, one, torch.float32) for x in codes]
    expected = run(ops.attention, q, *values, dict.fromkeys("qkvpo"), None)
    torch.testing.assert_close(run(ops.attention, q, *codes, s, None), expected, atol=1e-6, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The largest high-precision tensor that anything computes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype != E4M3:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_decoding_makes_no_high_precision_copy_of_a_cache():
    q, codes, one = torch.randn(1, 4, 1, 64), torch.zeros(1, 2, 32768, 64).to(E4M3), torch.ones(1)
    with Largest() as largest:
        reference_attention.attention(
            AttentionCall(q, codes, codes, *[one] * 5, None, None, 0.1, 0.0, E4M3, 448.0, "fused")
        )
    assert 0 < largest.elements <= codes.numel() // 16


@over(dtype=DTYPES)
def test_unrounded_and_unfused_it_is_what_models_compute(dtype):
    (q, k, v), mask = inputs(dtype), CAUSAL.to(dtype)
    k_all, v_all = (x.repeat_interleave(H // HKV, dim=1) for x in (k, v))
    scores = torch.matmul(q, k_all.transpose(2, 3)) * 0.25 + mask
    expected = torch.matmul(torch.softmax(scores, -1, torch.float32).to(dtype), v_all).transpose(1, 2)
    found = run(ops.attention, q, k, v, dict.fromkeys("qkvpo"), mask, dataflow="unfused")
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_a_boolean_mask_says_where_to_attend():
    (q, k, v), s = inputs(torch.float32), scales("tensor")
    assert torch.equal(run(ops.attention, q, k, v, s, CAUSAL == 0), run(ops.attention, q, k, v, s, CAUSAL))


def test_matmul():
    a, b = torch.randn(2, 5, 7).bfloat16(), torch.randn(2, 7, 3).bfloat16()
    rows, columns = torch.rand(2, 5, 1) * 0.05 + 0.01, torch.rand(2, 1, 3) * 0.05 + 0.01
    options = {"dtype": E4M3, "full_scale": 448.0}
    for s_a, s_b in ((rows, columns), (torch.tensor([0.02]), torch.tensor([0.04])), (None, columns)):
        left = array(a) if s_a is None else fp8(array(a), array(s_a)) * array(s_a)
        expected = rounded(left @ (fp8(array(b), array(s_b)) * array(s_b)), torch.bfloat16)
        found = ops.matmul(a, b, s_a, s_b, **options)
        assert found.dtype == torch.bfloat16 and numpy.abs(array(found) - expected).max() <= 2**-7
        left, right = rounded(left, torch.bfloat16), rounded(fp8(array(b), array(s_b)) * array(s_b), torch.bfloat16)
        qdq = ops.matmul(a, b, s_a, s_b, arithmetic="qdq", **options)
        assert numpy.abs(array(qdq) - rounded(left @ right, torch.bfloat16)).max() <= 2**-7


@over(dtype=DTYPES, dim=[-1, 1], factor=[None, 0.3])
def test_softmax_rounds_once(dtype, dim, factor):
    x, scale = (torch.randn(2, 40, 30) * 3).to(dtype), torch.tensor([1 / 61])
    given = None if factor is None else torch.tensor([factor])
    found = ops.softmax(x, scale, given, dim=dim, dtype=E4M3, full_scale=448.0)
    exp = numpy.exp(array(x) * (1 if factor is None else array(given)))
    p = exp / exp.sum(dim, keepdims=True)
    assert found.dtype == dtype
    assert numpy.array_equal(array(found), rounded(fp8(p, array(scale)) * array(scale), dtype))
    twice = rounded(fp8(rounded(p, torch.bfloat16), array(scale)) * array(scale), dtype)
    assert not numpy.array_equal(array(found), twice), "what is rounded to bfloat16 before differs"


def test_bad_calls_are_refused():
    (q, k, v), s = inputs(), scales("tensor")
    with pytest.raises(FP8ScaleError, match="without their scale"):
        run(ops.attention, q, k.to(E4M3), v, s | {"k": None}, None)
    with pytest.raises(FP8ConfigError, match="unfused"):
        run(ops.attention, q, k, v, s, None, dataflow="unfsed")


def test_calls_are_counted():
    (q, k, v), s, record = inputs(), scales("tensor"), ops.CallRecord()
    run(ops.attention, q, k, v, s, None, record=record)
    run(ops.attention_weights, q, k, v, s, None, record=record)
    assert record.kernels == {("attention", "reference"): 1, ("attention_weights", "reference"): 1}
