"""Every kind of layer by every scale method: what the ordinary path of a CPU computes for a Gaudi is what Gaudi's
kernels compute on an emulated one."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed_layers as deepspeed
import pytest
import torch
import vllm_layers as vllm
from grids import over, slow_but
from on_gaudi import NothingIsRead, as_on_a_card, assert_near, before_bias, same_bytes
from scale_methods import FOR_ANY_SHAPE
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.voxtral_realtime.modeling_voxtral_realtime import VoxtralRealtimeCausalConv1d
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import FP8Config, convert, finalize_calibration, ops, prepare
from optimum_fp8.modules import LayerHandler
from optimum_fp8.modules import handler as registry
from optimum_fp8.modules.embedding import EmbeddingHandler
from optimum_fp8.scales import inf_as_nan
from optimum_fp8.test_utils import gaudi

IN, OUT, TOKENS = 40, 24, 6
TARGETS, FORMATS = ["gaudi2", "gaudi3"], ["E4M3", "E5M2"]


class LoRACompatibleLinear(nn.Linear):
    lora_layer = None


class LoRACompatibleConv(nn.Conv2d):
    lora_layer = None


class Head(nn.Module):
    """A head of vLLM's, called as its logits processor does."""

    def __init__(self):
        super().__init__()
        self.lm_head = vllm.ParallelLMHead(torch.randn(OUT, IN))

    def forward(self, x):
        return vllm.LogitsProcessor()(self.lm_head, x)


def layers() -> nn.ModuleDict:
    """Each kind that torch and transformers have, in bfloat16."""
    torch.manual_seed(1)
    made: dict[str, nn.Module] = {
        "linear": nn.Linear(IN, OUT),
        "linear without bias": nn.Linear(IN, 7, bias=False),
        "transposed linear": Conv1D(OUT, IN),
        "conv1d": nn.Conv1d(IN, OUT, 3, padding=1),
        "conv2d": nn.Conv2d(8, OUT, 3, stride=2, padding=1),
        "conv2d in groups": nn.Conv2d(8, OUT, (1, 3), groups=4, dilation=2, padding_mode="reflect", padding=2),
        "conv3d": nn.Conv3d(4, OUT, 3, padding=1),
        "conv transposed in groups": nn.ConvTranspose1d(8, OUT, 4, stride=2, groups=2),
        "conv standardized": WeightStandardizedConv2d(8, OUT, 3, padding=1),
        "linear with a forward of its own": FalconLinear(IN, OUT),
        "conv1d with a forward of its own": VoxtralRealtimeCausalConv1d(IN, OUT, 3, "key"),
        "linear in groups": DeepseekV4GroupedLinear(IN, OUT, 3),
    }
    return nn.ModuleDict(made).bfloat16().requires_grad_(False)


