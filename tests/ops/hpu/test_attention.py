"""Attention on an emulated Gaudi against the ordinary CPU path: the same roundings, in one kernel.

The exponentials of two machines differ in their last bit, so a probability that lies on the edge between two codes may
fall either way: how many do is bounded, and where none did, outputs differ by one unit in the last place at most.
"""

from __future__ import annotations

import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.formats import number_format
from optimum_fp8.ops.hpu import attention
from optimum_fp8.test_utils import gaudi

CHIPS = {"chip": ["gaudi2", "gaudi3"], "bridge": ["1.19", "1.24"]}
B, H, HKV, S, T, D = 2, 8, 2, 16, 96, 32
MOST_FLIPS = 1e-5  # of probabilities that lie on an edge between two codes, and fall to the other side
LEAST = torch.finfo(torch.bfloat16).min


def causal(queries=S, keys=T):
    return torch.full((queries, keys), LEAST, dtype=torch.bfloat16).triu(keys - queries + 1)[None, None]


class Case:
    """Attention of random operands: what the CPU and what the emulator make of it."""

    def __init__(self, chip="gaudi2", fp8="E4M3", powers=True, queries=S, key_heads=HKV, dtype=torch.bfloat16, **given):
        self.chip, self.fmt = chip, number_format(fp8, chip)
        q, k, v = ((B, H, queries, D), (B, key_heads, T, D), (B, key_heads, T, D))
        self.q, self.k, self.v = (torch.randn(shape).to(dtype) for shape in (q, k, v))
        odd = 1.0 if powers else 1.13
        self.scales = {"q": 2**-4, "k": 2**-5, "v": 2**-3, "p": 1 / 256, "output": 1 / 64}
        self.scales = {f"{name}_scale": torch.tensor([scale * odd]) for name, scale in self.scales.items()}
        self.mask, self.options = causal(queries), {"scaling": D**-0.5, "dataflow": "fused_gaudi"} | given

    def run(self, v=None, **scales):
        fmt, given = self.fmt, self.scales | scales
        return ops.attention(
            self.q,
            self.k,
            self.v if v is None else v,
            mask=self.mask,
            dtype=fmt.dtype,
            full_scale=fmt.full_scale,
            **given,
            **self.options,
        )

    def probabilities(self):
        """As they are multiplied with values, `[B, S, H, T]`: the output for a unit matrix, rounded as they are."""
        unit = torch.eye(T, dtype=torch.bfloat16).expand(B, self.k.shape[1], T, T)
        return self.run(unit, v_scale=torch.ones(1), output_scale=self.scales["p_scale"])

    def both(self, bridge="1.24"):
        """Outputs of the emulator and of the CPU, rows in which no probability differs, and the calls."""
        expected, wanted = self.run(), self.probabilities()
        with gaudi.emulated(self.chip, bridge=bridge) as device, ops.backend("hpu"):
            found, calls = self.run(), list(device.calls)
            probabilities = self.probabilities()
        flips = probabilities != wanted
        assert flips.float().mean() <= MOST_FLIPS
        return found, expected, ~flips.any(-1), calls


def ulps(found, expected):
    """How many bfloat16 values lie between two tensors, at most."""
    places = [torch.where(x < 0, -(x & 0x7FFF), x) for x in (y.view(torch.int16).int() for y in (found, expected))]
    return int((places[0] - places[1]).abs().amax()) if found.numel() else 0


def assert_close(case, bridge="1.24"):
    found, expected, same, calls = case.both(bridge)
    assert found.shape == expected.shape == (B, case.q.shape[2], H, D) and found.is_contiguous()
    assert found.dtype == expected.dtype == case.q.dtype and found.float().abs().amax() > 0.05
    if found.dtype == torch.bfloat16:
        assert ulps(found[same], expected[same]) <= 1
    else:
        torch.testing.assert_close(found[same], expected[same], rtol=2e-6, atol=1e-6)
    return calls


@over(**CHIPS, fp8=["E4M3", "E5M2"], powers=[True, False], queries=[S, 1])
def test_value(chip, bridge, fp8, powers, queries):
    calls = assert_close(Case(chip, fp8, powers, queries), bridge)
    assert [call.name for call in calls] == [*["cast_to_fp8_v2"] * 3, "fp8_sdpa_recomp_fwd", "cast_from_fp8"]


