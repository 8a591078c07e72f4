"""Checkpoints of models written for Gaudi, loaded for another target: what reads a cache keeps the cache's scale."""

from __future__ import annotations

import pytest
import torch
from optimum_habana_model import GaudiLlamaForCausalLM, generate
from transformers import AutoModelForCausalLM
from vllm_gaudi_model import LlamaForCausalLM, Runner

from optimum_fp8 import FP8Config, convert, finalize_calibration, load, prepare, save
from optimum_fp8.attention import scales_of
from optimum_fp8.modules.handler import converted_modules

NAME = "examples/llm/tiny_lm"
FLOWS = {
    "products": (["Matmul", "KVCache"], {}),
    "flash": (["ModuleFusedSDPA", "KVCache"], {"use_flash_attention": True}),
}


def scales(model):
    """Of all helper modules, by name."""
    found = {name: scales_of(module) for name, (module, _) in converted_modules(model).items()}
    return {name: {key: scale.item() for key, scale in each.items()} for name, each in found.items() if each}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("method", ["maxabs_hw", "maxabs_arbitrary"])
def test_they_are_those_of_quantizing_for_it(flow, method, tmp_path):
    types, flags = FLOWS[flow]
    options = {"dump_stats_path": tmp_path / "measure", "allowlist": {"types": types}}
    ids = torch.randint(2000, (2, 12), generator=torch.Generator().manual_seed(0))
    model = prepare(GaudiLlamaForCausalLM.from_pretrained(NAME), FP8Config(mode="MEASURE", **options))
    generate(model, ids, torch.ones_like(ids), 2, **flags)
    finalize_calibration(model)

    def quantized(target):
        config = FP8Config(mode="QUANTIZE", scale_method=method, target=target, **options)
        return convert(GaudiLlamaForCausalLM.from_pretrained(NAME), config)

    quantized("gaudi3").save_pretrained(tmp_path / "gaudi3")
    loaded = GaudiLlamaForCausalLM.from_pretrained(tmp_path / "gaudi3", quantization_config=FP8Config(target="gaudi2"))
    assert scales(loaded) == scales(quantized("gaudi2")) != {}


def test_what_reads_a_paged_cache(tmp_path):
    """Blocks of no sequence hold garbage: it is in what a product is handed, and not in the cache's range."""
    plain = AutoModelForCausalLM.from_pretrained(NAME)
    types = ["Matmul", "B2BMatmul", "ModuleFusedSDPA", "VLLMKVCache"]
    options = {"dump_stats_path": tmp_path / "measure", "allowlist": {"types": types}}

    def original():
        return LlamaForCausalLM(plain.config).load_weights(plain.state_dict()).eval()

    def quantized(target):
        config = FP8Config(mode="QUANTIZE", scale_method="maxabs_arbitrary", target=target, **options)
        return convert(original(), config)

    model = prepare(original(), FP8Config(mode="MEASURE", **options))
    ids = torch.randint(2000, (2, 12), generator=torch.Generator().manual_seed(0))
    Runner(model, dtype=torch.float32, garbage=50.0).generate(list(ids), 2)
    finalize_calibration(model)
    save(quantized("gaudi3"), tmp_path / "gaudi3")
    loaded = load(tmp_path / "gaudi3", original(), target="gaudi2")
    assert scales(loaded) == scales(quantized("gaudi2")) != {}
