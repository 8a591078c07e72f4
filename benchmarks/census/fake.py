"""Quantization computed another way: the eager model in high precision with dequantized weights and rounded inputs.

It shares no code with the package: codes and scales are read from the state dict of the quantized model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

_AFTER_VALUE = ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
FULL_SCALE = 448.0  # of float8_e4m3fn


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x, rounded to the FP8 values with that scale, in its own dtype."""
    codes = (x.float() / scale.float()).clamp(-FULL_SCALE, FULL_SCALE).to(torch.float8_e4m3fn)
    return (codes.float() * scale.float()).to(x.dtype)


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values of codes `[out, in, …]` or `[E, out, in]`, with a scale of as many axes, or of one value."""
    return codes.float() * scale.float()


@torch.no_grad()
def quantize_in_place(model: nn.Module, state: dict[str, torch.Tensor], *, round_inputs: bool = True) -> list[str]:
    """Give a model the weights of an FP8 state dict and round what goes into the modules that have any.

    Args:
        model: in high precision.
        state: of the quantized model.
        round_inputs: False: weights alone.

    Returns:
        the names of the weights that were replaced.
    """
    done = []
    if not round_inputs:
        state = {name: each for name, each in state.items() if not name.endswith(("input_scale", "intermediate_scale"))}
    for name, module in list(model.named_modules()):
        stacks = [key for key in ("gate_up_proj", "up_proj", "down_proj") if _is_codes(state.get(f"{name}.{key}"))]
        if _is_codes(state.get(f"{name}.weight")):
            _replace(module, "weight", state[f"{name}.weight"], state[f"{name}.weight_scale"])
            _round_inputs(module, state.get(f"{name}.input_scale"))
            done.append(f"{name}.weight")
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            done += _replace_named(name, module, state)
        elif stacks:
            for key in stacks:
                _replace(module, key, state[f"{name}.{key}"], state[f"{name}.{key}_scale"])
                done.append(f"{name}.{key}")
            _round_inputs(module, state.get(f"{name}.input_scale"))
            if hasattr(module, "is_transposed"):
                _round_between(module, state.get(f"{name}.intermediate_scale"))
    return done


def _replace_named(name: str, module: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Replace the weights that torch's modules of several have, and round what attention's are multiplied with."""
    keys = [key for key in module._parameters if _is_codes(state.get(f"{name}.{key}"))]
    for key in keys:
        codes = state[f"{name}.{key}"]
        _replace(module, key, codes[0] if codes.ndim == 3 else codes, state[f"{name}.{key}_scale"])
    scales = [state.get(f"{name}.input_{part}scale") for part in ("", "key_", "value_")]

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for part, scale in zip(("query", "key", "value"), scales, strict=True):
            given[part] = given[part] if scale is None else rounded(given[part], scale)
        return (), given | dict(zip(_AFTER_VALUE, args[3:], strict=False))

    if isinstance(module, nn.MultiheadAttention) and any(scale is not None for scale in scales):
        module.register_forward_pre_hook(before, with_kwargs=True)
    return [f"{name}.{key}" for key in keys]


def _is_codes(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float8_e4m3fn


def _replace(module: Any, key: str, codes: torch.Tensor, scale: torch.Tensor) -> None:
    if key not in module._parameters:  # weight normalization, in one of the two ways that torch has
        with torch.enable_grad():  # without gradients torch leaves a plain tensor behind
            remove_parametrizations(module, key) if is_parametrized(module, key) else remove_weight_norm(module, key)
    parameter = module._parameters[key].data
    if key != "weight" and len(codes) < len(parameter):
        parameter = parameter[: len(codes)]  # the rest has no expert
    codes = codes[0] if codes.ndim == parameter.ndim + 1 else codes  # stored with a leading axis
    if parameter.ndim == 3 and scale.ndim == 3 and scale.shape[1] not in (1, codes.shape[1]):
        scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)  # one of each half
    values = dequantized(codes, scale)
    if getattr(module, "transposed", False):  # torch keeps `[in, out / groups, k…]` of a transposed convolution
        groups = values.reshape(module.groups, -1, *values.shape[1:])
        values = torch.cat([each.transpose(0, 1) for each in groups])
    stored_in_out = type(module).__name__ == "Conv1D" or getattr(module, "is_transposed", False)
    if stored_in_out or values.shape != parameter.shape:
        values = values.transpose(-1, -2)
    parameter.copy_(values.to(parameter.dtype))


def _round_inputs(module: nn.Module, scale: torch.Tensor | None) -> None:
    if scale is not None:
        module.register_forward_pre_hook(lambda _, args, kwargs: _first_rounded(args, kwargs, scale), with_kwargs=True)


def _first_rounded(args: tuple[Any, ...], kwargs: dict[str, Any], scale: torch.Tensor) -> tuple[Any, Any]:
    if args:
        return (rounded(args[0], scale), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: rounded(kwargs[name], scale)}


def _round_between(module: Any, scale: torch.Tensor | None) -> None:
    """Compute a mixture expert by expert, with rounding of what goes into the last product."""

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(module.down_proj.shape[0]):
            token, place = torch.where(top_k_index == expert)
            if not len(token):
                continue
            upper = "gate_up_proj" if module.has_gate else "up_proj"
            middle = _product(module, upper, expert, hidden_states[token])
            middle = module._apply_gate(middle) if module.has_gate else module.act_fn(middle)
            middle = middle if scale is None else rounded(middle, scale[expert].reshape(1))
            found = _product(module, "down_proj", expert, middle)
            if getattr(module, "has_post_expert_norm", False):
                found = module.post_expert_norm(found)
            result.index_add_(0, token, (found * top_k_weights[token, place, None]).to(result.dtype))
        return result

    module.forward = forward


def _product(module: Any, key: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = module._parameters[key][expert]
    bias = module._parameters[f"{key}_bias"][expert] if getattr(module, "has_bias", False) else None
    return F.linear(x, weight.t() if module.is_transposed else weight, bias)