def layers_of_libraries() -> nn.ModuleDict:
    """Each kind that other libraries have; their products are taken by the same operators."""
    torch.manual_seed(1)
    plain, weight, bias = nn.Linear(IN, OUT), torch.randn(OUT, IN) * 0.3, torch.randn(OUT)
    made: dict[str, nn.Module] = {
        "LoRA linear": LoRACompatibleLinear(IN, OUT),
        "vLLM replicated": vllm.ReplicatedLinear(weight, bias, return_bias=False),
        "vLLM columns": vllm.MergedColumnParallelLinear(weight, [OUT // 2] * 2, return_bias=False),
        "vLLM rows": vllm.RowParallelLinear(weight, bias, return_bias=False),
        "vLLM head": Head(),
        "DeepSpeed columns": deepspeed.LinearLayer(copy.deepcopy(plain), None),
        "DeepSpeed rows": deepspeed.LinearAllreduce(copy.deepcopy(plain), None),
        "DeepSpeed scoped rows": deepspeed.ScopedLinearAllReduce(deepspeed.LinearAllreduce(plain, None)),
        "DeepSpeed head": deepspeed.LmHeadLinearAllreduce(nn.Linear(IN, OUT, bias=False), None),
        "LoRA conv": LoRACompatibleConv(8, OUT, 2, bias=False),
    }
    return nn.ModuleDict(made).bfloat16().requires_grad_(False)


def input_of(name: str, seed: int, outliers: float) -> torch.Tensor:
    """Values of all sizes, a few of them far larger."""
    shape = {"conv1d": (2, IN, 9), "conv2d": (2, 8, 7, 9), "conv2d in groups": (2, 8, 7, 9), "LoRA conv": (8, 5, 6)}
    shape |= {"conv3d": (2, 4, 3, 4, 5), "conv transposed in groups": (2, 8, 5), "conv standardized": (2, 8, 5, 6)}
    made = torch.Generator().manual_seed(seed)
    shape |= {"conv1d with a forward of its own": (2, IN, 9), "linear in groups": (2, TOKENS // 2, 3, IN)}
    x = torch.randn(shape.get(name, (2, TOKENS // 2, IN)), generator=made)
    return torch.where(torch.rand(x.shape, generator=made) < 0.02, x * outliers, x).bfloat16()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The layers are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranges(tmp_path_factory):
    """Where the measurements of layers lie, by the function that makes them."""
    paths = {make: tmp_path_factory.mktemp("ranges") / "measured" for make in (layers, layers_of_libraries)}
    for make, path in paths.items():
        model = prepare(make(), FP8Config(dump_stats_path=path))
        for seed in range(3):
            for name, layer in model.items():
                layer(input_of(name, seed, 3.0))
        finalize_calibration(model)
    return paths


def ways() -> list[tuple[str, str]]:
    """Every method with every way to scale activations; where they are not rounded, one method of each weight's."""
    found, rules = [], set()
    for name, method in FOR_ANY_SHAPE.items():
        found += [] if method.dynamic_only else [(name, "static")]
        found += [(name, "dynamic")] if method.activation.needs_range else []
        found += [] if method.weight in rules else [(name, "weight_only")]
        rules.add(method.weight)
    return found


def quantized(make, ranges, target, fp8_config, way):
    method, scheme = way
    keys = {"scale_method": method, "activation_scheme": scheme, "fp8_config": fp8_config, "target": target}
    return convert(make(), FP8Config(mode="QUANTIZE", dump_stats_path=ranges[make], quantize_lm_head=True, **keys))


def fp8_layer(layer: nn.Module) -> Any:
    return getattr(layer, "lm_head", layer)


def rounded(layer: Any, x: torch.Tensor) -> tuple[Any, Any]:
    """The scale and the codes of an input; None where it is not rounded."""
    scale, fmt = layer.activation_scale(x), layer.scheme.fmt
    if scale is None:
        return None, None
    x = inf_as_nan(x) if layer.scheme.is_dynamic else x
    return scale, ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale)


def left_to_the_reference(name: str, weight_only: bool) -> bool:
    """No operator of Gaudi's multiplies FP8 with bfloat16, convolves in three dimensions or spreads its input."""
    return "conv" in name and (weight_only or "3d" in name or "transposed" in name)


def assert_predicted(plain: nn.ModuleDict, packed: nn.ModuleDict, weight_only: bool) -> None:
    """Codes and scales are equal, outputs within one step of bfloat16 (of the product, where a bias is added).

    Args:
        plain: layers converted for a Gaudi on a CPU.
        packed: the same, converted on an emulated card, which is still there.
        weight_only: whether their inputs are not rounded.
    """
    for name, layer in plain.items():
        on_cpu, on_card, x = fp8_layer(layer), fp8_layer(packed[name]), input_of(name, 7, 40.0)
        for tensor in ("codes", "weight_scale", "input_scale"):
            assert same_bytes(getattr(on_card, tensor), getattr(on_cpu, tensor)), (name, tensor)
        layer(x)  # the next call takes the short way that the first has prepared
        scale, codes, expected = *rounded(on_cpu, x), layer(x)
        with as_on_a_card():
            found_scale, found_codes, found = *rounded(on_card, x), packed[name](x)
        assert same_bytes(found_scale, scale) and same_bytes(found_codes, codes), name
        bias = None if name == "DeepSpeed scoped rows" else on_cpu.bias  # which its model adds
        assert_near(found, expected, 16, before_bias(expected, on_cpu.codes, bias))
        left = left_to_the_reference(name, weight_only)
        assert {backend for _, backend in on_card.record.kernels} == {"reference" if left else "hpu"}


def test_every_kind_of_layer_is_there(ranges):
    layers_of_the_package = [handler for handler in registry.handlers() if isinstance(handler, LayerHandler)]
    # Tables multiply nothing: test_embedding.py has them.
    kinds = {each.kind for each in layers_of_the_package if not isinstance(each, EmbeddingHandler)}
    found = set()
    for make in ranges:
        model = quantized(make, ranges, "gaudi2", "E4M3", ("maxabs_hw", "static"))
        modules = registry.converted_modules(model)
        assert len(modules) == len(model)
        found |= {handler.kind for _, handler in modules.values()}
    assert found == kinds
    assert {method for method, _ in ways()} == set(FOR_ANY_SHAPE) and len(ways()) > 26


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fp8_config", slow_but(FORMATS, "E4M3"))
@over(way=ways())
def test_layers(ranges, target, fp8_config, way):
    plain = quantized(layers, ranges, target, fp8_config, way)
    with gaudi.emulated(target):
        with ops.backend("hpu"):
            packed = quantized(layers, ranges, target, fp8_config, way)
        assert_predicted(plain, packed, way[1] == "weight_only")


@pytest.mark.parametrize("target", TARGETS)
@over(
    way=[("maxabs_hw", "static"), ("maxabs_arbitrary", "static"), ("maxabs_pcs_pow2", "dynamic")]
    + [("act_maxabs_pow2_weights_pcs_maxabs_pow2", "weight_only")]
)
def test_layers_of_libraries(ranges, target, way):
    plain = quantized(layers_of_libraries, ranges, target, "E4M3", way)
    with gaudi.emulated(target):
        with ops.backend("hpu"):
            packed = quantized(layers_of_libraries, ranges, target, "E4M3", way)
        assert_predicted(plain, packed, way[1] == "weight_only")


@pytest.mark.parametrize("make", [layers, layers_of_libraries])
@over(way=[("maxabs_hw", "static"), ("maxabs_pcs_pow2", "dynamic"), ("maxabs_hw", "weight_only")])
def test_no_value_is_read(ranges, make, way):
    """In a forward pass on a card: in the first, which prepares the next, and in that."""
    with gaudi.emulated("gaudi2"):
        with ops.backend("hpu"):
            model = quantized(make, ranges, "gaudi2", "E4M3", way)
        for name, layer in model.items():
            with as_on_a_card(), NothingIsRead():
                outputs = [layer(input_of(name, 7, 40.0)) for _ in range(2)]
            assert torch.equal(*outputs), name
            left = left_to_the_reference(name, way[1] == "weight_only")
            assert {backend for _, backend in fp8_layer(layer).record.kernels} == {"reference" if left else "hpu"}
