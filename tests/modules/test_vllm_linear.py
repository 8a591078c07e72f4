"""vLLM's layers in one process: the head, which is never called, and what older versions lack."""

from __future__ import annotations

import copy

import pytest
import torch
import vllm_layers as vllm
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, load, prepare, quantization_report, save
from optimum_fp8.modules import FP8LinearBase
from optimum_fp8.modules.vllm_linear import FP8ParallelLMHead, vllm_peers


class LM(nn.Module):
    def __init__(self, bias=None, seed=0):
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.embed_tokens = vllm.VocabParallelEmbedding(torch.randn(24, 16, generator=made))
        self.lm_head = vllm.ParallelLMHead(torch.randn(24, 16, generator=made), bias)
        self.logits_processor = vllm.LogitsProcessor()

    def forward(self, ids):
        return self.logits_processor(self.lm_head, self.embed_tokens(ids), self.lm_head.bias)


IDS = torch.arange(12).reshape(2, 6)


def converted(model, **options):
    prepare(model, FP8Config(**{"target": "cpu", **options}))
    model(IDS)
    return convert(model)


@torch.no_grad()
@pytest.mark.parametrize("bias", [None, torch.linspace(-5, 5, 24)], ids=["", "bias"])
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_a_head_is_what_a_linear_layer_is(bias, scheme):
    options = {"activation_scheme": scheme, "scale_method": "maxabs_pow2"}
    model = LM(bias)
    twin = nn.Linear(16, 24, bias=bias is not None)
    twin.weight = nn.Parameter(model.lm_head.weight.clone())
    twin.bias = None if bias is None else nn.Parameter(bias.clone())
    twin, x = nn.Sequential(twin), model.embed_tokens(IDS)
    prepare(twin, FP8Config(target="cpu", **options))
    twin(x)
    expected = convert(twin)(x)
    converted(model, **options)
    assert torch.equal(model(IDS), expected)
    assert isinstance(model.lm_head, FP8ParallelLMHead) and type(model.embed_tokens) is vllm.VocabParallelEmbedding
    (row,) = quantization_report(model).modules
    assert row.type == "ParallelLMHead" and row.quantized and row.activations == scheme and sum(row.kernels.values())
    with pytest.raises(RuntimeError, match="should be used in the sampler"):
        model.lm_head(x)
    assert torch.equal(model.lm_head.quant_method.embedding(model.lm_head, IDS), model.lm_head.weight[IDS])


@torch.no_grad()
def test_measuring_a_head_leaves_no_trace():
    model = LM()
    own, expected = model.lm_head.quant_method, model(IDS)
    prepare(model, FP8Config(target="cpu", measure_exclude="NONE"))
    assert torch.equal(model(IDS), expected) and model.lm_head.quant_method is not own
    measurements = model._optimum_fp8_state.measurements
    assert measurements.range("lm_head").item() == model.embed_tokens(IDS).abs().max().item()
    assert measurements.range("lm_head", "output").item() == expected.abs().max().item()
    other = copy.deepcopy(model)
    other.logits_processor(other.lm_head, torch.full((1, 16), 99.0))
    assert other._optimum_fp8_state.measurements.range("lm_head").item() == 99.0
    assert measurements.range("lm_head").item() < 99.0, "a copy is measured by itself"
    dequantize(model)
    assert model.lm_head.quant_method is own and torch.equal(model(IDS), expected)


@torch.no_grad()
def test_a_converted_head_is_copied_saved_and_taken_back(tmp_path):
    model = LM()
    own, expected = model.lm_head.quant_method, model(IDS)
    output = converted(model)(IDS)
    assert 0 < (output - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(copy.deepcopy(model)(IDS), output)
    save(model, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved", LM(seed=1))(IDS), output)
    dequantize(model)
    assert type(model.lm_head) is vllm.ParallelLMHead and model.lm_head.quant_method is own
    assert (model(IDS) - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_one_weight_of_several_layers_has_one_input_scale():
    layer = vllm.QKVParallelLinear(
        torch.randn(32, 16) * torch.tensor([1.0, 9.0]).repeat_interleave(16)[:, None], [16, 8, 8]
    )
    model, x = nn.Sequential(layer), torch.randn(3, 16)
    expected = layer(x)[0]
    prepare(model, FP8Config(target="cpu", scale_method="act_maxabs_pow2_weights_pcs_maxabs_pow2"))
    model(x)
    convert(model)
    assert model[0].input_scale.shape == (1,) and model[0].weight_scale.shape == (32, 1)
    assert model[0].output_sizes == [16, 8, 8] and (model(x)[0] - expected).norm() < 0.05 * expected.norm()


def test_layers_of_older_versions_ask_for_the_number_of_processes():
    layer = vllm.ColumnParallelLinear(torch.randn(4, 4), gather_output=True)
    del layer.tp_size, layer.tp_rank
    assert vllm_peers(layer).count == 1
    model = convert(nn.Sequential(layer), FP8Config(target="cpu", activation_scheme="weight_only"))
    assert isinstance(model[0], FP8LinearBase) and model(torch.randn(2, 4))[0].shape == (2, 4)
