"""Experts of transformers with scales by blocks and groups, which scale methods that users register have."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from moe_models import LOCAL, tiny_moe
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from optimum_fp8 import FP8Config, convert, ops, quantization_report
from optimum_fp8.modules.fused_experts import FP8FusedExperts
from optimum_fp8.scales import (
    PerBlock,
    PerGroup,
    ScaleMethod,
    ScaleRule,
    activation_scale,
    quantized_weight,
    register_method,
)
from optimum_fp8.scales.methods import SCALE_METHODS

METHODS = {
    "experts_by_blocks": (PerBlock(128, 128), PerGroup(128)),
    "experts_by_groups_of_32": (PerGroup(32), PerGroup(32)),
    "experts_by_rows_of_blocks": (PerBlock(1, 128), PerGroup(128)),
}
IDS = torch.arange(2, 50).view(2, 24)
BIG = LOCAL | {"hidden_size": 160, "intermediate_size": 128, "head_dim": 40}


@pytest.fixture(autouse=True)
def methods():
    known = dict(SCALE_METHODS)
    for name, (weight, activation) in METHODS.items():
        rules = (ScaleRule(weight, "maxabs", "identity"), ScaleRule(activation, "maxabs", "identity"))
        register_method(ScaleMethod(name, *rules, dynamic_only=True))
    with torch.no_grad():
        yield
    for name in METHODS.keys() - known.keys():
        del SCALE_METHODS[name]


def values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[…, out, in]` that codes stand for."""
    rows, columns = (
        torch.arange(size) // block for size, block in zip(codes.shape[-2:], blocks(codes, scale), strict=True)
    )
    return codes.float() * scale[..., rows, :][..., columns]


def blocks(codes: torch.Tensor, scale: torch.Tensor) -> tuple[int, int]:
    """How many rows and columns share a scale."""
    fits = [block for block in (1, 32, 128) if -(-codes.shape[-1] // block) == scale.shape[-1]]
    return (1 if scale.shape[-2] == codes.shape[-2] else 128), fits[-1]


def rounded(x: torch.Tensor, method: str) -> torch.Tensor:
    """A row of which each group is rounded by its own range."""
    parts = []
    for part in x.split(METHODS[method][1].size, dim=-1):
        scale = activation_scale(part.abs().max(), method=method, dynamic=True)
        parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, -1)


def block(hidden: int, inner: int) -> nn.Module:
    config = MixtralConfig(**LOCAL | {"hidden_size": hidden, "intermediate_size": inner})
    made = nn.ModuleDict({"experts": MixtralExperts(config)})
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 4)
    return made


@pytest.mark.parametrize("hidden, inner", [(160, 128), (100, 256), (200, 128)])
@pytest.mark.parametrize("method", METHODS)
def test_computes_what_its_codes_stand_for(method, hidden, inner):
    made = block(hidden, inner)
    original = copy.deepcopy(made["experts"])
    experts = convert(made, FP8Config(scale_method=method, activation_scheme="dynamic"))["experts"]
    assert isinstance(experts, FP8FusedExperts)
    wanted = [weight for pair in zip(original.gate_up_proj, original.down_proj, strict=True)
              for weight in (*pair[0].chunk(2), pair[1])]  # fmt: skip
    for (codes, scale), weight in zip((each for of in experts.pieces() for each in of), wanted, strict=True):
        expected_codes, expected_scale, _ = quantized_weight(weight, method=method)
        assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, hidden, generator=generator)
    weights, index = torch.rand(12, 4, generator=generator).topk(2, dim=-1)
    upper, down = (values(*each) for each in zip(experts.stacks(), experts.stack_scales(), strict=True))
    expected = torch.zeros_like(x)
    for token, (chosen, weight) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, factor in zip(chosen, weight, strict=True):
            gate, up = F.linear(rounded(x[token : token + 1], method), upper[expert]).chunk(2, dim=-1)
            expected[token] += F.linear(rounded(F.silu(gate) * up, method), down[expert])[0] * factor
    assert (experts(x, index, weights) - expected).norm() / expected.norm() < 2e-3
    assert {operator for operator, _ in experts.record.kernels} == {"grouped_linear"}


def test_two_blocks_are_no_halves():
    """Of 200 outputs 128 and 72 share a scale, not 100 and 100."""
    made = block(200, 128)
    made["experts"].down_proj[:, 110:] /= 64
    experts = convert(made, FP8Config(scale_method="experts_by_blocks", activation_scheme="weight_only"))["experts"]
    assert experts.down_proj_scale.shape == (4, 2, 1)
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    found = experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    upper, down = (values(*each) for each in zip(experts.stacks(), experts.stack_scales(), strict=True))
    gate, up = F.linear(x, upper[0]).chunk(2, dim=-1)
    torch.testing.assert_close(found, F.linear(F.silu(gate) * up, down[0]), atol=1e-3, rtol=1e-3)


def test_a_gate_that_ends_within_a_block_is_refused():
    model = convert(tiny_moe("mixtral"), FP8Config(scale_method="experts_by_blocks", activation_scheme="dynamic"))
    kept = {row.name: row.reason for row in quantization_report(model).modules if not row.quantized}
    assert "its gate ends within a block: gate_up_proj has 48 rows of each, scales are per block 128×128" in set(
        kept.values()
    )


@pytest.mark.parametrize("method", ["experts_by_blocks", "experts_by_groups_of_32"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saved_and_reloaded_to_the_bit(family, method, tmp_path):
    classes = {"mixtral": (MixtralForCausalLM, MixtralConfig), "gpt_oss": (GptOssForCausalLM, GptOssConfig)}
    torch.manual_seed(0)
    model_class, config_class = classes[family]
    model_class(config_class(**BIG)).save_pretrained(tmp_path / "plain")
    config = FP8Config(scale_method=method, activation_scheme="dynamic")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    experts = next(module for module in model.modules() if isinstance(module, FP8FusedExperts))
    assert experts.gate_up_proj_scale.shape == ((4, 2, 2) if method == "experts_by_blocks" else (4, 256, 5))
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert torch.equal(again(IDS).logits, expected)
    restored = again.dequantize()(IDS).logits
    assert (restored - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize("group", [128, 32])
def test_grouped_linear_takes_scales_by_groups(group):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 40, 200, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 40, -(-200 // group), generator=generator) + 0.5
    x, experts = torch.randn(7, 200, generator=generator), torch.tensor([0, 2, 1, 1, 0, 2, 5])
    found = ops.grouped_linear(x, experts, codes, scale, full_scale=448.0)
    weight = codes.float() * scale.repeat_interleave(group, -1)[..., :200]
    for row, expert in enumerate(experts.tolist()):
        wanted = F.linear(x[row], weight[expert]) if expert < 3 else torch.zeros(40)
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)
