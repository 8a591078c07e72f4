"""Attention of the emulated operators, against float64; roundings of probabilities and output are the only error."""

import math

import pytest
import torch
from grids import over

from optimum_fp8.test_utils import gaudi

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
NO_WINDOW = ([-1, -1], None)
S_Q, S_K, S_V, S_S = 0.5, 2.0, 0.25, 1 / 64


def inputs(device, q=(2, 3, 5, 8), k=(2, 3, 7, 8), v=(2, 3, 7, 6), dtype=E4M3):
    tensors = [torch.randn(shape) for shape in (q, k, v)]
    return [device.encode(x, dtype) if dtype.itemsize == 1 else x.to(dtype) for x in tensors]


def numbers(device, tensors):
    return [(device.decode(x) if x.dtype.itemsize == 1 else x).double() for x in tensors]


def reference(q, k, v, scale, seen=None, add=None, sink=None):
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if add is None else scores + add.double()
    scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
    if sink is None:
        return torch.softmax(scores, -1), scores
    with_sink = torch.cat([scores, sink.double().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(with_sink, -1)[..., :-1], scores


SCALES = dict(zip(("q", "k", "v", "s"), (S_Q, S_K, S_V, S_S), strict=True))


def recompute(q, k, v, mask=None, causal=False, backward=False, mode="none", q_scale_o=None, **rest):
    """`fp8_sdpa_recomp_fwd` with the scales above, where inputs are FP8."""
    scales = [torch.tensor([SCALES[name]]) for name in "qkv"]
    scales += [torch.tensor([1 / S_S]), None if q_scale_o is None else torch.tensor([q_scale_o]), torch.tensor([S_S])]
    scales = scales if q.dtype.itemsize == 1 else [None] * 6
    amax = rest.get("amax", (False, False))
    last = (rest.get("lengths"), rest.get("padding", "left"), rest.get("window", [-1, -1]), rest.get("sinks"))
    head = (q, k, v, mask, 0.0, rest.get("scale", 0.3), causal, backward, mode)
    return torch.ops.hpu.fp8_sdpa_recomp_fwd(*head, *scales, *amax, *last)


def expected(device, tensors, dtype=E4M3, **kwargs):
    q, k, v = numbers(device, tensors)
    if dtype.itemsize == 1:
        q, k, v = q * S_Q, k * S_K, v * S_V
    return reference(q, k, v, 0.3, **kwargs)[0] @ v


def assert_near(out, exact, v, step):
    """Within the rounding of probabilities (relative `step`, subnormals absolutely) and of the output in bf16."""
    bound = step * v.abs().amax() + 2**-8 * exact.abs() + 1e-4
    assert ((out.double() - exact).abs() <= bound).all()


@over(dtype=[E4M3, E5M2, BF16, torch.float32], kind=["plain", "causal", "float mask", "bool mask"])
def test_attention(device, dtype, kind):
    tensors = inputs(device, dtype=dtype)
    causal = torch.arange(7) <= torch.arange(5)[:, None]
    allowed, add = torch.rand(2, 1, 5, 7) < 0.7, torch.randn(2, 1, 1, 7).to(BF16)
    allowed[..., 0] = True
    mask = {"float mask": add, "bool mask": allowed}.get(kind)
    out, m, linv, seed, amax_s, amax_o = recompute(*tensors, mask, kind == "causal")
    seen = {"causal": causal, "bool mask": allowed}.get(kind)
    exact = expected(device, tensors, dtype, seen=seen, add=add if kind == "float mask" else None)
    assert out.dtype == (BF16 if dtype.itemsize == 1 else dtype) and out.shape == exact.shape
    assert m.shape == linv.shape == seed.shape == amax_s.shape == amax_o.shape == (1,)
    v = numbers(device, tensors)[2] * (S_V if dtype.itemsize == 1 else 1)
    assert_near(out, exact, v, {E4M3: 2**-4, E5M2: 2**-3, BF16: 2**-9}.get(dtype, 1e-6))


def test_probabilities_are_rounded_to_codes_by_their_scale(gaudi2):
    """Two equal keys and one that counts for little: 0.45 becomes the nearest of 64 * 0.45 among codes."""
    q, k = torch.tensor([[[1.0]]]), torch.tensor([[[0.0], [0.0], [-2.0]]])
    probabilities = torch.softmax(k[..., 0].double(), -1)
    one = torch.eye(3)[None]
    tensors = [gaudi2.encode(x, E4M3) for x in (q, k, one)]
    scales = [torch.tensor([1.0])] * 3 + [torch.tensor([64.0]), None, torch.tensor([1 / 64])]
    head = (*tensors, None, 0.0, 1.0, False, False, "none")
    out = torch.ops.hpu.fp8_sdpa_recomp_fwd(*head, *scales, False, False, None, "left", *NO_WINDOW)[0]
    rounded = gaudi2.decode(gaudi2.encode(probabilities * 64, E4M3)) / 64
    assert torch.equal(out, rounded[None].to(BF16)) and not torch.allclose(rounded.double(), probabilities, rtol=1e-3)


@pytest.mark.core
@over(dtype=[E4M3, E5M2])
def test_output_in_codes(device, dtype):
    tensors = inputs(device, dtype=dtype)
    high = recompute(*tensors)[0]
    out = recompute(*tensors, q_scale_o=16.0)[0]
    assert out.dtype == dtype
    step = 2.0 ** -(3 if dtype == E4M3 else 2)
    assert ((device.decode(out) / 16 - high.float()).abs() <= high.float().abs() * (step / 2 + 2**-8) + 1e-3).all()


def test_statistics_for_a_merge_of_slices(device):
    """Slices of the keys merge to the whole by their maxima and sums; the fast softmax divides those by 128."""
    q, k, v = inputs(device)
    whole = recompute(q, k, v)[0].float()
    parts = [recompute(q, k[:, :, part].contiguous(), v[:, :, part].contiguous(), backward=True) for part in HALVES]
    assert parts[0][1].shape == parts[0][2].shape == (2, 3, 5, 1)
    assert {part[i].dtype for part in parts for i in (1, 2)} == {BF16}
    top = torch.maximum(parts[0][1], parts[1][1]).float()
    weights = [torch.exp(part[1].float() - top) / (128 * part[2].float()) for part in parts]
    merged = sum(w * part[0].float() for w, part in zip(weights, parts, strict=True)) / sum(weights)
    torch.testing.assert_close(merged, whole, rtol=0.06, atol=0.02)


HALVES = (slice(0, 4), slice(4, 7))


@over(dtype=[E4M3, BF16, torch.float32], mode=["none", "fast"])
def test_row_maxima_and_sums(device, dtype, mode):
    """`linv` is the reciprocal sum of a row's exponentials; with the fast softmax, which FP8 implies, over 128."""
    tensors = inputs(device, dtype=dtype)
    m, linv = recompute(*tensors, backward=True, mode=mode)[1:3]
    q, k, _ = numbers(device, tensors)
    scores = q @ k.transpose(-1, -2) * 0.3 * (S_Q * S_K if dtype == E4M3 else 1)
    fast = dtype == E4M3 or mode == "fast"
    assert m.dtype == (dtype if dtype != E4M3 else BF16)
    assert linv.dtype == (BF16 if dtype == E4M3 or (dtype == BF16 and fast) else torch.float32)
    top = scores.amax(-1, keepdim=True)
    expected = 1 / torch.exp(scores - top).sum(-1, keepdim=True) / (128 if fast else 1)
    torch.testing.assert_close(m.double(), top, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(linv.double(), expected, rtol=2**-8, atol=0)


def test_largest_probability_and_output_are_measured(device):
    tensors = inputs(device, dtype=BF16)
    out, *_, amax_s, amax_o = recompute(*tensors, mode="fast", amax=(True, True))
    q, k, v = numbers(device, tensors)
    assert amax_s.dtype == torch.float32 and amax_s.shape == (1,)
    torch.testing.assert_close(amax_s.item(), reference(q, k, v, 0.3)[0].max().item(), rtol=1e-5, atol=0)
    torch.testing.assert_close(amax_o.item(), out.float().abs().max().item(), rtol=2**-8, atol=0)
    assert recompute(*tensors)[4].item() == 0


@over(padding=["left", "right"])
def test_padding_is_not_seen(device, padding):
    tensors = inputs(device, q=(2, 3, 7, 8), dtype=BF16)
    lengths = torch.tensor([3, 7])
    out = recompute(*tensors, causal=True, lengths=lengths, padding=padding)[0]
    keys = torch.arange(7)
    valid = keys >= 7 - lengths[:, None] if padding == "left" else keys < lengths[:, None]
    seen = (keys <= keys[:, None]) & valid[:, None, None, :]
    exact = expected(device, tensors, BF16, seen=seen)
    rows = seen.any(-1).expand(2, 3, 7)
    torch.testing.assert_close(out.double()[rows], exact[rows], rtol=2**-7, atol=2**-7)
    assert (out[~rows] == 0).all() and rows.all() == (padding == "right")


def test_windows_and_sinks(device):
    tensors, sinks = inputs(device, dtype=torch.float32), torch.randn(3)
    distance = torch.arange(7) - torch.arange(5)[:, None]
    out = recompute(*tensors, window=[2, 1], sinks=sinks)[0]
    q, k, v = numbers(device, tensors)
    exact = reference(q, k, v, 0.3, seen=(distance >= -2) & (distance <= 1), sink=sinks)[0] @ v
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_without_recompute_it_keeps_the_probabilities(device):
    q, k, v = inputs(device)
    scales = [torch.tensor([s]) for s in (S_Q, S_K, S_V, 1 / S_S)] + [None, torch.tensor([S_S])]
    args = (q, k, v, None, 0.0, 0.3, True, "none", *scales, True, None, "left")
    out, P, mask, amax = torch.ops.hpu.fp8_sdpa_fwd(*args)
    assert torch.equal(out, recompute(q, k, v, causal=True)[0])
    assert P.dtype == E4M3 and P.shape == (2, 3, 5, 7) and mask.dtype == torch.int8 and amax.item() == 1.0
    torch.testing.assert_close((device.decode(P) * S_S).sum(-1), torch.ones(2, 3, 5), rtol=0, atol=0.06)
    with pytest.raises(RuntimeError, match="no FP8 output without recompute"):
        torch.ops.hpu.fp8_sdpa_fwd(*args[:12], torch.tensor([1.0]), *args[13:])


def test_scalar_scales(gaudi2):
    q, k, v = inputs(gaudi2)
    head, last = (q, k, v, None, 0.0, 0.3, False, False, "none"), (False, False, None, "left", *NO_WINDOW)
    out = torch.ops.hpu.fp8_sdpa_recomp_fwd.scalar(*head, S_Q, S_K, S_V, 1 / S_S, 16.0, S_S, *last)[0]
    assert torch.equal(out.view(torch.uint8), recompute(q, k, v, q_scale_o=16.0)[0].view(torch.uint8))


def test_the_older_bridge_has_no_window():
    with gaudi.emulated("gaudi2", bridge="1.19") as device:
        q, k, v = inputs(device, dtype=BF16)
        head, none = (q, k, v, None, 0.0, 0.3, False, False, "none"), [None] * 6
        assert len(torch.ops.hpu.fp8_sdpa_recomp_fwd(*head, *none, False, False, None, "left")) == 6
        assert torch.ops.hpu.sdpa_recomp_fwd(*head, None, "left")[0].shape == (2, 3, 5, 6)
        with pytest.raises(RuntimeError, match="window|at most|expected"):
            torch.ops.hpu.fp8_sdpa_recomp_fwd(*head, *none, False, False, None, "left", *NO_WINDOW)


Q, MASK = torch.ones(1, 2, 3, 4).to(E4M3), torch.ones(1, 1, 3, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: recompute(Q.half(), Q.half(), Q.half()), "dtype of q"),
        (lambda: recompute(Q, Q.to(BF16), Q), "dtypes differ"),
        (lambda: recompute(Q, Q[..., :2], Q), "shapes do not fit"),
        (lambda: recompute(Q, Q, Q[:, :, :2]), "shapes do not fit"),
        (lambda: recompute(Q[0, 0], Q[0, 0], Q[0, 0]), "three or more"),
        (lambda: recompute(torch.cat([Q, Q], 1), torch.cat([Q, Q[:, :1]], 1), Q), "size|broadcast"),
        (lambda: recompute(Q, Q, Q, MASK, causal=True), "excludes an attention_mask"),
        (lambda: recompute(Q, Q, Q, MASK[..., :2]), "does not broadcast"),
        (lambda: recompute(Q, Q, Q, mode="exact"), "no softmax_mode 'exact'"),
        (lambda: recompute(Q, Q, Q, lengths=torch.tensor([2])), "only with is_causal"),
        (lambda: recompute(Q, Q, Q, causal=True, lengths=torch.tensor([2, 3])), "one element for each of 1"),
        (lambda: recompute(Q, Q, Q, causal=True, lengths=torch.tensor([2]), backward=True), "for inference only"),
        (lambda: recompute(Q, Q, Q, padding="top"), "no padding"),
        (lambda: recompute(Q, Q, Q, sinks=torch.ones(3)), "one element for each of 2 heads"),
        (lambda: recompute(Q, Q, Q, window=[1]), r"window_size is \[left, right\]"),
    ],
)
def test_refused(gaudi2, call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
    assert gaudi2.calls == []


@pytest.mark.parametrize(
    "dtype, scale, message",
    [
        (BF16, torch.ones(1), "scales are given, but q, k, v are not FP8"),
        (E4M3, torch.ones(1).to(BF16), "d_scale_q must be one of"),
        (E4M3, torch.ones(3), "d_scale_q: Multi-element"),
    ],
)
def test_scales_that_are_refused(gaudi2, dtype, scale, message):
    q = Q.float().to(dtype)
    head, scales = (q, q, q, None, 0.0, 1.0, False, False, "none"), [scale] + [None] * 5
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hpu.fp8_sdpa_recomp_fwd(*head, *scales, False, False, None, "left", *NO_WINDOW)
