"""Families whose attention has a `q_scale`, `k_scale` or `v_scale` of its own: its own scales and ours do not meet."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from attention_models import Family
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder

from optimum_fp8 import FP8Config, convert, dequantize, prepare, quantization_report
from optimum_fp8.attention import scales_of

SOUND = torch.linspace(-1, 1, 64 * 32).view(1, 64, 32).sin()
SIZES = {"hidden_size": 32}
FAMILIES = {
    "gemma3n, audio": Family(
        Gemma3nAudioEncoder,
        hf.Gemma3nAudioConfig(
            **SIZES,
            conf_num_hidden_layers=2,
            conf_num_attention_heads=4,
            sscp_conv_channel_size=(8, 4),
            input_feat_size=32,
        ),
        {"audio_mel": SOUND, "audio_mel_mask": torch.zeros(1, 64, dtype=torch.bool)},
        2,
        0,
    ),
    "gemma4, audio": Family(
        hf.Gemma4AudioModel,
        hf.Gemma4AudioConfig(
            **SIZES,
            num_hidden_layers=2,
            num_attention_heads=4,
            subsampling_conv_channels=(32, 4),
            output_proj_dims=16,
        ),
        {"input_features": SOUND, "attention_mask": torch.ones(1, 64, dtype=torch.bool)},
        2,
        0,
    ),
    "mimo_v2_flash": Family(
        hf.MiMoV2FlashForCausalLM,
        hf.MiMoV2FlashConfig(
            **SIZES,
            vocab_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            v_head_dim=8,
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention"],
            mlp_layer_types=["dense", "dense"],
            attention_value_scale=0.707,
            pad_token_id=0,
            eos_token_id=2,
        ),
        {"input_ids": torch.arange(3, 25).view(2, 11)},
        2,
        2,
    ),
}
OWN = ("q_scale", "k_scale", "v_scale")


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def own_scales(model):
    """The values of those attributes that the family itself gives to its attention modules."""
    named = {name: module for name, module in model.named_modules() if any(hasattr(module, key) for key in OWN)}
    return {
        (name, key): float(getattr(module, key))
        for name, module in named.items()
        if not name.endswith("fp8_scales")
        for key in OWN
        if hasattr(module, key)
    }


@torch.no_grad()
def output(model, family):
    return model(**family.inputs)[0]


def converted(family, **options):
    model = prepare(family.make(), FP8Config(target="cpu", attention=True, **options))
    output(model, family)
    return convert(model)


@pytest.mark.core
def test_it_is_quantized_like_any_other_and_its_own_scales_stay(family):
    plain = family.make()
    expected, before = output(plain, family), own_scales(plain)
    assert before, "a family that belongs here"
    model = converted(family, kv_cache=family.cached > 0)
    found = output(model, family)
    assert found.isfinite().all() and ((found - expected).norm() / expected.norm()).item() < 0.25
    rows = quantization_report(model).attention
    assert sum(row.quantized for row in rows) == family.ours and all(sum(row.kernels.values()) for row in rows)
    assert own_scales(model) == before
    for row in rows:
        assert {"q_scale", "k_scale", "v_scale", "p_scale"} <= set(scales_of(model.get_submodule(row.name)))


def test_attention_alone_differs_little_from_the_model_itself(family):
    expected = output(family.make(), family)
    model = converted(family, allowlist={"names": [converted_linear(family)]})
    assert ((output(model, family) - expected).norm() / expected.norm()).item() < 0.15


def converted_linear(family):
    """One layer, because something must be selected."""
    names = [name for name, module in family.make().named_modules() if isinstance(module, torch.nn.Linear)]
    return rf"^{next(name for name in names if 'q_proj' in name)}$".replace(".", r"\.")


@pytest.mark.core
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_saved_and_reloaded_it_computes_the_same(family, tmp_path, scheme):
    model = converted(family, activation_scheme=scheme)
    expected, before = output(model, family), own_scales(model)
    model.save_pretrained(tmp_path)
    again = family.model_class.from_pretrained(tmp_path)
    assert torch.equal(output(again, family), expected) and own_scales(again) == before
    assert [row.scales for row in quantization_report(again).attention] == [
        row.scales for row in quantization_report(model).attention
    ]


def test_a_state_dict_goes_into_another_and_back_to_high_precision(family):
    model, other = converted(family), converted(family)
    with torch.no_grad():
        for module in other.modules():
            for scale in scales_of(module).values():
                scale.mul_(3)
    assert not torch.equal(output(other, family), output(model, family))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, family), output(model, family))
    before = own_scales(model)
    plain = dequantize(copy.deepcopy(model))
    assert own_scales(plain) == before and not any(scales_of(module) for module in plain.modules())
