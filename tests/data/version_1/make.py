"""Write the fixtures beside this file: checkpoints and measurements of format version 1, and what they compute.

They were written by the code of commit b6d196e, with torch 2.13.0 and transformers 5.24.0, and stay as they are: later
versions have to load them. To write them again, on a checkout of that commit and with the tests of this one:

    PYTHONPATH=CHECKOUT:tests python tests/data/version_1/make.py

Whatever machine computes it, the result is to be the same:

* "linear", "conv" and "sequential" hold small multiples of powers of two, so that every sum in float32 is exact,
  in whatever order it is taken; `check_exact` proves it for each layer.
* A transformer takes roots and exponentials, which differ by an ulp between machines; at the boundary between two FP8
  codes that would decide which one is taken. `is_robust` refuses a model in which noise of ten ulps does so.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from checkpoint.version_1_models import DATA, LinearConfig, LinearModel, load, outputs, sequential
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from optimum_fp8 import FP8Config, convert, finalize_calibration, ops, prepare
from optimum_fp8.modules import FP8Module

Tensors = dict[str, torch.Tensor]


def multiples(shape: torch.Size | tuple[int, ...], largest: int, step: float, generator: torch.Generator) -> Any:
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator) * step


def make_exact(model: Any, generator: torch.Generator) -> Any:
    """Weights that FP8 has to round, biases, and batch norms that divide by one."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(multiples(module.weight.shape, 31, 2.0**-5, generator))
            elif isinstance(module, nn.Conv2d):  # fewer bits, because more products are added up
                module.weight.copy_(multiples(module.weight.shape, 17, 2.0**-5, generator))
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.5)
                module.running_mean.zero_()
                module.running_var.fill_(1 - module.eps)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(multiples(module.bias.shape, 8, 2.0**-4, generator))
    return model.eval()


def linear(generator: torch.Generator) -> tuple[Any, Tensors]:
    model = make_exact(LinearModel(LinearConfig()), generator)
    model.head.weight.data.mul_(8).round_().div_(8)
    return model, {"x": multiples((2, 3, 16), 31, 2.0**-3, generator)}


def conv(generator: torch.Generator) -> tuple[Any, Tensors]:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_channels=3, num_labels=4
    )
    model = make_exact(ResNetForImageClassification(config), generator)
    return model, {"pixel_values": multiples((2, 3, 16, 16), 9, 2.0**-3, generator)}


def plain(generator: torch.Generator) -> tuple[Any, Tensors]:
    return make_exact(sequential(), generator), {"x": multiples((2, 2, 4, 4), 63, 2.0**-4, generator)}


