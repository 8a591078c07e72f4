"""Where adapted weights lie: experts, and names of former versions of transformers."""

from __future__ import annotations

import pytest
import torch
from adapters.conftest import llama
from exporting.conftest import wide_mixtral
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from optimum_fp8 import FP8NotAvailableError, merge_lora
from optimum_fp8.adapters.lora import open_adapter
from optimum_fp8.adapters.places import places_of
from optimum_fp8.errors import FP8CheckpointError


def renamed(folder, change):
    """An adapter whose modules have other names."""
    path = folder / "adapter_model.safetensors"
    save_file({change(key): each for key, each in load_file(path).items()}, path)
    return folder


def test_attention_of_a_mixture_of_experts_is_merged_and_experts_are_refused(save, adapt, quantized, tmp_path):
    original = save(wide_mixtral())
    fp8 = quantized(original)
    adapter = adapt(original, target_modules=["q_proj", "o_proj"])
    report = merge_lora(fp8, adapter, tmp_path / "out", trained_on="base", original=original)
    assert len(report.layers) == 4 and all(each.in_fp8 for each in report.layers)
    first = "model.layers.0.mlp.experts"
    adapter = renamed(adapter, lambda key: key.replace("model.layers.0.self_attn.q_proj", first))
    with pytest.raises(FP8NotAvailableError, match=f"{first} of MixtralForCausalLM is a .*one by one"):
        merge_lora(fp8, adapter, tmp_path / "other", trained_on="base", original=original)


def test_where_weights_lie(save, adapt, quantized):
    original = save(llama())
    places = places_of(quantized(original), open_adapter(adapt(original)), original)
    place = next(each for each in places.changed if each.name.endswith("0.mlp.down_proj"))
    assert place.parts["weight"].shape == (1, 64, 96) and place.parts["weight_scale"].dtype == torch.float32
    assert place.original.shape == (64, 96) and not place.in_out and place.module.high_precision == torch.bfloat16


def test_a_misspelt_module_is_told_the_nearest(save, adapt, quantized):
    original = save(tiny_llama().bfloat16())
    adapter = renamed(adapt(original), lambda key: key.replace("q_proj", "query_proj"))
    message = r"query_proj, which LlamaForCausalLM does not have: did you mean '\S+\.self_attn\.\w+'\? valid: "
    with pytest.raises(FP8CheckpointError, match=message) as raised:
        places_of(quantized(original), open_adapter(adapter), None)
    assert str(raised.value).count("model.layers.") == 7  # the wrong one, the nearest, and five that are near
