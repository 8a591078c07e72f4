"""A quantized model in use: generate, torch.compile, gradients, pickling aside from saving."""

from __future__ import annotations

import copy

import pytest
import torch
from hf.conftest import llama
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, dequantize, ops, quantization_report
from optimum_fp8.errors import FP8StateError


@pytest.fixture(params=["static", "per token"])
def quantized(save, batches, request):
    config = FP8Config(dataset=batches) if request.param == "static" else FP8Config(scale_method="maxabs_pcs_pow2")
    return AutoModelForCausalLM.from_pretrained(save(llama()), quantization_config=config)


def test_compiled_without_graph_breaks_computes_the_same(quantized, ids):
    with torch.no_grad():
        expected = quantized(ids, use_cache=False).logits
        compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"num_beams": 2}, {"do_sample": True}], ids=lambda o: next(iter(o))
)
def test_generate(quantized, ids, options):
    tokens = quantized.generate(ids, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, **options)
    assert tokens.shape == (2, ids.shape[1] + 5)


def test_static_cache_generates_the_same_tokens(quantized, ids):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = quantized.generate(ids, **options)
    assert torch.equal(quantized.generate(ids, cache_implementation="static", **options), plain)


def test_gradients_reach_what_is_not_in_fp8(quantized, ids):
    trained = [name for name, parameter in quantized.named_parameters() if parameter.requires_grad]
    assert "model.norm.weight" in trained and "model.layers.0.mlp.up_proj.weight" not in trained

    def gradients(model):
        model(ids, labels=ids).loss.backward()
        found = [model.get_parameter(name).grad.flatten().double() for name in trained]
        model.zero_grad()
        return torch.cat(found)

    found, expected = gradients(quantized), gradients(dequantize(copy.deepcopy(quantized)))
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98


def test_forced_reference_computes_the_same_and_is_counted(quantized, ids):
    with torch.no_grad():
        expected = quantized(ids).logits
        before = quantization_report(quantized).kernels.get("reference", 0)
        with ops.backend("reference"):
            assert torch.equal(quantized(ids).logits, expected)
    assert quantization_report(quantized).kernels["reference"] == before + 14


def test_a_copy_computes_the_same_and_counts_for_itself(quantized, ids):
    clone = copy.deepcopy(quantized)
    with torch.no_grad():
        expected = quantized(ids).logits
        assert quantization_report(clone).kernels == {}
        assert torch.equal(clone(ids).logits, expected)
    assert quantization_report(clone).kernels == {ops.cpu.backends()[0]: 14}


def test_an_input_cast_to_fp8_by_other_code_is_refused(quantized):
    linear = quantized.model.layers[0].mlp.up_proj
    with pytest.raises(FP8StateError, match="without a scale.*blocklist"):
        linear(torch.ones(1, 64).to(linear.codes.dtype))


def test_memory_planning_counts_a_byte_for_each_weight(quantized):
    quantizer = quantized.hf_quantizer
    assert quantizer.quantized_element_size == 1
    quantizer.pre_quantized = False
    sizes = {
        name: quantizer.param_element_size(quantized, name, parameter)
        for name, parameter in quantized.named_parameters()
    }
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 1 and sizes["model.embed_tokens.weight"] == 2
