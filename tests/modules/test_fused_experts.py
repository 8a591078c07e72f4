"""Experts of transformers in FP8, class by class, beside a loop over tokens and experts with dequantized codes."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from scale_methods import FOR_ANY_SHAPE
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from optimum_fp8 import FP8Config, convert, dequantize, finalize_calibration, ops, prepare, quantization_report
from optimum_fp8.errors import FP8MeasurementError, FP8NotAvailableError, FP8OperandError
from optimum_fp8.modules.fused_experts import FP8FusedExperts
from optimum_fp8.modules.fused_layout import known_layout
from optimum_fp8.scales import SCALE_METHODS, activation_scale, quantized_weight
from optimum_fp8.test_utils import gaudi

pytestmark = pytest.mark.core
EXPERTS, HIDDEN, INNER, TOKENS = 4, 16, 24, 10
MOE = SimpleNamespace(
    num_local_experts=EXPERTS, num_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
    hidden_size=HIDDEN, moe_hidden_size=HIDDEN, moe_latent_size=None, intermediate_size=INNER,
    moe_intermediate_size=INNER, hidden_act="silu", mlp_hidden_act="relu2", swiglu_alpha=1.7, swiglu_limit=1.0,
    post_norm_eps=1e-5, _experts_implementation="grouped_mm",
)  # fmt: skip
# One for each way in which experts of transformers differ, and what computes them.
CLASSES = {
    MixtralExperts: "experts",
    AriaExperts: "experts",  # stored transposed
    DeepseekV4Experts: "grouped_linear",  # a gate of its own
    GptOssExperts: "grouped_linear",  # transposed, gate and up interleaved, biases
    OpenAIPrivacyFilterExperts: "grouped_linear",  # transposed, biases
    NemotronHExperts: "grouped_linear",  # no gate
    MuseSparkExperts: "grouped_linear",  # a norm behind each expert
    Step3p7Experts: "grouped_linear",  # a gate of its own, and nothing declared
}
CHANNELS = "act_maxabs_hw_weights_pcs_opt_pow2"


class Block(nn.Module):
    """A mixture whose router is the input itself."""

    def __init__(self, cls, config=MOE):
        super().__init__()
        self.experts = cls(config)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def routed(tokens: int = TOKENS, experts: int = EXPERTS, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(2, dim=-1)
    return torch.randn(tokens, HIDDEN, generator=generator), index, weights


@pytest.fixture(autouse=True)
def without_gradients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


def converted(block, inputs=None, **options) -> nn.Module:
    prepare(block, FP8Config(**options))
    block(*(routed() if inputs is None else inputs))
    return convert(block)


def rounded(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The values that codes of `x` stand for."""
    return x if scale is None else (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def values_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[E, out, in]` that stacked codes stand for; scales of halves, rows or matrices."""
    return codes.float() * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def oracle(experts: FP8FusedExperts, original: nn.Module, x, index, weights, method: str = "") -> torch.Tensor:
    """Token by token, expert by expert, by the operations of the original class, on values that codes stand for.

    A `method` scales activations by their own range, each token for itself.
    """
    upper, down = (values_of(*pair) for pair in zip(experts.stacks(), experts.stack_scales(), strict=True))
    layout = known_layout(original)
    biased, total = layout.has_bias, torch.zeros_like(x)
    one_operator = CLASSES[type(original)] == "experts"  # which scales what is between by its range alone

    def scale_of(values, static, between=False):
        if not method:
            return static
        if between and one_operator:
            return (values.abs().max() + 1e-8) / 448
        return activation_scale(values.abs().max(), method=method, dynamic=True)

    for token in range(len(x)):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            row = rounded(x[token : token + 1], scale_of(x[token], experts.input_scale))
            bias = experts._parameters[f"{experts.stack_names[0]}_bias"][expert] if biased else None
            product = F.linear(row, upper[expert], bias)
            middle = original._apply_gate(product) if layout.has_gate else original.act_fn(product)
            static = None if experts.intermediate_scale is None else experts.intermediate_scale[expert, 0]
            middle = rounded(middle, scale_of(middle, static, between=True))
            output = F.linear(middle, down[expert], experts.down_proj_bias[expert] if biased else None)
            output = original.post_expert_norm(output) if layout.has_post_expert_norm else output
            total[token] += output[0] * weight
    return total


@pytest.mark.parametrize("method", ["maxabs_hw", CHANNELS])
@pytest.mark.parametrize("activations", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("cls", CLASSES)
def test_computes_what_its_codes_stand_for(cls, activations, method):
    block = Block(cls)
    original = copy.deepcopy(block.experts)
    converted(block, activation_scheme=activations, scale_method=method)
    x, index, weights = routed(seed=2)
    expected = oracle(block.experts, original, x, index, weights, method if activations == "dynamic" else "")
    torch.testing.assert_close(block(x, index, weights), expected, atol=2e-5, rtol=2e-5)
    row = quantization_report(block).quantized[0]
    assert row.type == cls.__name__ and row.activations == activations and row.weight_scale
    assert {operator for operator, _ in block.experts.record.kernels} == {CLASSES[cls]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [MixtralExperts, GptOssExperts])
def test_computes_in_the_dtype_of_its_input(cls, dtype):
    block = converted(Block(cls).to(dtype), [x if x.dtype == torch.int64 else x.to(dtype) for x in routed()])
    x, index, weights = routed(seed=2)
    wanted = block.float()(x.to(dtype).float(), index, weights)
    found = block.to(dtype)(x.to(dtype), index, weights.to(dtype))
    assert found.dtype == dtype and float((found - wanted).norm() / wanted.norm()) < 0.03


@pytest.mark.parametrize("method", sorted(FOR_ANY_SHAPE))
def test_every_scale_method(method):
    rule = SCALE_METHODS[method]
    options = {"scale_method": method, "activation_scheme": "dynamic" if rule.dynamic_only else "static"}
    block = Block(MixtralExperts)
    expected = block(*routed())
    experts = converted(block, **options).experts
    assert (block(*routed()) - expected).norm() / expected.norm() < 0.2 or method in ("unit_scale",)
    pieces = [piece for pieces in experts.pieces() for piece in pieces]
    for (codes, scale), weight in zip(pieces, flat_weights(Block(MixtralExperts).experts), strict=True):
        found, expected_scale, _ = quantized_weight(weight, method=method)
        assert torch.equal(codes.view(torch.uint8), found.view(torch.uint8)) and torch.equal(scale, expected_scale)


def flat_weights(experts: nn.Module) -> list[torch.Tensor]:
    pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
    return [weight for upper, down in pairs for weight in (*upper.chunk(2), down)]


def test_a_refusal_says_why():
    block = Block(MixtralExperts)
    block.experts.forward = lambda *args: args[0]
    wrapped = nn.ModuleList([block, nn.Linear(4, 4)])
    report = quantization_report(convert(wrapped, FP8Config(activation_scheme="weight_only")))
    assert [row.reason for row in report.modules if not row.quantized] == ["its forward was replaced"]


def test_what_is_not_converted_computes_as_before():
    block = nn.ModuleList([Block(MixtralExperts), Block(MixtralExperts)])
    expected = block[0](*routed())
    convert(block, FP8Config(activation_scheme="dynamic", blocklist={"names": ["0.experts"]}))
    assert torch.equal(block[0](*routed()), expected) and isinstance(block[1].experts, FP8FusedExperts)


def test_experts_of_other_processes_contribute_nothing():
    for cls in (MixtralExperts, GptOssExperts):
        block = converted(Block(cls))
        x, index, weights = routed(seed=3)
        without = torch.where(index == 1, 0.0, weights)
        expected = block(x, index, without)
        torch.testing.assert_close(block(x, index.masked_fill(index == 1, EXPERTS), without), expected)


class AnyConfig:
    """A configuration that has small sizes under every name."""

    _experts_implementation = "grouped_mm"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return "silu" if "act" in name else 1.0 if name.startswith(("swiglu", "post_norm")) else 8


def every_class() -> list[type[nn.Module]]:
    """All classes of transformers that say how they compute experts."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        names = re.findall(r"^@use_experts_implementation.*\n(?:@.*\n)?class (\w+)", path.read_text(), re.MULTILINE)
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        found += [getattr(importlib.import_module(module), name) for name in names]
    return found


@pytest.mark.slow
def test_every_class_of_transformers():
    classes = every_class()
    assert len(classes) > 60
    for cls in classes:
        block = Block(cls, AnyConfig())
        upper = block.experts.gate_up_proj if block.experts.has_gate else block.experts.up_proj
        x = torch.randn(TOKENS, upper.shape[1 if block.experts.is_transposed else 2])
        _, index, weights = routed(experts=len(upper))
        expected = block(x, index, weights)
        convert(block, FP8Config(activation_scheme="weight_only"))
        assert isinstance(block.experts, FP8FusedExperts), cls
        found = block(x, index, weights)
        assert (found - expected).norm() / expected.norm() < 0.2, cls


# --- calibration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_ranges_are_those_of_the_model_in_high_precision(cls):
    block = Block(cls)
    original, (x, index, weights) = copy.deepcopy(block.experts), routed()
    prepare(block, FP8Config())
    assert torch.equal(block(x, index, weights), original(x, index, weights))
    found = finalize_calibration(block)
    assert found.range("experts", "input") == x.abs().max()
    layout = known_layout(original)
    upper = getattr(original, layout.upper[0])
    for expert in range(EXPERTS):
        rows = x[(index == expert).any(dim=1)]
        product = rows @ (upper[expert] if layout.transposed else upper[expert].T)
        if layout.has_bias:
            product = product + original.gate_up_proj_bias[expert]
        middle = original._apply_gate(product) if layout.has_gate else original.act_fn(product)
        torch.testing.assert_close(found.range("experts", f"intermediate{expert}"), middle.abs().max())
    assert found.tokens_of_experts()["experts"].tolist() == [int((index == e).sum()) for e in range(EXPERTS)]


@pytest.mark.parametrize("cls", [MixtralExperts, GptOssExperts])
def test_all_experts_are_measured_with_all_tokens(cls):
    block = Block(cls)
    x, index, weights = routed()
    index = torch.zeros_like(index) + torch.tensor([0, 1])
    prepare(block, FP8Config(calibrate_all_experts=True))
    block(x, index, weights)
    found = finalize_calibration(block)
    everywhere = Block(cls)
    prepare(everywhere, FP8Config())
    everywhere(x, torch.arange(EXPERTS).expand(len(x), -1), torch.ones(len(x), EXPERTS))
    wanted = finalize_calibration(everywhere)
    for expert in range(EXPERTS):
        kind = f"intermediate{expert}"
        assert found.range("experts", kind) == wanted.range("experts", kind)
    assert found.tokens_of_experts()["experts"].tolist() == [TOKENS, TOKENS, 0, 0], "of the router, as ever"


def test_an_expert_that_was_never_reached_is_scaled_as_the_largest(caplog):
    block = Block(MixtralExperts)
    x, index, weights = routed()
    converted(block, (x, index.clamp(max=1), weights))
    scales = block.experts.intermediate_scale.flatten()
    assert scales[2] == scales[3] == scales[:2].max() and scales[2] != 1
    assert "experts: 2 of 4 experts were never reached by calibration (2, 3)" in caplog.text


def test_no_expert_was_reached():
    block = nn.ModuleList([Block(MixtralExperts), Block(MixtralExperts)])
    prepare(block, FP8Config())
    block[0](*routed())
    with pytest.raises(FP8MeasurementError, match=r"1\.experts"):
        convert(block)


def test_measurements_of_parts_merge(tmp_path):
    x, index, weights = routed()
    parts = []
    for rows in (slice(0, 4), slice(4, None), slice(None)):
        block = Block(GptOssExperts)
        prepare(block, FP8Config(dump_stats_path=str(tmp_path / "part")))
        block(x[rows], index[rows], weights[rows])
        parts.append(finalize_calibration(block))
    merged = parts[0].merged(parts[1])
    assert {key: float(each.range()) for key, each in merged.tensors.items()} == {
        key: float(each.range()) for key, each in parts[2].tensors.items()
    }


# --- as a module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_goes_back_and_is_copied(cls):
    block = Block(cls)
    original = copy.deepcopy(block.experts)
    converted(block)
    x, index, weights = routed(seed=2)
    expected, codes = block(x, index, weights), [values_of(*pair) for pair in
        zip(block.experts.stacks(), block.experts.stack_scales(), strict=True)]  # fmt: skip
    copied = copy.deepcopy(block)
    assert torch.equal(copied(x, index, weights), expected)
    assert (
        copied.experts.num_experts == EXPERTS
        and getattr(copied.experts, "has_gate", True) == known_layout(original).has_gate
    )
    back = dequantize(block).experts
    assert type(back) is cls and back.state_dict().keys() == original.state_dict().keys()
    for name, values in zip(copied.experts.stack_names, codes, strict=True):
        stored = back._parameters[name].mT if known_layout(original).transposed else back._parameters[name]
        torch.testing.assert_close(stored, values)
    assert (back(x, index, weights) - original(x, index, weights)).abs().max() < 0.5
    assert torch.equal(copied(x, index, weights), expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_goes_there_and_back(cls):
    block, other = converted(Block(cls)), Block(cls)
    for parameter in other.parameters():
        parameter.data *= -0.5
    converted(other)
    state = block.state_dict()
    codes = [tensor for tensor in state.values() if tensor.dtype == torch.float8_e4m3fn]
    assert codes and all(tensor.shape[0] == 1 for tensor in codes)
    inputs = routed(seed=2)
    assert not torch.equal(other(*inputs), block(*inputs))
    other.load_state_dict(state)
    assert torch.equal(other(*inputs), block(*inputs))
    name = next(name for name in state if name.endswith("_scale"))
    with pytest.raises(RuntimeError, match=f"{name}.*zero|{name}"):
        other.load_state_dict(state | {name: torch.zeros_like(state[name])})
    assert torch.equal(other(*inputs), block(*inputs))


def test_casts_leave_codes_and_scales_alone():
    block = converted(Block(GptOssExperts)).to(torch.bfloat16)
    held = block.experts.held()
    assert held["gate_up_proj"].dtype == torch.float8_e4m3fn and held["gate_up_proj_bias"].dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in held.items() if name.endswith("_scale")} == {torch.float32}
    assert dequantize(block).experts.down_proj.dtype == torch.bfloat16


def test_under_autocast_it_gives_the_dtype_it_was_given():
    for cls in (MixtralExperts, GptOssExperts):
        block = converted(Block(cls))
        expected = block(*routed())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = block(*routed())
        assert found.dtype == torch.float32 and (found - expected).norm() / expected.norm() < 0.1


def test_shapes_that_do_not_fit_are_refused():
    block = converted(Block(MixtralExperts))
    x, index, weights = routed()
    with pytest.raises(FP8OperandError, match="experts"):
        block(x[:, :8], index, weights)


# --- Llama 4: called with all tokens once for each expert -----------------------------------------------------------


def sorted_rows(seed: int = 1) -> torch.Tensor:
    """`[experts · tokens, hidden]`, each token's rows zero but for two experts."""
    x, index, weights = routed(seed=seed)
    rows = torch.zeros(EXPERTS, TOKENS, HIDDEN)
    for expert in range(EXPERTS):
        rows[expert] = x * (weights * (index == expert)).sum(dim=1, keepdim=True)
    return rows.flatten(0, 1)


class Sorted(Block):
    def __init__(self):
        super().__init__(Llama4TextExperts)

    def forward(self, rows):
        return self.experts(rows)


def test_experts_that_are_given_sorted_rows():
    block, rows = Sorted(), sorted_rows(seed=2)
    original = copy.deepcopy(block.experts)
    prepare(block, FP8Config(scale_method="maxabs_arbitrary"))
    assert torch.equal(block(sorted_rows()), original(sorted_rows()))
    counts = finalize_calibration(block).tokens_of_experts()["experts"]
    assert torch.equal(counts, sorted_rows().view(EXPERTS, TOKENS, HIDDEN).any(dim=-1).sum(dim=-1))
    convert(block)
    upper, down = (values_of(*pair) for pair in zip(block.experts.stacks(), block.experts.stack_scales(), strict=True))
    expected = torch.zeros_like(rows)
    for expert, place in enumerate(torch.arange(len(rows)).view(EXPERTS, TOKENS)):
        gate, up = (rounded(rows[place], block.experts.input_scale) @ upper[expert].T).chunk(2, dim=-1)
        middle = rounded(F.silu(gate) * up, block.experts.intermediate_scale[expert, 0])
        expected[place] = middle @ down[expert].T
    torch.testing.assert_close(block(rows), expected, atol=2e-5, rtol=2e-5)
    back = dequantize(block).experts
    assert type(back) is Llama4TextExperts and (back(rows) - original(rows)).abs().max() < 0.1


# --- on a Gaudi ---------------------------------------------------------------------------------------------------


def test_on_gaudi_one_operator_computes_a_plain_gate_and_nothing_does_others():
    options = {"target": "gaudi2", "scale_method": "maxabs_hw"}
    for cls in (MixtralExperts, GptOssExperts):
        block = Block(cls).to(torch.bfloat16)
        x, index, weights = routed()
        inputs = (x.bfloat16(), index, weights.bfloat16())
        converted(block, inputs, **options)
        expected = block(*inputs)
        with gaudi.emulated("gaudi2"), ops.backend("hpu"):
            if cls is GptOssExperts:
                with pytest.raises(FP8NotAvailableError, match=r"experts: .*'hpu' has no kernel for 'grouped_linear'"):
                    block(*inputs)
            else:
                torch.testing.assert_close(block(*inputs), expected, atol=0.02, rtol=0.02)
