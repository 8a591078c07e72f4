"""Attention that only its model can compute: it stays in high precision, and the rest of the model does not."""

from __future__ import annotations

import pytest
import torch
from attention_models import FAMILIES
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention.own_path import own_path

IDS = torch.arange(3, 25).view(2, 11)


@torch.no_grad()
def logits(model, **options):
    return model(IDS, **options).logits


def quantized(model, **options):
    prepare(model, FP8Config(**options))
    logits(model, use_cache=True)
    return convert(model)


# --- what the source of any class tells ------------------------------------------------------------------------------


def call(module, hidden_states, cos_sin, mask, **further):
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (module.q_proj, module.k_proj, module.v_proj))
    return q, k, v


class ByName(LlamaAttention):
    """Does something for transformers' own names that it does not do for ours."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        q, k, v = call(self, hidden_states, position_embeddings, attention_mask)
        if self.config._attn_implementation in ("eager", "sdpa"):
            attention_mask = 2 * attention_mask if attention_mask is not None else None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


class InAName(ByName):
    """Derived, and nothing new."""


class Selecting(LlamaAttention):
    """Hands over a selection by way of its keyword arguments."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        q, k, v = call(self, hidden_states, position_embeddings, attention_mask)
        kwargs["block_indices"] = None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


def eager_with_temperature(module, query, key, value, attention_mask, scaling, temperature=1.0, window=3, **kwargs):
    return eager_attention_forward(module, query / temperature, key, value, attention_mask, scaling, **kwargs)


class Tempered(LlamaAttention):
    """Its eager function takes what ours does not."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        q, k, v = call(self, hidden_states, position_embeddings, attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_with_temperature)
        output, weights = attend(
            self, q, k, v, attention_mask, scaling=self.scaling, temperature=3.0, window=3, **kwargs
        )
        return self.o_proj(output.flatten(-2)), weights


class Windowed(LlamaAttention):
    """Hands over something that its eager function takes, and makes no use of."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        q, k, v = call(self, hidden_states, position_embeddings, attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_with_temperature)
        output, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, window=3, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


class OfBooleanMasks(LlamaAttention):
    """Adds a score of its own, where its mask lets it: right with the masks of "sdpa" alone."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
        q, k, v = call(self, hidden_states, position_embeddings, attention_mask)
        if attention_mask is not None:
            scores = torch.zeros(attention_mask.shape, dtype=q.dtype)
            attention_mask = scores.masked_fill(attention_mask.logical_not(), float("-inf"))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(-2)), weights


def with_attention(cls, layers=(0, 1)):
    model = FAMILIES["llama"].make()
    for index in layers:
        model.model.layers[index].self_attn.__class__ = cls
    return model


@pytest.mark.parametrize(
    "cls, reason",
    [
        (ByName, "'eager' and 'sdpa'"),
        (InAName, "'eager'"),
        (Selecting, "'block_indices'"),
        (Tempered, "'temperature'"),
        (OfBooleanMasks, "boolean"),
    ],
)
def test_classes_of_users(cls, reason):
    assert reason in own_path(cls)
    model = quantized(with_attention(cls), attention=True)
    assert torch.equal(logits(model), logits(quantized(with_attention(cls))))
    rows = quantization_report(model).attention
    assert not any(row.quantized for row in rows) and all(reason in row.reason for row in rows)


def test_what_has_no_effect_is_no_obstacle():
    assert own_path(Windowed) == own_path(LlamaAttention) == ""
    model = quantized(with_attention(Windowed), attention=True)
    assert all(row.quantized for row in quantization_report(model).attention)


def test_a_source_that_cannot_be_read():
    scope = {"LlamaAttention": LlamaAttention}
    exec("class Hidden(LlamaAttention):\n    pass", scope)
    assert "cannot be read" in own_path(scope["Hidden"])


def test_modules_that_share_a_configuration_with_it():
    model = quantized(with_attention(Tempered, layers=[1]), attention=True, kv_cache=True)
    first, second = quantization_report(model).attention
    assert "shares its configuration with model.layers.1.self_attn" in first.reason
    assert "shares" not in second.reason and model.config._attn_implementation == "sdpa"


# --- what only calibration, or a call, can tell -----------------------------------------------------------------------


class SummingAttention(nn.Module):
    """Its products are none of torch's."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        q = self.proj(x)
        weights = torch.softmax((q[:, :, None] * q[:, None]).sum(-1), dim=-1)
        if weights.shape[0] == 0:
            weights = weights @ weights
        return (weights[..., None] * q[:, None]).sum(-2)


@pytest.mark.parametrize("by_file", [False, True])
def test_attention_whose_products_are_not_seen(by_file, tmp_path):
    config = FP8Config(attention=True, dump_stats_path=str(tmp_path / "measure"))
    torch.manual_seed(0)
    model, x = nn.Sequential(SummingAttention(), nn.Linear(8, 8)), torch.randn(1, 3, 8)
    prepare(model, config)
    model(x)
    if by_file:
        from optimum_fp8 import finalize_calibration

        finalize_calibration(model)
    convert(model)
    report = quantization_report(model)
    assert len(report.quantized) == 2
    assert [(row.quantized, row.reason) for row in report.attention] == [(False, "none of its products was seen")]


def no_kernel(*args, **options):
    raise RuntimeError("this shape is not taken\nby any kernel")


@pytest.mark.parametrize("family, layer", [("llama", "layers.0.mlp.down_proj"), ("bloom", "h.0.mlp.dense_4h")])
def test_a_call_that_our_operators_do_not_take_is_made_in_high_precision(family, layer, monkeypatch):
    options = {"activation_scheme": "dynamic", "allowlist": {"names": [layer]}}
    expected = logits(convert(FAMILIES[family].make(), FP8Config(**options)))
    model = convert(FAMILIES[family].make(), FP8Config(**options, attention=True))
    for operator in ("attention", "matmul"):
        monkeypatch.setattr(f"optimum_fp8.ops.{operator}", no_kernel)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    for row in quantization_report(model).attention:
        assert [*row.fallbacks] == ["high precision: this shape is not taken"] and not row.kernels
