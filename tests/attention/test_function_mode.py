"""Modules that multiply themselves: which products are seen, under which names, and what becomes of them."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode

from optimum_fp8 import FP8Config, convert, dequantize, ops, prepare, quantization_report
from optimum_fp8.attention.scale_module import scales_of
from optimum_fp8.cache import FP8Tensor
from optimum_fp8.lifecycle.state import state_of

E4M3 = torch.float8_e4m3fn


class Attention(nn.Module):
    """Every way of saying the same: `style` picks one."""

    def __init__(self, style="@"):
        super().__init__()
        self.num_heads = 2
        self.style, self.qkv, self.out = style, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        kt, scaling = k.transpose(-1, -2), 8**-0.5
        if self.style == "fused":
            o = F.scaled_dot_product_attention(q, k, v)
        elif self.style == "@":
            o = F.softmax(q @ kt * scaling, dim=-1) @ v
        elif self.style == "matmul":
            o = torch.softmax(torch.matmul(q, kt) * scaling, -1).matmul(v)
        elif self.style == "bmm":
            s = torch.bmm(q.flatten(0, 1), kt.flatten(0, 1)) * scaling
            p = nn.Softmax(dim=-1)(s)
            o = p.bmm(v.flatten(0, 1)).unflatten(0, (-1, 2))
        elif self.style == "baddbmm":
            bias = torch.zeros(q.shape[0] * 2, q.shape[2], q.shape[2], dtype=x.dtype)
            s = bias.baddbmm(q.flatten(0, 1), kt.flatten(0, 1), beta=0.5, alpha=scaling)
            o = torch.bmm(s.softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, 2))
        elif self.style == "einsum":
            p = torch.einsum("bhsd,bhtd->bhst", q * scaling, k).softmax(-1)
            o = torch.einsum("bhst,bthd->bshd", [p, v.transpose(1, 2)]).transpose(1, 2)
        elif self.style == "logsumexp":
            s = q @ kt * scaling
            o = torch.exp(s - s.logsumexp(-1, keepdim=True)) @ v
        elif self.style == "relative":
            s = q @ kt + q @ kt.flip(-1)
            p = (s * scaling).softmax(-1)
            o = p @ v + (p @ v.flip(-2)) * 0.1
        return self.out(o.transpose(1, 2).flatten(-2))


STYLES = ("@", "matmul", "bmm", "baddbmm", "fused", "relative", "einsum", "logsumexp")
SITES = {"relative": {"q", "k", "q2", "k2", "p", "v", "p2", "v2"}, "fused": {"q", "k", "v"}}


class Net(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.fc, self.attn = nn.Linear(16, 16), Attention(style)

    def forward(self, x):
        return self.attn(self.fc(x))


def config(**options):
    return FP8Config(attention=True, allowlist={"names": ["^fc$"]}, activation_scheme="static", **options)


def rounded(x, scale):
    return ops.cast_from_fp8(ops.cast_to_fp8(x, scale, E4M3, 448.0), scale, torch.float32)


@pytest.mark.core
@pytest.mark.parametrize("style", STYLES)
def test_products_are_seen_and_left_alone(style):
    net, x = Net(style), torch.randn(2, 5, 16)
    expected = net(x)
    prepare(net, config())
    assert torch.equal(net(x), expected)
    measured = state_of(net).measurements
    kinds = {kind for name, kind in measured.tensors if name == "attn"}
    assert kinds == SITES.get(style, {"q", "k", "p", "v"})
    q, k, v = net.attn.qkv(net.fc(x)).chunk(3, dim=-1)
    q = q * 8**-0.5 if style == "einsum" else q
    assert [measured.range("attn", kind) for kind in "qkv"] == [t.abs().max() for t in (q, k, v)]


@pytest.mark.core
@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("style", STYLES)
def test_products_are_computed_in_fp8(style, granularity):
    """An oracle that rounds operands by hand, and nothing else."""
    net, x = Net(style), torch.randn(2, 5, 16)
    prepare(net, config(scale_method="maxabs_arbitrary", attention_granularity=granularity))
    net(x)
    convert(net)
    s = scales_of(net.attn)
    assert set(s) == {f"{kind}_scale" for kind in SITES.get(style, {"q", "k", "p", "v"}) | {"p"}}
    assert {len(s[f"{kind}_scale"]) for kind in "qkv"} == {1 if granularity == "tensor" else 2}
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in net.attn.qkv(net.fc(x)).chunk(3, dim=-1))
    kt = rounded(k, s["k_scale"]).transpose(-1, -2)
    scores = rounded(q, s["q_scale"]) @ kt
    if style == "einsum":
        scores = rounded(q * 8**-0.5, s["q_scale"]) @ kt * 8**0.5
    if style == "relative":
        scores = scores + rounded(q, s["q2_scale"]) @ rounded(k, s["k2_scale"]).transpose(-1, -2).flip(-1)
    p = (scores * 8**-0.5).softmax(-1)
    o = rounded(p, s["p_scale"]) @ rounded(v, s["v_scale"])
    if style == "relative":
        o = o + rounded(p, s["p2_scale"]) @ rounded(v, s["v2_scale"]).flip(-2) * 0.1
    expected = net.attn.out(o.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(net(x), expected, atol=2e-3, rtol=1e-3)
    row = quantization_report(net).attention[0]
    assert sum(row.kernels.values()) == {"relative": 4, "fused": 1}.get(style, 2) and not row.fallbacks


@pytest.mark.parametrize("style", STYLES)
def test_dynamic(style):
    net, x = Net(style), torch.randn(2, 5, 16)
    expected = net(x)
    convert(net, config().replace(activation_scheme="dynamic"))
    assert scales_of(net.attn) == {}
    found = net(x)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    assert not quantization_report(net).fallbacks


@pytest.mark.parametrize("style", ["@", "fused"])
def test_a_causal_mask_and_other_shapes(style):
    class CausalAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # three dimensions: one head
            if style == "fused":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
            return ((q @ k.mT) * 16**-0.5 + mask).softmax(-1) @ v

    net, x = nn.Sequential(nn.Linear(16, 16), CausalAttention()), torch.randn(2, 5, 16)
    expected = net(x)
    prepare(net, FP8Config(attention=True, allowlist={"names": ["^0$"]}))
    net(x)
    found = convert(net)(x)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
    changed = x.clone()
    changed[:, -1] = 0
    assert torch.equal(net(changed)[:, :-1], found[:, :-1])
    assert quantization_report(net).attention[0].kernels


@pytest.mark.core
def test_nothing_is_overridden_outside_or_after_an_error():
    net, x = Net("@"), torch.randn(2, 5, 16)
    prepare(net, config())
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 17))
    net.attn.out.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x)
    assert _get_current_function_mode() is None
    seen = dict(state_of(net).measurements.tensors)
    torch.matmul(x, x.mT)
    assert state_of(net).measurements.tensors == seen


def test_what_calibration_has_not_seen_stays_in_high_precision_and_shows():
    net, x = Net("@"), torch.randn(2, 5, 16)
    prepare(net, config())
    net(x)
    convert(net)
    net.attn.style = "relative"
    net(x)
    reasons = quantization_report(net).attention[0].fallbacks
    assert reasons == {
        "high precision: q2, k2: not seen by calibration": 1,
        "high precision: p2, v2: not seen by calibration": 1,
    }
    assert "not seen by calibration" in str(quantization_report(net))


def test_threads_do_not_disturb_each_other():
    net, x = Net("@"), torch.randn(2, 5, 16)
    prepare(net, config())
    net(x)
    convert(net)
    expected, results = net(x), []
    threads = [threading.Thread(target=lambda: results.extend(net(x) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)


@pytest.mark.core
def test_copies_and_dequantized_modules():
    net, x = Net("@"), torch.randn(2, 5, 16)
    before = net(x)
    prepare(net, config())
    net(x)
    convert(net)
    found, twin = net(x), copy.deepcopy(net)
    assert torch.equal(twin(x), found)
    assert sum(quantization_report(twin).attention[0].kernels.values()) == 2
    dequantize(net)
    assert not net.attn._forward_hooks and not net.attn._forward_pre_hooks and not scales_of(net.attn)
    assert torch.equal(net.attn(net.fc(x)), net(x)) and (net(x) - before).norm() < 0.1 * before.norm()
    assert torch.equal(twin(x), found)


def test_a_module_without_products_is_not_called_fp8():
    class SummingAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            if self.style == "never":
                return (q @ k.mT).softmax(-1) @ v
            return ((q[:, :, None] * k[:, None]).sum(-1).softmax(-1)[..., None] * v[:, None]).sum(-2)

    net = prepare(
        nn.Sequential(nn.Linear(16, 16), SummingAttention()), FP8Config(attention=True, allowlist={"names": ["^0$"]})
    )
    net(torch.randn(2, 5, 16))
    row = quantization_report(convert(net)).attention[0]
    assert not row.quantized and row.reason == "none of its products was seen"


def test_an_einsum_that_is_not_one_product_stays_in_high_precision_and_shows():
    class TripleAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            p = (q @ k.mT).softmax(-1)
            return torch.einsum("bst,btd,de->bse", p, v, torch.eye(16))

    net, x = nn.Sequential(nn.Linear(16, 16), TripleAttention()), torch.randn(2, 5, 16)
    prepare(net, FP8Config(attention=True, allowlist={"names": ["^0$"]}))
    net(x)
    convert(net)(x)
    row = quantization_report(net).attention[0]
    equation = "high precision: einsum 'bst,btd,de->bse': not one product for each batch"
    assert row.fallbacks == {equation: 1} and sum(row.kernels.values()) == 1


def test_projections_on_random_numbers_are_layers_too():
    """As those that choose the buckets of locality-sensitive hashing: rounding would choose others."""

    class HashingAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            torch.manual_seed(0)
            self.hashes = torch.einsum("bsd,dr->bsr", q, torch.randn(16, 8)).argmax(-1)
            return self.out((q @ k.mT).softmax(-1) @ v)

    net, x = nn.Sequential(nn.Linear(16, 16), HashingAttention()), torch.randn(2, 50, 16)
    expected = (net(x), net[1].hashes)[1]
    prepare(net, FP8Config(attention=True, allowlist={"names": [r"^1\.out$"]}))
    net(x)
    convert(net)(x)
    assert torch.equal(net[1].hashes, expected)
    assert set(scales_of(net[1])) == {"q_scale", "k_scale", "p_scale", "v_scale"}


def test_products_with_weights_are_layers_not_attention():
    """As FalconLinear, which is not FP8 while measuring and is afterwards."""

    class OwnLinear(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    net, plain, x = Net("@"), Net("@"), torch.randn(2, 5, 16)
    net.load_state_dict(plain.state_dict())
    for name in ("qkv", "out"):
        layer = OwnLinear(16, getattr(net.attn, name).out_features)
        layer.load_state_dict(getattr(net.attn, name).state_dict())
        setattr(net.attn, name, layer)
    for each in (net, plain):
        prepare(each, config())
    with torch.inference_mode():
        net(x)
    plain(x)
    measured = [state_of(each).measurements.tensors for each in (net, plain)]
    assert measured[0].keys() == measured[1].keys()
    assert all(torch.equal(measured[0][key].range(), measured[1][key].range()) for key in measured[0])
    assert torch.equal(convert(net)(x), convert(plain)(x))


def test_dropout_is_left_to_torch_and_shows():
    class DroppingAttention(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    net, x = nn.Sequential(nn.Linear(16, 16), DroppingAttention()), torch.randn(2, 5, 16)
    prepare(net, FP8Config(attention=True, allowlist={"names": ["^0$"]}))
    net(x)
    convert(net)(x)
    row = quantization_report(net).attention[0]
    assert row.fallbacks == {"high precision: a dropout of 0.5": 1} and not row.kernels


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("style", ["@", "turned", "fused"])
def test_cached_codes_are_multiplied_as_they_are(monkeypatch, style, scheme):
    """Keys and values out of an FP8 cache, transposed or not, bring their own scale; they are not dequantized."""

    class CachedAttention(Attention):
        def forward(self, x):
            q = self.qkv(x)[..., :16].unflatten(-1, (2, 8)).transpose(1, 2)
            if self.style == "fused":
                return F.scaled_dot_product_attention(q, self.key, self.value)
            if self.style == "turned":  # codes on the left
                scores = (self.key @ q.transpose(-1, -2)).transpose(-1, -2)
                return (self.value.transpose(-1, -2) @ (scores * 8**-0.5).softmax(-1).mT).mT
            return (q @ self.key.transpose(-1, -2) * 8**-0.5).softmax(-1) @ self.value

    net, x, keys = nn.Sequential(nn.Linear(16, 16), CachedAttention(style)), torch.randn(2, 5, 16), []
    for shape in ((1,), (2, 2, 7, 1)):
        scale = torch.rand(shape) * 0.02 + 0.01
        keys.append(FP8Tensor(torch.randn(2, 2, 7, 8).div(scale).to(E4M3), scale, torch.float32))
    cached = keys[scheme == "dynamic"]
    net[1].key = net[1].value = cached.dequantize()
    config = FP8Config(attention=True, allowlist={"names": ["^0$"]}, scale_method="maxabs_arbitrary")
    prepare(net, config)
    net(x)
    convert(net)
    net[1].key = net[1].value = cached
    q = net[1].qkv(net[0](x))[..., :16].unflatten(-1, (2, 8)).transpose(1, 2)
    s = scales_of(net[1])
    q_scale, p_scale = (s["k_scale"], s["v_scale"]) if style == "turned" else (s["q_scale"], s["p_scale"])
    p = (rounded(q, q_scale) @ cached.dequantize().mT * 8**-0.5).softmax(-1)
    expected = rounded(p, p_scale) @ cached.dequantize()
    monkeypatch.setattr(FP8Tensor, "dequantize", lambda self: 1 / 0)
    torch.testing.assert_close(net(x), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.core
def test_helper_modules_of_gaudi_models():
    class Matmul(nn.Module):
        def forward(self, x, y, **kwargs):
            return torch.matmul(x, y)

    class ModuleFusedSDPA(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.matmul_qk, self.sdpa = nn.Linear(16, 16), Matmul(), ModuleFusedSDPA()

        def forward(self, x):
            x = self.fc(x)
            return self.sdpa(x, x, self.matmul_qk(x, x.mT) @ x)

    net, x = Block(), torch.randn(2, 5, 16)
    expected = net(x)
    prepare(net, FP8Config(attention=True))
    net(x)
    found = convert(net)(x)
    assert [(row.name, sum(row.kernels.values())) for row in quantization_report(net).attention] == [
        ("matmul_qk", 1),
        ("sdpa", 1),
    ]
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.2
