"""State-space and hybrid models: FP8 projections, states in high precision, caches of both kinds of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from optimum_fp8 import FP8Config, quantization_report
from optimum_fp8.cache import in_fp8

IDS = torch.arange(3, 27).view(2, 12)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2} | TOKENS
TEXT = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
JAMBA = TEXT | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
RECURRENT = TEXT | {"lru_width": 32, "attention_window_size": 8, "block_types": ("recurrent", "attention")}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

# family: (model class, its config, modules that are FP8, how many layers of its cache hold keys and values)
FAMILIES: dict[str, tuple[Any, Any, tuple[str, ...], int]] = {
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig(**SIZES, state_size=4), ("in_proj", "x_proj", "out_proj"), 0),
    "mamba2": (
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config(**SIZES, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
        ("in_proj", "out_proj"),
        0,
    ),
    "rwkv": (
        hf.RwkvForCausalLM,
        hf.RwkvConfig(**SIZES, attention_hidden_size=32, intermediate_size=48, rescale_every=1),
        ("key", "receptance"),
        0,
    ),
    "recurrent_gemma": (
        hf.RecurrentGemmaForCausalLM,
        hf.RecurrentGemmaConfig(**RECURRENT, w_init_variance_scale=0.1),
        ("linear_x", "linear_y", "linear_out", *ATTENTION, *MLP),
        1,
    ),
    "jamba": (
        hf.JambaForCausalLM,
        hf.JambaConfig(**JAMBA, mamba_d_state=4, use_mamba_kernels=False),
        ("in_proj", "x_proj", "out_proj", *ATTENTION),
        1,
    ),
    "bamba": (
        hf.BambaForCausalLM,
        hf.BambaConfig(**TEXT, **MAMBA_2, mamba_expand=2, attn_layer_indices=[1]),
        ("in_proj", "out_proj", *ATTENTION, *MLP),
        1,
    ),
    "falcon_h1": (
        hf.FalconH1ForCausalLM,
        hf.FalconH1Config(**TEXT, **MAMBA_2, mamba_d_ssm=64, head_dim=8),
        ("in_proj", "out_proj", *ATTENTION, *MLP),
        2,
    ),
    "lfm2": (
        hf.Lfm2ForCausalLM,
        hf.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"], block_multiple_of=8),
        ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"),
        1,
    ),
}
QUICK = ("jamba", "rwkv", "lfm2")


def states_of(held: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a layer of a cache that are neither keys nor values."""
    if torch.is_tensor(held):
        return [held] if held.is_floating_point() else []
    if isinstance(held, dict):
        return [state for name, value in held.items() if name not in ("keys", "values") for state in states_of(value)]
    if isinstance(held, (list, tuple)):
        return [state for value in held for state in states_of(value)]
    return states_of(vars(held)) if "cache_utils" in type(held).__module__ else []


def cache_of(model, output):
    """The cache after a call, or of `generate` where a class returns none that it made itself."""
    if (cache := output.get("past_key_values")) is not None:
        return cache
    return model.generate(IDS, max_new_tokens=1, do_sample=False, return_dict_in_generate=True).get("cache")


def layers_of(cache: Any) -> list[Any]:
    return list(getattr(cache, "layers", ()))


@pytest.mark.parametrize(
    "family", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES]
)
@torch.no_grad()
def test_a_model_with_states_is_quantized_generates_and_is_reloaded(family, tmp_path):
    model_class, config, in_codes, cached = FAMILIES[family]
    torch.manual_seed(0)
    original = model_class(config).eval()
    original.save_pretrained(tmp_path / "original")
    asked = FP8Config(dataset=[{"input_ids": IDS}], decode_steps=2, kv_cache=bool(cached))
    model = model_class.from_pretrained(tmp_path / "original", quantization_config=asked).eval()
    assert {row.name.rpartition(".")[2] for row in quantization_report(model).quantized} >= set(in_codes)

    output, expected = model(IDS, use_cache=True), original(IDS, use_cache=True)
    assert (output.logits - expected.logits).norm() / expected.logits.norm() < 0.15
    layers = layers_of(cache_of(model, output))
    assert sum(in_fp8(layer) for layer in layers) == cached
    states = [state for layer in layers for state in states_of(getattr(layer, "inner", layer))]
    theirs = [state for layer in layers_of(cache_of(original, expected)) for state in states_of(layer)]
    assert [(each.dtype, each.shape) for each in states] == [(each.dtype, each.shape) for each in theirs]
    assert states or family in ("rwkv", "recurrent_gemma"), "these keep states themselves, in no cache of transformers"

    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]
    model.save_pretrained(tmp_path / "fp8")
    if family != "rwkv":  # which divides weights in the first forward pass after loading, those of before too
        assert torch.equal(model_class.from_pretrained(tmp_path / "fp8").eval()(IDS).logits, output.logits)
    plain = model.dequantize()
    assert [type(each) for each in plain.modules()] == [type(each) for each in original.modules()]
