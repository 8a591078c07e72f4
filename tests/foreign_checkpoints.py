"""FP8 checkpoints as other tools write them, made by hand with torch and safetensors alone, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from optimum_fp8 import FP8CheckpointError, native_config
from optimum_fp8.formats import is_fp8
from optimum_fp8.modules.linear import FP8Linear

FULL_SCALE = 448.0
E4M3 = torch.float8_e4m3fn
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "vocab_size": 96}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
STATIC = 0.02  # of all inputs in these checkpoints
Names = Callable[[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **more)).eval()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))


# --- scales and codes ---------------------------------------------------------------------------------------------


def groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """`[…, n]` as `[…, n / size, size]`."""
    return x.unflatten(-1, (-1, size))


def raised(scale: torch.Tensor) -> torch.Tensor:
    """The smallest powers of two that are not below scales."""
    return 2.0 ** torch.ceil(torch.log2(scale.double())).float()


def scale_of(weight: torch.Tensor, how: str) -> torch.Tensor:
    if how == "tensor":
        largest = weight.abs().amax().reshape(1)
    elif how == "channel":
        largest = weight.abs().amax(dim=1, keepdim=True)
    elif how == "block":
        largest = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax(dim=(1, 3))
    else:
        largest = groups(weight, 32).abs().amax(dim=-1)
    scale = largest / FULL_SCALE
    return raised(scale) if how == "mx" else scale


def spread(scale: torch.Tensor, weight: torch.Tensor, how: str) -> torch.Tensor:
    """A scale as it holds for each value of a weight."""
    if how == "block":
        scale = scale.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    elif how == "mx":
        scale = scale.repeat_interleave(32, dim=1)
    return scale.expand_as(weight)


def coded(weight: torch.Tensor, how: str, dtype: torch.dtype = E4M3) -> dict[str, torch.Tensor]:
    """Codes and scale of a weight, float32."""
    scale = scale_of(weight, how)
    return {"weight": (weight / spread(scale, weight, how)).clamp(-FULL_SCALE, FULL_SCALE).to(dtype), "scale": scale}


def e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two as bytes."""
    return (torch.log2(scale) + 127).to(torch.uint8)


def rounded(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    return (x / scale).clamp(-FULL_SCALE, FULL_SCALE).to(E4M3).float() * scale


def rounded_input(x: torch.Tensor, how: str) -> torch.Tensor:
    """What the input of a layer becomes."""
    if how == "none":
        return x
    if how == "static":
        return rounded(x, torch.tensor(STATIC))
    if how in ("tensor", "token"):
        return rounded(x, (x.abs().amax() if how == "tensor" else x.abs().amax(dim=-1, keepdim=True)) / FULL_SCALE)
    size = 32 if how == "group_32" else 128
    parts = groups(x, size)
    scale = parts.abs().amax(dim=-1, keepdim=True) / FULL_SCALE
    return rounded(parts, scale if how == "group_128" else raised(scale)).flatten(-2)


# --- folders ------------------------------------------------------------------------------------------------------


def is_layer(name: str) -> bool:
    return ".layers." in name and not name.endswith((".gate", "norm"))


def as_stored(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The usual names: `weight`, `weight_scale` and `input_scale`."""
    names = {"weight": "weight", "scale": "weight_scale", "input": "input_scale"}
    return {f"{name}.{names[key]}": tensor for key, tensor in tensors.items()}


def write(
    folder: Path,
    model: Any,
    weights: str,
    inputs: str,
    said: dict[str, Any] | None,
    names: Names = as_stored,
    more: dict[str, torch.Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write a model whose linear layers are in FP8, with `said` as its `quantization_config`."""
    model.float().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".weight") and is_layer(key.removesuffix(".weight"))]:
        made = coded(tensors.pop(key), weights)
        if inputs == "static":
            made["input"] = torch.full((1,), STATIC)
        tensors |= names(key.removesuffix(".weight"), made)
    tensors |= more or {}
    save_file({key: each.contiguous() for key, each in tensors.items()}, folder / "model.safetensors", metadata)
    if said is not None:
        change_config(folder, quantization_config=said)
    return folder


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- what they compute --------------------------------------------------------------------------------------------


def by_hand(model: Any, weights: str, inputs: str) -> torch.Tensor:
    """The logits of a model whose linear layers are dequantized, with their inputs rounded, in float32."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_layer(name):
            made = coded(module.weight.detach(), weights)
            values = made["weight"].float() * spread(made["scale"], made["weight"], weights)
            module.weight = nn.Parameter(values, requires_grad=False)
            module.forward = lambda x, module=module: F.linear(rounded_input(x, inputs), module.weight, module.bias)
    with torch.no_grad():
        return model(ids()).logits


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=native_config(folder, **options)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def check_runs(folder: Path, plain: Any, weights: str, inputs: str, **options: Any) -> Any:
    """A checkpoint runs in FP8 and computes what is computed by hand; what is saved of it computes the same."""
    found, expected = load(folder, **options), by_hand(plain, weights, inputs)
    error = (logits(found) - expected).norm() / expected.norm()
    assert error < 2e-3, float(error)  # roundings of inputs tip over, where sums are added up in another order
    check_no_copy(found)
    again = folder.with_name(f"{folder.name}-again")
    found.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["quant_method"] == "optimum_fp8"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again).eval()), logits(found))
    assert found.generate(ids()[:1, :4], max_new_tokens=2, do_sample=False).shape[1] == 6
    return found


def check_no_copy(model: Any) -> None:
    """Layers in FP8 hold their codes, and nothing else of their size."""
    layers = [module for name, module in model.named_modules() if isinstance(module, FP8Linear)]
    assert layers
    for layer in layers:
        held = [each for each in (*layer._parameters.values(), *layer._buffers.values()) if each is not None]
        sizes = {each.dtype: each.numel() for each in held if each.numel() >= layer.codes.numel()}
        assert list(sizes) == [layer.codes.dtype] and is_fp8(layer.codes.dtype)


def refusal(folder: Path, **options: Any) -> str:
    """The message with which a checkpoint is refused."""
    try:
        load(folder, **options)
    except FP8CheckpointError as error:
        return str(error)
    raise AssertionError("it was loaded")
