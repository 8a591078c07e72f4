"""Scales as parameters of a model's own attention modules: `model.layers.0.self_attn.k_scale`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .base import frozen

_OWNED = "_optimum_fp8_scales"


def set_scales(module: nn.Module, scales: Mapping[str, torch.Tensor], *, as_buffers: bool = False) -> None:
    """Give an attention module the named scales, float32, in place of those it had from here.

    Args:
        as_buffers: for a module whose parameters would be the first of a transformers model: the first parameter's
            dtype is taken for the model's.
    """
    drop_scales(module)
    for name, scale in scales.items():
        if as_buffers:
            module.register_buffer(name, scale.detach().float())
        else:
            module.register_parameter(name, frozen(scale.float()))
    module.__dict__[_OWNED] = tuple(scales)
    # A cast of the model would round them: moving is all that may happen, and nothing unsound may be loaded. This is
    # the one way to say so on a module whose class is the model's.
    module.__dict__["_apply"] = partial(_apply_but_to_scales, module)
    module.__dict__["_load_from_state_dict"] = partial(_load_sound_scales, module)


def names_taken(module: nn.Module, scales: Mapping[str, torch.Tensor]) -> list[str]:
    """Those of the names that a module uses for something else."""
    owned = module.__dict__.get(_OWNED, ())
    return [name for name in scales if name not in owned and hasattr(module, name)]


def drop_scales(module: nn.Module) -> None:
    """Take the scales off again."""
    for name in module.__dict__.pop(_OWNED, ()):
        _holder(module, name).pop(name, None)
    for method in ("_apply", "_load_from_state_dict"):
        module.__dict__.pop(method, None)


def scales_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The scales that attention has on `module`, by name."""
    return {name: _holder(module, name)[name] for name in module.__dict__.get(_OWNED, ())}


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a module keeps a scale."""
    return module._buffers if name in module._buffers else module._parameters


def all_attention_scales(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Every attention module's name, the name of a scale of it, and the scale."""
    for name, module in model.named_modules():
        for key, scale in scales_of(module).items():
            yield name, key, scale


def freeze_scales(module: nn.Module) -> None:
    """After loading, which replaces parameters: no gradient, float32."""
    for name, scale in scales_of(module).items():
        if name in module._parameters:
            module._parameters[name] = frozen(scale.float())


def _apply_but_to_scales(
    module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    holders = {name: _holder(module, name) for name in module.__dict__[_OWNED]}
    scales: dict[str, torch.Tensor] = {name: holder.pop(name) for name, holder in holders.items()}
    try:
        type(module)._apply(module, fn, recurse)
        for name, scale in scales.items():
            applied = fn(scale)
            moved = applied.float() if scale.is_meta else scale.to(applied.device)
            scales[name] = moved.detach() if holders[name] is module._buffers else frozen(moved)
    finally:
        for name, scale in scales.items():
            holders[name][name] = scale
    return module


def _load_sound_scales(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    errors: list[str] = args[-1]
    for name in module.__dict__[_OWNED]:
        scale = state_dict.get(f"{prefix}{name}")
        if scale is not None and not bool((torch.isfinite(scale) & (scale > 0)).all()):
            errors.append(f"{prefix}{name} is {scale.flatten()[:4].tolist()}, expected finite values above 0")
    if not errors:
        type(module)._load_from_state_dict(module, state_dict, prefix, *args)