@over(**CHIPS, powers=[True, False])
def test_without_a_scale_of_the_output(chip, bridge, powers):
    case = Case(chip, powers=powers)
    case.scales["output_scale"] = None
    calls = assert_close(case, bridge)
    assert calls[-1].name == "fp8_sdpa_recomp_fwd" and calls[-1].arguments["q_scale_o"] is None


@over(key_heads=[1, 2, 8])
def test_heads_that_share_keys(key_heads):
    assert_close(Case(key_heads=key_heads))


def test_float32():
    calls = assert_close(Case("gaudi3", dtype=torch.float32))
    assert "fp8_sdpa_recomp_fwd" in [call.name for call in calls]


def test_what_the_kernel_is_given():
    case = Case("gaudi3", scaling=0.25)
    call = assert_close(case)[3]
    values = {name: scale[0].values[0] for name, scale in call.scales.items()}
    assert values == {
        **{"d_scale_q": 2**-4, "d_scale_k": 2**-5, "d_scale_v": 2**-3},
        **{"q_scale_s": 256.0, "d_scale_s": 1 / 256, "q_scale_o": 64.0},
    }
    tensors = [name for name in call.arguments if name.startswith(("d_scale", "q_scale"))]
    assert all(call.arguments[name].dtype == torch.float32 for name in tensors) and len(tensors) == 6
    assert call.arguments["softmax_mode"] == "none" and call.arguments["scale"] == 0.25
    assert not call.arguments["is_causal"] and not call.arguments["is_amax_s"]


def test_recompute_is_stated():
    case = Case()
    with gaudi.emulated("gaudi2", bridge="1.19") as device, ops.backend("hpu"):
        assert not device.recompute_sdp  # which would decide otherwise, against an output in FP8
        case.run()
    assert "fp8_sdpa_recomp_fwd" in [call.name for call in device.calls]


@over(dtype=[torch.bool, torch.bfloat16, torch.float32], shape=[(1, 1), (B, 1), (1, H), (B, H), ()])
def test_masks(dtype, shape):
    case = Case()
    keep = torch.rand(*shape, S, T + 5) < 0.7
    keep[..., 3, :] = False  # a row that attends to nothing
    case.mask = keep if dtype == torch.bool else torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, LEAST)
    assert "fp8_sdpa_recomp_fwd" in [call.name for call in assert_close(case)]
    case.mask = None
    assert_close(case)


def test_codes_of_a_cache_are_taken_as_they_are():
    case, fmt = Case(), number_format("E4M3", "gaudi2")
    expected = case.run()
    for name in "kv":
        codes = ops.cast_to_fp8(getattr(case, name), case.scales[f"{name}_scale"], fmt.dtype, fmt.full_scale)
        setattr(case, name, codes)
    assert torch.equal(case.run(), expected)
    calls = assert_close(case)
    assert [call.name for call in calls] == ["cast_to_fp8_v2", "fp8_sdpa_recomp_fwd", "cast_from_fp8"]


@pytest.mark.parametrize("part", ["function", "operator"])
def test_a_bridge_without_the_kernel_is_told(monkeypatch, part):
    """It multiplies in steps then, and the record says why."""
    case, record = Case(), ops.CallRecord()
    expected = case.run()
    with gaudi.emulated("gaudi2") as device, ops.backend("hpu"):
        import habana_frameworks.torch.hpex.kernels as kernels

        if part == "function":
            monkeypatch.delattr(kernels, "fp8_fused_sdpa")
        else:
            monkeypatch.setattr(attention, "offers", lambda name: name != "fp8_sdpa_recomp_fwd")
        case.options["record"] = record
        found = case.run()
    assert ulps(found, expected) <= 1 and "fp8_gemm_v2" in [call.name for call in device.calls]
    reason = "in steps, not in the fused kernel: there is no fp8_fused_sdpa in this bridge"
    assert record.fallbacks == {("attention", "hpu", reason): 1}
