"""`fp8_fused_sdpa` and `FusedSDPA` of the stand-in, against torch's own attention."""

import importlib

import pytest
import torch
from grids import over

from optimum_fp8.test_utils import gaudi

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
HEADS = [(4, 4), (4, 2), (4, 1)]


def kernels():
    return importlib.import_module("habana_frameworks.torch.hpex.kernels")


def inputs(heads):
    return [torch.randn(2, count, length, 8) for count, length in ((heads[0], 5), (heads[1], 7), (heads[1], 7))]


def torch_attention(q, k, v, **kwargs):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **kwargs)


def test_shared_key_heads(device):
    for heads in HEADS:
        for mask_heads in (None, 1, heads[0]):
            q, k, v = inputs(heads)
            mask = None if mask_heads is None else torch.randn(2, mask_heads, 5, 7)
            expected = torch_attention(q, k, v, attn_mask=mask)
            out, amax_s, amax_o = kernels().fp8_fused_sdpa(q, k, v, attn_mask=mask, softmax_mode="fast", is_amax_s=True)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            assert 0 < amax_s.item() <= 1 and amax_o.item() == 0
            torch.testing.assert_close(kernels().FusedSDPA.apply(q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


@over(heads=HEADS)
def test_codes_in_and_out(device, heads):
    tensors = inputs(heads)
    expected = torch_attention(*tensors, is_causal=True)
    q, k, v = (device.encode(x, E4M3) for x in tensors)
    one, quarter = torch.ones(1), torch.tensor([0.25])
    scales = {"d_scale_q": one, "d_scale_k": one, "d_scale_v": one, "q_scale_s": 4 * one, "d_scale_s": quarter}
    out = kernels().fp8_fused_sdpa(q, k, v, is_causal=True, **scales, q_scale_o=16 * one, recompute=True)[0]
    assert out.dtype == E4M3 and out.shape == expected.shape
    torch.testing.assert_close(device.decode(out) / 16, expected, rtol=0.1, atol=0.3)
    plain = kernels().fp8_fused_sdpa(q, k, v, is_causal=True, **scales, recompute=True)[0]
    assert plain.dtype == BF16
    assert device.calls[-1].name == "fp8_sdpa_recomp_fwd" and device.calls[-1].overload == "default"


def test_recompute_follows_the_caller_or_the_device_on_the_older_bridge():
    ones = [torch.ones(1, 1, 2, 4).to(E4M3)] * 3
    with gaudi.emulated("gaudi2", bridge="1.19") as device:
        hpu = importlib.import_module("habana_frameworks.torch.hpu")
        for recompute in (None, False, True):
            kernels().fp8_fused_sdpa(*ones, recompute=recompute)
        with hpu.sdp_kernel(enable_recompute=True):
            kernels().fp8_fused_sdpa(*ones)
        names = ["fp8_sdpa_fwd", "fp8_sdpa_fwd", "fp8_sdpa_recomp_fwd", "fp8_sdpa_recomp_fwd"]
        assert [call.name for call in device.calls] == names and not hpu.recompute_sdp_enabled()
        with pytest.raises(RuntimeError, match="no FP8 output without recompute"):
            kernels().fp8_fused_sdpa(*ones, q_scale_o=torch.ones(1))
    with gaudi.emulated("gaudi2", bridge="1.24") as device:
        kernels().fp8_fused_sdpa(*ones, recompute=False)
        assert [call.name for call in device.calls] == ["fp8_sdpa_recomp_fwd"]


def test_windows_and_sinks_are_for_the_newer_bridge(gaudi2):
    q = torch.randn(1, 2, 6, 4)
    args = (q, q, q, None, 0.0, True, None, "None", True, None, "None", False, False)
    windowed = kernels().FusedSDPA.apply(*args, (2, 0), torch.zeros(2))
    assert not torch.allclose(windowed, kernels().FusedSDPA.apply(*args))


def test_refused(gaudi2):
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="fp32 is not supported in fp8 flow"):
        kernels().fp8_fused_sdpa(q, q, q, softmax_mode="fp32")
    with pytest.raises(RuntimeError, match="only inference is emulated"):
        kernels().fp8_fused_sdpa(q.clone().requires_grad_(), q, q)
    with pytest.raises(RuntimeError, match="3 heads do not share 2 key heads"):
        kernels().fp8_fused_sdpa(torch.ones(1, 3, 3, 4), q, q)
    with pytest.raises(RuntimeError, match="dropout is not emulated"):
        kernels().FusedSDPA.apply(q, q, q, None, 0.1)
    with pytest.raises(RuntimeError, match="only the output is emulated"):
        kernels().FusedSDPA.apply(q, q, q, return_attn_probs=True)
