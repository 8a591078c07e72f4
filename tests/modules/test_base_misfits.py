"""Inputs, parameters and caches that do not fit: errors that name the module, what was found and what is expected."""

from __future__ import annotations

import pytest
import torch
from cache.conftest import llama
from torch import nn
from transformers import Conv1D, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention import AttentionPlan, attention_forward, plan_of, set_plan
from optimum_fp8.errors import FP8StateError

pytestmark = pytest.mark.core
DYNAMIC = FP8Config(activation_scheme="dynamic")
IDS = torch.arange(3, 21).view(2, 9)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.conv1d = nn.Linear(16, 8), nn.Linear(16, 8), Conv1D(4, 8)

    def forward(self, x):
        return self.conv1d(self.q(x) + self.k(x))


def converted(scheme="static"):
    net = nn.ModuleDict({"block": Block(), "conv": nn.Conv2d(3, 4, 3), "last": nn.Linear(2, 2)})
    config = FP8Config(activation_scheme=scheme)
    prepare(net, config)
    net["block"](torch.randn(2, 5, 16))
    net["conv"](torch.randn(1, 3, 8, 8))
    net["last"](torch.randn(1, 2))
    return convert(net)


@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_inputs_of_other_sizes(scheme):
    net = converted(scheme)
    block, x = net["block"], torch.randn(2, 5, 16)
    expected = [block(x) for _ in range(2)][0]
    for shape, found in (((2, 5, 17), r"\(2, 5, 17\)"), ((15,), r"\(15,\)"), ((), r"\(\)")):
        with pytest.raises(FP8StateError, match=rf"block\.q: an FP8Linear of 16 .* given {found}, expected \(…, 16\)"):
            block(torch.randn(shape))
    with pytest.raises(FP8StateError, match=r"block\.conv1d: an FP8Conv1D of 8 .* given \(3, 9\)"):
        block.conv1d(torch.randn(3, 9))
    with pytest.raises(FP8StateError, match=r"conv: an FP8Conv2d of 3 .* given \(1, 5, 8, 8\), expected \(N, 3"):
        net["conv"](torch.randn(1, 5, 8, 8))
    assert torch.equal(block(x), expected)


def test_other_errors_are_what_they_are():
    net = converted()
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):
        net["conv"](torch.randn(1, 3, 2, 2))
    with pytest.raises(FP8StateError, match=r"given an input in torch\.int64"):
        net["block"].q(torch.ones(2, 16, dtype=torch.int64))


@pytest.mark.parametrize("name", ["block.q", "block.conv1d", "conv"])
def test_a_bias_of_another_length_is_refused_when_the_module_is_made(name):
    net = nn.ModuleDict({"block": Block(), "conv": nn.Conv2d(3, 4, 3)})
    net.get_submodule(name).bias = nn.Parameter(torch.zeros(5))
    before = [type(module) for module in net.modules()]
    with pytest.raises(FP8StateError, match=rf"^{name}: the bias of \w+ has shape \(5,\), expected \(\d,\)"):
        convert(net, DYNAMIC)
    assert [type(module) for module in net.modules()] == before


def test_a_bias_of_another_length_is_refused_when_it_is_loaded_or_used():
    net = converted()
    with pytest.raises(RuntimeError, match=r"size mismatch for block\.q\.bias.*\[5\].*\[8\]"):
        net.load_state_dict(net.state_dict() | {"block.q.bias": torch.zeros(5)})
    net["block"].q.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(FP8StateError, match=r"block\.q: the bias of Linear has shape \(5,\), expected \(8,\)"):
        net["block"].q(torch.randn(2, 16))


def fp8_llama(**options):
    model = prepare(llama(), FP8Config(attention=True, kv_cache=True, **options))
    model(IDS)
    return convert(model)


@pytest.mark.parametrize(
    "key, mask",
    [((1, 3, 5, 8), None), ((1, 2, 5, 16), None), ((1, 2, 5), None), ((1, 2, 5, 8), (1, 1, 3, 4))],
    ids=["heads", "size", "dimensions", "mask"],
)
def test_shapes_of_attention_that_do_not_go_together(key, mask):
    module = fp8_llama().model.layers[1].self_attn
    q, k = torch.randn(1, 4, 3, 8), torch.randn(key)
    with pytest.raises(
        FP8StateError, match=r"model\.layers\.1\.self_attn \(LlamaAttention\): queries \(1, 4, 3, 8\), keys"
    ):
        attention_forward(module, q, k, k, None if mask is None else torch.zeros(mask))