def tokens(model: Any, generator: torch.Generator) -> tuple[Any, Tensors]:
    """Weights large enough that it matters what is attended to; two rows of tokens, one of them padded on the left."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                width = 1.0 if "wte" in name or "embed" in name else 1.5 * min(parameter.shape) ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    return model.eval(), {"input_ids": torch.randint(3, 32, (2, 6), generator=generator), "attention_mask": mask}


def llama(generator: torch.Generator) -> tuple[Any, Tensors]:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tokens(LlamaForCausalLM(config), generator)


def gpt2(generator: torch.Generator) -> tuple[Any, Tensors]:
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return tokens(GPT2LMHeadModel(config), generator)


MAKERS: dict[str, Callable[[torch.Generator], tuple[Any, Tensors]]] = {
    "linear": linear,
    "conv": conv,
    "llama": llama,
    "gpt2": gpt2,
    "sequential": plain,
}
STATIC: dict[str, Any] = {"activation_scheme": "static", "target": "cpu"}
DYNAMIC: dict[str, Any] = {"activation_scheme": "dynamic", "target": "cpu"}
ATTENTION: dict[str, Any] = {"attention": True, "kv_cache": True, "decode_steps": 2}
PER_CHANNEL = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
CASES: dict[str, dict[str, Any]] = {
    "linear_static": STATIC,
    "linear_dynamic": DYNAMIC,
    "linear_per_token": DYNAMIC | {"scale_method": "maxabs_pcs_pow2"},
    "linear_weight_only": {"activation_scheme": "weight_only", "target": "cpu", "scale_method": PER_CHANNEL},
    "linear_gaudi2": STATIC | {"target": "gaudi2"},
    "linear_e5m2": STATIC | {"fp8_config": "E5M2"},
    "linear_measured": STATIC,
    "conv_static": STATIC,
    "conv_per_channel_gaudi3": STATIC | {"target": "gaudi3", "scale_method": "act_maxabs_hw_weights_pcs_maxabs_pow2"},
    "conv_measured": STATIC,
    "llama_static": STATIC | ATTENTION,
    "llama_dynamic": DYNAMIC | ATTENTION,
    "llama_per_head": STATIC | ATTENTION | {"attention_granularity": "head"},
    "llama_gaudi2_unfused": STATIC | ATTENTION | {"target": "gaudi2", "attention_dataflow": "unfused"},
    "llama_cache_only": {"activation_scheme": "weight_only", "target": "cpu", "kv_cache": True},
    "llama_measured": STATIC | ATTENTION | {"attention_granularity": "head", "scale_method": "maxabs_arbitrary"},
    "gpt2_static": STATIC | ATTENTION,
    "sequential": STATIC | {"scale_method": PER_CHANNEL},
}
SEEDS = 200  # tried until one gives a model that is robust


def granularity(x: torch.Tensor) -> float:
    """The largest power of two that divides all values."""
    whole = x.double() * 2.0**40
    assert torch.equal(whole, whole.round()) and whole.abs().max() < 2.0**62
    bits = whole.long()[whole != 0]
    return float((bits & -bits).min()) * 2.0**-40


def check_exact(model: Any, inputs: Tensors) -> None:
    """Refuse a model in which a float32 sum of products could round, taken in any order."""

    def check(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        x, weight, origin = args[0], module.weight, module
        if isinstance(module, FP8Module):
            origin, fmt, scale = module.origin, module.recipe.fmt, module.input_scale
            weight = ops.cast_from_fp8(weight, module.weight_scale, torch.float32)
            if scale is not None:
                x = ops.cast_from_fp8(ops.cast_to_fp8(x, scale, fmt.dtype, fmt.full_scale), scale, x.dtype)
            for known in (module.weight_scale, *([] if scale is None else [scale])):
                assert torch.equal(known.log2(), known.log2().round()), f"{known} is no power of two"
        step = granularity(x) * granularity(weight)
        x = x.abs() * 1.125  # dynamic activations may be rounded upwards yet, to multiples of a larger step
        if isinstance(origin, nn.Conv2d):
            largest = F.conv2d(x, weight.abs(), None, origin.stride, origin.padding, origin.dilation, origin.groups)
        else:
            largest = F.linear(x, weight.abs())
        if module.bias is not None:
            largest, step = largest + module.bias.abs().max(), min(step, granularity(module.bias))
        assert largest.max() < 2.0**24 * step, f"sums up to {largest.max():g} of multiples of {step:g}"

    layers = [module for module in model.modules() if isinstance(module, (FP8Module, nn.Linear, nn.Conv2d))]
    hooks = [module.register_forward_pre_hook(check) for module in layers]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()


def is_close(found: Tensors, expected: Tensors, tolerance: float) -> bool:
    """Whether all differences are at most `tolerance` of the largest value."""
    return all((found[key] - value).abs().max() <= tolerance * value.abs().max() for key, value in expected.items())


class Noise(TorchFunctionMode):
    """What machines compute differently, in float32, is off by about ten ulps.

    Products of few FP8 codes are left alone: they are exact, and often lie in the middle of two codes.
    """

    INEXACT = ("linear", "softmax", "silu", "tanh", "rsqrt", "mean", "layer_norm", "cos", "sin", "pow")

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") not in self.INEXACT or result.dtype != torch.float32:
            return result
        return result * (1 + 1e-6 * torch.randn(result.shape, generator=self.generator))


def is_robust(model: Any, inputs: Tensors, expected: Tensors) -> bool:
    """Whether noise leaves the FP8 codes, and so nearly the logits, alone."""
    with Noise():
        return all(is_close(outputs(model, inputs), expected, 1e-4) for _ in range(20))


def quantized(name: str, original: Any, inputs: Tensors) -> Any:
    """The model of a fixture in FP8; where its ranges are to be stored they are, with the original model."""
    folder, model, config = DATA / name, copy.deepcopy(original), FP8Config(**CASES[name])
    if name.endswith("_measured"):
        original.save_pretrained(folder)
        model = load(name, folder)
        (folder / "fp8_config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        config.dump_stats_path = str(folder / "ranges")
    if config.scheme != "static":
        return convert(model, config)
    prepare(model, config)
    outputs(model, inputs)
    if name.endswith("_measured"):
        finalize_calibration(model)
    return convert(model)


def write(name: str, seed: int) -> bool:
    """Write one fixture; False if what this seed gives may not be the same everywhere."""
    kind, folder = name.split("_")[0], DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    original, inputs = MAKERS[kind](torch.Generator().manual_seed(seed))
    model = quantized(name, original, inputs)
    expected = outputs(model, inputs)
    if kind not in ("llama", "gpt2"):
        check_exact(model, inputs)
    elif not is_robust(model, inputs, expected):
        return False
    if kind == "sequential":
        save_file(model.state_dict(), folder / "model.safetensors")
    elif not name.endswith("_measured"):
        model.save_pretrained(folder)
    save_file(inputs, folder / "inputs.safetensors")
    save_file(expected, folder / "expected.safetensors")
    return True


def main() -> None:
    logging.getLogger("optimum_fp8").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in CASES:
        torch.manual_seed(0)
        with ops.backend("reference"):
            seed = next((seed for seed in range(SEEDS) if write(name, seed)), None)
        if seed is None:
            raise SystemExit(f"{name}: none of {SEEDS} seeds gives a robust model")
        size = sum(path.stat().st_size for path in (DATA / name).iterdir())
        print(f"{name:28} seed {seed:3} {size / 1000:6.1f} kB", flush=True)


if __name__ == "__main__":
    main()
