"""Which modules compute attention, and which of them are selected."""

from __future__ import annotations

import pytest
import torch
from attention_models import FAMILIES
from gaudi_models import KVCache, Matmul, Softmax, gaudi_model
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from transformers import DetrConfig, DetrModel

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.attention import scales_of
from optimum_fp8.attention.detect import Kind, attention_kind, attention_modules
from optimum_fp8.errors import FP8SelectionError
from optimum_fp8.selection import select


def reasons(model, **options):
    """Why each attention module is selected or not, beside some layer that always is."""
    model = nn.ModuleDict({"model": model, "layer": nn.Linear(2, 2)})
    decisions = [each for each in select(model, FP8Config(**options)) if not each.handler.family.replaced]
    return {each.name.removeprefix("model."): each.reason for each in decisions}


@pytest.mark.core
@pytest.mark.parametrize(
    "make, name",
    [
        (tiny_llama, "model.layers.0.self_attn"),
        (tiny_gpt2, "transformer.h.0.attn"),
        (tiny_bert, "bert.encoder.layer.0.attention.self"),
    ],
)
def test_the_module_that_calls_attention_is_found(make, name):
    assert list(attention_modules(make())) == [name]
    assert reasons(make()) == {}
    assert reasons(make(), attention=True) == reasons(make(), kv_cache=True) == {name: "selected"}


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_attention(family):
    found = attention_modules(FAMILIES[family].make())
    assert len(found) == FAMILIES[family].ours
    own = family.startswith(("bloom", "falcon", "mpt", "deberta", "gpt_neo"))
    kinds = set(found.values())
    # GPT-J calls attention by name since transformers 5.23 or so.
    assert kinds == {Kind.FUNCTIONS if own else Kind.INTERFACE} or family == "gptj"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"blocklist": {"names": ["self_attn$"]}}, "blocklist name 'self_attn$'"),
        ({"blocklist": {"types": ["LlamaAttention"]}}, "blocklist type 'LlamaAttention'"),
        ({"modules_to_not_convert": ["model.layers.0"]}, "modules_to_not_convert 'model.layers.0'"),
        ({"allowlist": {"names": ["mlp"]}}, "selected"),
        ({"blocklist": {"names": ["q_proj"]}}, "selected"),
    ],
)
def test_lists(options, reason):
    assert reasons(tiny_llama(), attention=True, **options) == {"model.layers.0.self_attn": reason}


def test_an_implementation_that_nobody_gets_unasked_is_a_choice():
    model = tiny_llama()
    model.config._attn_implementation_internal = "flex_attention"
    assert reasons(model, attention=True) == {
        "model.layers.0.self_attn": "attn_implementation='flex_attention' was chosen"
    }


@pytest.mark.core
def test_scales_never_tell_a_models_dtype(tmp_path):
    """A decoder that begins with its attention: there scales are buffers, saved and loaded like the others."""
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    config = DetrConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone | {"out_features": ["stage1"]},
    )
    model, pixels = DetrModel(config).eval().bfloat16(), torch.randn(1, 3, 32, 32).bfloat16()
    prepare(model, FP8Config(attention=True, scale_method="maxabs_arbitrary"))
    model(pixels)
    convert(model)
    assert model.encoder.dtype == model.decoder.dtype == model.dtype == torch.bfloat16
    first, second = (layer.self_attn for layer in model.encoder.layers)
    assert "k_scale" in scales_of(first) and "k_scale" in scales_of(second)
    expected, scale = model(pixels)[0], scales_of(first)["k_scale"].clone()
    model.bfloat16()
    assert scales_of(first)["k_scale"].dtype == torch.float32 and torch.equal(scales_of(first)["k_scale"], scale)
    model.save_pretrained(tmp_path)
    again = DetrModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(scales_of(again.encoder.layers[0].self_attn)["k_scale"], scale)
    assert torch.equal(again(pixels)[0], expected) and again.encoder.dtype == torch.bfloat16


def test_softmax_and_product_alone_are_not_attention():
    class Router(nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.mT, -1)

    class SelfAttention(Router):
        """Inherits what it computes."""

    class TalksOfAttention(nn.Module):
        """softmax(q @ k) and matmul(p, v)"""

        def forward(self, x):
            return x  # softmax(matmul)

    assert attention_kind(Router()) is None and attention_kind(TalksOfAttention()) is None
    assert attention_kind(SelfAttention()) is Kind.FUNCTIONS


def test_nothing_at_all_is_an_error():
    with pytest.raises(FP8SelectionError, match=r"self_attn: blocklist name"):
        select(tiny_llama(), FP8Config(attention=True, blocklist={"names": ["self_attn$", "proj"]}))


def test_a_model_without_attention_is_no_error_but_no_secret(caplog):
    assert reasons(nn.Sequential(nn.Linear(2, 2)), attention=True) == {}
    assert "ModuleDict has no attention modules that are known" in caplog.text


def test_other_storage_is_reported():
    class KVCache(nn.Module):
        def forward(self, cur, dim, idx):
            return cur

    class VLLMKVCache(KVCache):
        pass

    net = nn.Sequential(KVCache(), VLLMKVCache())
    assert {reason.partition(":")[0] for reason in reasons(net, kv_cache=True).values()} == {
        "it stores keys and values in its own way"
    }
    assert reasons(net, attention=True) == {}


def test_helpers_do_the_work_of_a_class_that_derives_from_attention_and_not_of_one_that_multiplies():
    helpers = {name.partition("self_attn.")[2] for name in attention_modules(gaudi_model())}
    assert helpers == {
        *("matmul_qk", "matmul_av", "softmax", "k_cache", "v_cache"),
        "fused_scaled_dot_product_attention",
    }

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.matmul, self.softmax, self.cache = Matmul(), Softmax(), KVCache()

        def forward(self, q, k, v):
            return self.matmul(self.softmax(q @ k.mT, dim=-1), self.cache(v, 2, None))

    assert attention_modules(nn.Sequential(Attention())) == {"0": Kind.FUNCTIONS, "0.cache": Kind.STORAGE}


def test_caches_alone_leave_modules_without_a_cache_out():
    model = FAMILIES["deberta_v2"].make()
    assert set(reasons(model, kv_cache=True).values()) == {"it writes to no cache"}
