"""Layers that choose experts are found beside every kind of experts, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import transformers as hf
from gaudi_expert_models import GaudiMixtral, expert_model
from moe_models import tiny_moe
from torch import nn

from optimum_fp8 import FP8Config, convert, quantization_report
from optimum_fp8.selection.routers import routers

SWITCH = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "num_experts": 4}


def switch():
    """Experts that are modules of their own."""
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**SWITCH, **sparse))


# model: the ends of the names of its routers, which are a Linear
MODELS = {
    "qwen2_moe": ["mlp.shared_expert_gate"],
    "mixtral": [],  # a bare parameter
    "gpt_oss": [],
    "jamba": [],
    "llama4": ["feed_forward.router"],
    "dbrx": ["ffn.router.layer"],
    "jetmoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
}


def names(model, modules) -> list[str]:
    return [name for name, module in model.named_modules() if module in modules]


@pytest.mark.parametrize("family", MODELS)
def test_found(family):
    model = tiny_moe(family)
    found = names(model, routers(model))
    ends = MODELS[family]
    assert all(any(name.endswith(end) for end in ends) for name in found)
    assert all(any(name.endswith(end) for name in found) for end in ends)


@pytest.mark.parametrize("family, said", [("mixtral", True), ("jetmoe", False)])
def test_bare_routers_that_are_asked_for_are_named(family, said, caplog):
    with caplog.at_level("WARNING", "optimum_fp8"):
        convert(tiny_moe(family), FP8Config(activation_scheme="weight_only", quantize_routers=True))
    warned = "does nothing for 1 routers that hold a bare parameter" in caplog.text
    assert warned == said and (not said or "(model.layers.0.mlp.gate)" in caplog.text)


def test_beside_experts_that_are_modules():
    model = convert(switch(), FP8Config(activation_scheme="weight_only"))
    report = quantization_report(model)
    kept = [row for row in report.modules if row.reason == "kept by default: it chooses experts"]
    assert kept and all(row.name.endswith("router.classifier") for row in kept)
    experts = [row.name for row in report.quantized if ".experts.expert_" in row.name]
    assert len(experts) == 2 * 4 * 2, "each expert's wi and wo, whose dtype alone is read by the code around it"


def test_models_written_for_gaudi_keep_theirs():
    assert not routers(expert_model(GaudiMixtral))


def test_nothing_else_is_a_router():
    assert not routers(nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8)))
    block = nn.Module()
    block.gate, block.up, block.head = nn.Linear(8, 4), nn.Linear(8, 16), nn.Linear(8, 1)
    assert not routers(block)
    block.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(4))
    assert names(block, routers(block)) == ["gate", "head"]
