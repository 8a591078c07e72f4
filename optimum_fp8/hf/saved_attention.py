"""Attention of models that transformers loads: whose implementation is whose choice, and scales from a checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from .. import ops
from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..formats import number_format
from ..modules.attention import NAME
from ..modules.attention_scales import all_attention_scales, freeze_scales, scales_of, set_scales
from ..modules.recipe import attention_recipe_for
from ..quantize_attention import selected_attention, start_attention, use_implementation
from ..selection import Decision
from ..selection_attention import (
    FUSED,
    INTERFACE,
    PRODUCT,
    SOFTMAX,
    STORAGE,
    attention_kind,
    attention_modules,
    select_attention,
    telling_the_dtype,
)
from ..state import FP8State

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALE_KEY = re.compile(r"(.+)\.((?:[qkpv]\d*|input|output|[kv]_cache)_scale)$")


def chosen_implementations(config: Any) -> dict[str, str]:
    """The attention implementations a user asked for, by sub-configuration ("": the whole).

    Before a model is made, transformers has not filled in its own choice yet.
    """
    parts = {"": config} | {key: getattr(config, key, None) for key in getattr(config, "sub_configs", ())}
    found = {key: getattr(part, "_attn_implementation_internal", None) for key, part in parts.items()}
    return {key: name for key, name in found.items() if name not in (None, NAME)}


def _choice_for(module: nn.Module, model: Any, chosen: dict[str, str]) -> str | None:
    """The implementation a user chose for an attention module, None where it is ours to choose."""
    config = getattr(module, "config", None)
    parts = {id(getattr(model.config, key, None)): name for key, name in chosen.items() if key}
    choice = parts.get(id(config), chosen.get(""))
    return choice if attention_kind(module) == INTERFACE else None


def select_loaded_attention(
    model: Any, config: FP8Config, chosen: dict[str, str], layers: list[Decision]
) -> list[Decision]:
    """Decide about the attention modules of a model whose user chose some implementations."""
    decisions = []
    for decision in select_attention(model, config, layers):
        choice = _choice_for(model.get_submodule(decision.name), model, chosen)
        if decision.selected and choice is not None:
            decision = Decision(decision.name, decision.type, False, f"attn_implementation={choice!r} was chosen")
        decisions.append(decision)
    return decisions


def declare_saved_attention(
    model: PreTrainedModel, config: FP8Config, files: list[str] | None, chosen: dict[str, str]
) -> list[Decision]:
    """Decide about attention as a checkpoint does, and declare its scales, for transformers to fill in."""
    if not config.wants_attention:
        return []
    prefix, exceptions = f"{model.base_model_prefix}.", config.modules_to_not_convert or []
    saved = _saved_scales(files)
    decisions, found = [], attention_modules(model)
    first = telling_the_dtype(model, found.values())
    for name, module in found.items():
        aliases = [name, name.removeprefix(prefix), f"{prefix}{name}"]
        reason = "not FP8 in the checkpoint" if any(alias in exceptions for alias in aliases) else "selected"
        choice = _choice_for(module, model, chosen)
        if reason == "selected" and choice is not None:
            reason = f"attn_implementation={choice!r} was chosen"
        decisions.append(Decision(name, type(module).__name__, reason == "selected", reason))
        shapes = _expected(module, config) | _scales_for(aliases, saved)
        _check_shapes(name, shapes)
        if reason != "not FP8 in the checkpoint":
            nan = {key: torch.full(shape, torch.nan, device="meta") for key, shape in shapes.items()}
            set_scales(module, nan, as_buffers=module in first)
    return decisions


def finish_saved_attention(model: Any, state: FP8State) -> None:
    """Let the attention of a loaded checkpoint compute as it says."""
    for module in model.modules():
        if scales_of(module):
            freeze_scales(module)
    start_attention(selected_attention(model, state), attention_recipe_for(state.config), state.config.kv_cache)
    use_implementation(model, state)


def fit_attention_to_target(model: nn.Module, config: FP8Config, made_for: str) -> None:
    """For a target of a smaller range double the scales: what is rounded at run time reaches as far as before."""
    if config.number_format.full_scale >= number_format(config.fp8_config, made_for).full_scale:
        return
    for _, _, scale in all_attention_scales(model):
        scale.data = ops.cast_from_fp8(scale.data, torch.full((1,), 2.0, device=scale.device), torch.float32)


def _expected(module: nn.Module, config: FP8Config) -> dict[str, tuple[int, ...]]:
    """Scales that a module's operators cannot do without, with the shape they have per tensor."""
    static, kind = config.scheme == "static", attention_kind(module)
    names: list[str] = []
    if config.attention and kind in (INTERFACE, FUSED, SOFTMAX):
        names = ["p_scale"]
    if config.attention and static and kind in (INTERFACE, FUSED):
        fused = config.attention_dataflow == "fused" and not config.use_qdq
        names += ["q_scale", "k_scale", "v_scale", *(["output_scale"] if fused else [])]
    elif config.attention and static and kind == PRODUCT:
        names = ["q_scale", "k_scale"]
    elif config.kv_cache and static and kind == INTERFACE:
        names = ["k_scale", "v_scale"]
    elif config.kv_cache and kind == STORAGE:
        names = ["input_scale"]
    return dict.fromkeys(names, (1,))


def _saved_scales(files: list[str] | None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the attention scales in safetensors files, by module and name."""
    saved: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in files or ():
        if not str(path).endswith(".safetensors"):
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if match := _SCALE_KEY.match(key):
                    saved.setdefault(match[1], {})[match[2]] = tuple(file.get_slice(key).get_shape())
    return saved


def _check_shapes(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse scales that are neither per tensor nor per head.

    Raises:
        FP8CheckpointError: names the scale.
    """
    for key, shape in shapes.items():
        if shape != (1,) and shape[1:] != (1, 1):
            raise FP8CheckpointError(
                f"{name}.{key} has shape {shape} in the checkpoint, expected (1,) or (heads, 1, 1): it was not saved so"
            )


def _scales_for(aliases: list[str], saved: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The scales of a module in a checkpoint, where transformers may have renamed the models around it."""
    for alias in aliases:
        if alias in saved:
            return saved[alias]
    parts = aliases[0].split(".")
    for depth in range(1, len(parts)):
        suffix = ".".join(parts[depth:])
        if not any(part.isdigit() for part in parts[depth:]):
            break
        found = [name for name in saved if name.endswith(f".{suffix}") or name == suffix]
        if len(found) == 1:
            return saved[found[0]]
    return {}
