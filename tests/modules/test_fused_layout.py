"""Classes with stacked experts of which transformers declares nothing: what is known of them, and that none is left."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from moe_models import FAMILIES, tiny_moe
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoE, JetMoeParallelExperts
from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from optimum_fp8 import FP8Config, convert, dequantize, finalize_calibration, load, prepare, quantization_report, save
from optimum_fp8.modules.fused_layout import KNOWN

EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 24, 10


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Block(nn.Module):
    """A mixture whose router is the input itself."""

    def __init__(self, cls, config):
        super().__init__()
        self.experts = cls(config)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def routed(experts: int):
    generator = torch.Generator().manual_seed(1)
    weights, index = torch.rand(TOKENS, experts, generator=generator).topk(2, dim=-1)
    return torch.randn(TOKENS, HIDDEN, generator=generator), index, weights


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The values that codes of `x` stand for."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def test_experts_that_give_back_what_they_are_given():
    config = LongcatFlashConfig(
        hidden_size=HIDDEN, expert_ffn_hidden_size=INNER, n_routed_experts=EXPERTS, zero_expert_num=2
    )
    block = Block(LongcatFlashExperts, config)
    x, index, weights = routed(experts=EXPERTS + 2)
    assert (index >= EXPERTS).any()
    original = copy.deepcopy(block.experts)
    experts = convert(block, FP8Config(activation_scheme="weight_only")).experts
    assert experts.gate_up_proj.shape[0] == EXPERTS and len(original.gate_up_proj) == EXPERTS + 2
    only_kept = torch.full_like(index, EXPERTS)
    torch.testing.assert_close(block(x, only_kept, weights), x * weights.sum(-1, keepdim=True))
    back = dequantize(copy.deepcopy(block)).experts
    torch.testing.assert_close(block(x, index, weights), back(x, index, weights), atol=1e-4, rtol=1e-4)
    assert back.gate_up_proj.shape == original.gate_up_proj.shape and not back.gate_up_proj[EXPERTS:].any()


def test_rows_that_are_sorted_by_expert():
    layer = JetMoeParallelExperts(EXPERTS, HIDDEN, INNER)
    layer.weight.data = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    model = nn.ModuleDict({"input_linear": layer})
    x, sizes = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(1)), [3, 0, 5, 2]
    prepare(model, FP8Config())
    model["input_linear"](x, sizes)
    measured = finalize_calibration(model)
    assert measured.range("input_linear", "input") == x.abs().max()
    experts = convert(model)["input_linear"]
    weight, rows = experts.weight.float() * experts.weight_scale, rounded(x, experts.input_scale).split(sizes)
    expected = torch.cat([F.linear(row, matrix) for row, matrix in zip(rows, weight, strict=True)])
    torch.testing.assert_close(experts(x, sizes), expected, atol=1e-4, rtol=1e-4)
    assert quantization_report(model).quantized[0].tokens_of_experts == tuple(sizes)


@pytest.mark.parametrize("lists, is_fp8", [("blocklist", False), ("allowlist", True)])
def test_lists_may_call_experts_what_other_libraries_do(lists, is_fp8):
    config = FP8Config(activation_scheme="weight_only", **{lists: {"types": ["FusedMoE"]}})
    model = convert(tiny_moe("mixtral"), config)
    quantized = {row.type for row in quantization_report(model).quantized}
    assert quantized == ({"MixtralExperts"} if is_fp8 else {"Linear"})


@pytest.mark.parametrize("cls, family", [(DbrxFFN, "dbrx"), (JetMoeMoE, "jetmoe")])
def test_saved_and_loaded_by_hand(cls, family, tmp_path):
    plain = nn.Sequential(cls(FAMILIES[family][1]()))
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 5
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    model = prepare(copy.deepcopy(plain), FP8Config())
    model(x)
    save(convert(model), tmp_path / "fp8")
    assert torch.equal(load(tmp_path / "fp8", plain)(x), model(x))


# Parameters of three dimensions, or in classes of experts, that no handler quantizes: what they are instead.
NO_EXPERTS = {
    "ConvertBert's groups": ["GroupedLinearLayer"],
    "a head for each codebook": ["CsmCodebooksHead", "KyutaiSpeechToTextFlexibleLinear", "MoshiFlexibleLinear"],
    "shared experts, scaled before the last product": ["InklingSharedExperts"],
    "attention": ["NeighborhoodAttention", "XLNetRelativeAttention"],
    "state space": ["ZambaMambaMixer"],
    "positions": [
        "EsmFold2ConfidenceHead", "Gemma4UnifiedVisionEmbedder", "Gemma4VisionPatchEmbedder",
        "Kimi_K25VisionPositionEmbeddings",
    ],
}  # fmt: skip


def undeclared_stacks() -> dict[str, list[str]]:
    """Classes of transformers with parameters of three dimensions, none of them one, and nothing declared."""
    found: dict[str, list[str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for cls in (each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.ClassDef)):
            if any("use_experts_implementation" in ast.unparse(each) for each in cls.decorator_list):
                continue
            for call in (each for each in ast.walk(cls) if isinstance(each, ast.Call)):
                if not ast.unparse(call.func).endswith("Parameter") or not call.args:
                    continue
                made = call.args[0]
                sizes = made.args if isinstance(made, ast.Call) else []
                if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple):
                    sizes = sizes[0].elts
                shape = [ast.unparse(size) for size in sizes if not isinstance(size, ast.Starred)]
                flat = len(shape) == 2 and "num_experts *" in shape[0]
                if flat or (len(shape) == 3 and not {"1", "2"} & set(shape)):
                    found.setdefault(cls.name, []).append(", ".join(shape))
    return found


@pytest.mark.slow
def test_every_stack_of_transformers_is_known():
    """A new class with stacked weights shows here: declare it in `KNOWN`, or say what it is."""
    others = {name for names in NO_EXPERTS.values() for name in names}
    parts = {"DbrxExpertGLU"}  # of DbrxExperts
    assert undeclared_stacks().keys() - parts - others == (KNOWN.keys() - {"DbrxExperts"})