def test_a_module_without_a_name_is_called_by_its_class():
    module = fp8_llama().model.layers[0].self_attn
    set_plan(module, AttentionPlan(plan_of(module).scheme))
    with pytest.raises(FP8StateError, match=r"^LlamaAttention: queries"):
        attention_forward(module, torch.randn(1, 4, 3, 8), *[torch.randn(1, 3, 5, 8)] * 2, None)


@pytest.mark.parametrize("size", [2, 6, 12, 96, 130])
def test_any_head_size_runs(size):
    torch.manual_seed(0)
    plain = llama(head_dim=size)
    torch.manual_seed(0)
    model = prepare(llama(head_dim=size), FP8Config(attention=True, kv_cache=True, blocklist={"types": ["Linear"]}))
    model(IDS)
    convert(model)
    with torch.no_grad():
        found, expected = model(IDS).logits, plain(IDS).logits
    assert (found - expected).norm() < 0.15 * expected.norm()
    assert all(row.kernels and not row.fallbacks for row in quantization_report(model).attention)


class Foreign:
    """Keys and values in a way of its own; everything models ask of a cache, and none of transformers' classes."""

    is_compileable, is_sliding, layers = False, [False, False], ()

    def __init__(self):
        self.held = {}

    def update(self, key, value, layer, *args, **kwargs):
        if layer in self.held:
            key, value = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (key, value), strict=True))
        self.held[layer] = key, value
        return key, value

    def get_seq_length(self, *args):
        return self.held[0][0].shape[2] if self.held else 0

    get_query_offset = get_seq_length

    def get_mask_sizes(self, length, layer):
        return self.get_seq_length() + length, 0


def test_a_cache_that_is_none_of_transformers_stays_as_it_is_and_the_report_says_so():
    model, cache = fp8_llama(), Foreign()
    with torch.no_grad():
        first = model(IDS[:, :6], past_key_values=cache).logits
        found = torch.cat([first, model(IDS[:, 6:], past_key_values=cache).logits], dim=1)
        torch.testing.assert_close(found, model(IDS, use_cache=False).logits, atol=0.05, rtol=0)
    assert cache.held[0][0].dtype == torch.float32
    reason = "Foreign is no cache of transformers: it stays in high precision"
    assert all(row.cache_refused == {reason: 1} and not row.cached for row in quantization_report(model).attention)
    assert reason in str(quantization_report(model))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_unsound_scales_are_not_loaded(value):
    model = fp8_llama()
    state = model.state_dict()
    for key in ("q_scale", "v_scale", "output_scale"):
        name = f"model.layers.1.self_attn.fp8_scales.{key}"
        with pytest.raises(RuntimeError, match=rf"{name} is \[.*expected finite values above 0"):
            model.load_state_dict(state | {name: torch.full((1,), value)})
        with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
            model.load_state_dict({other: tensor for other, tensor in state.items() if other != name})
    model.load_state_dict(state)
    assert torch.equal(
        model.state_dict()["model.layers.1.self_attn.fp8_scales.q_scale"],
        state["model.layers.1.self_attn.fp8_scales.q_scale"],
    )


@pytest.mark.parametrize("kind", ["layer", "experts"])
def test_codes_beyond_the_format_are_refused_in_a_state_dict(kind):
    """Gaudi2 reads those above 240 as Inf."""

    def made(target):
        torch.manual_seed(0)
        if kind == "layer":
            model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
        else:
            sizes = {"hidden_size": 32, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
            model = nn.Sequential(MixtralSparseMoeBlock(MixtralConfig(**sizes)))
            nn.init.normal_(model[0].experts.gate_up_proj)
            nn.init.normal_(model[0].experts.down_proj)
        keys = {"scale_method": "maxabs_arbitrary", "weight_backoff": 1.0, "activation_scheme": "dynamic"}
        return convert(model, FP8Config(target=target, **keys))

    wide = made("gaudi3").state_dict()
    with pytest.raises(RuntimeError, match=r"holds codes up to 448, but gaudi2 reads those above 240 as Inf"):
        made("gaudi2").load_state_dict(wide)
    made("gaudi3").load_state_dict(wide)
