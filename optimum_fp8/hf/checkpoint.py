"""Our own checkpoints: `X.weight` `[1, out, in]` in FP8, `X.weight_scale`, and `X.input_scale` where it is static;
attention modules have `Y.q_scale`, `Y.k_scale`, `Y.v_scale`, `Y.p_scale` and `Y.output_scale`.

The leading dimension of one makes transformers without this plugin refuse the checkpoint: it tolerates unknown names,
dtypes and missing scales with a warning, and would compute garbage, but it never loads a weight of a wrong shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from .. import ops
from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8StateError
from ..formats import number_format
from ..modules import fp8_modules, frozen
from ..modules.attention_scales import all_attention_scales
from ..selection import Decision, candidates, default_skips
from ..state import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOADING_KEYS = ("target", "dequantize", "mode")


def honour_request(config: FP8Config) -> str:
    """Apply what was asked for by a `quantization_config` passed to load an FP8 checkpoint, or refuse it.

    Returns:
        the target the checkpoint was made for.

    Raises:
        FP8CheckpointError: a key that would need the original weights or new calibration.
    """
    requested: dict[str, Any] = config.__dict__.pop("_requested", {})
    if requested.get("dataset") is not None:
        raise FP8CheckpointError(
            "a dataset was given, but this checkpoint is quantized already and cannot be calibrated again: leave it "
            "out, or quantize the original model with it"
        )
    for key, value in requested.items():
        if key in _LOADING_KEYS or value == getattr(config, key):
            continue
        raise FP8CheckpointError(
            f"{key}={value!r} was asked for, but the checkpoint was quantized with {getattr(config, key)!r}: only "
            "target and dequantize can be chosen when loading; quantize the original model again for the rest"
        )
    if requested.get("mode", "AUTO") not in ("AUTO", "LOAD"):
        raise FP8CheckpointError(f"mode={requested['mode']!r}: this checkpoint is FP8 already; use mode='AUTO'")
    config.dequantize = requested.get("dequantize", config.dequantize)
    made_for = config.resolved_target
    if requested.get("target", "auto") != "auto":
        config.target = requested["target"]
    return made_for


def saved_decisions(model: PreTrainedModel, config: FP8Config, checkpoint_files: list[str] | None) -> list[Decision]:
    """Which modules are FP8 in a checkpoint: all candidates but those its configuration lists.

    Heads the checkpoint does not have (a classifier put on a saved base model) stay in high precision.
    """
    exceptions, prefix = config.modules_to_not_convert or [], f"{model.base_model_prefix}."
    heads, keys = default_skips(model), _checkpoint_keys(checkpoint_files)
    decisions = []
    for name, module in candidates(model).items():
        aliases = {name, name.removeprefix(prefix), f"{prefix}{name}"}
        excepted = any(alias in exceptions for alias in aliases)
        absent = name in heads and keys is not None and not any(f"{alias}.weight_scale" in keys for alias in aliases)
        reason = "not FP8 in the checkpoint" if excepted or absent else "selected"
        decisions.append(Decision(name, type(module).__name__, reason == "selected", reason))
    return decisions


def _checkpoint_keys(checkpoint_files: list[str] | None) -> set[str] | None:
    """Names of all tensors in the safetensors files, None where there are no such files."""
    if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
        return None
    keys: set[str] = set()
    for path in checkpoint_files:
        with safe_open(path, framework="pt") as file:
            keys.update(file.keys())
    return keys


def check_complete(model: PreTrainedModel, missing_keys: set[str] | None) -> None:
    """Refuse a checkpoint that lacks a tensor of an FP8 module: it would be left as uninitialized memory.

    Raises:
        FP8CheckpointError: names the tensors.
    """
    needed = {
        f"{name}.{parameter}"
        for name, module in fp8_modules(model).items()
        for parameter, _ in module.named_parameters()
    } | {f"{name}.{key}" for name, key, _ in all_attention_scales(model)}
    missing = sorted(needed if missing_keys is None else needed & missing_keys)
    if missing:
        raise FP8CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of modules in FP8 ({', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''}): it is damaged, or was made with another model class; modules that "
            "are new to the model go into modules_to_not_convert"
        )


def fit_to_target(model: PreTrainedModel, made_for: str) -> None:
    """Bring codes and scales within the full scale of the target a checkpoint is loaded for.

    Gaudi2 reads E4M3 codes above 240 as Inf. Codes made for a full scale of 448 are halved and scales doubled: a power
    of two keeps all values but the smallest subnormal ones, where 240/448 would round nearly all of them again.

    Raises:
        FP8CheckpointError: codes exceed the target's full scale although the checkpoint says they were made for it.
        FP8NotAvailableError: codes have to be changed and some weights are offloaded.
    """
    for name, module in fp8_modules(model).items():
        fmt = module.recipe.fmt
        if fmt.full_scale < number_format(fmt.name, made_for).full_scale:
            if module.weight.device.type == "meta":
                raise FP8NotAvailableError(f"{name}: changing the target to {fmt.target} cannot be offloaded")
            two = torch.full((1,), 2.0, device=module.weight.device)
            halved = ops.cast_to_fp8(module.weight, two, fmt.dtype, fmt.full_scale)
            module.set_weight(halved, module.weight_scale * two)
            if module.input_scale is not None:
                module.input_scale = frozen(module.input_scale * two)
        elif fmt.full_scale < 448 and module.weight.device.type != "meta":
            largest = float((module.weight.view(torch.uint8) & 0x7F).max().view(fmt.dtype).float())  # without the sign
            if largest > fmt.full_scale:
                raise FP8CheckpointError(
                    f"{name}.weight holds codes up to {largest:g}, but {fmt.target} reads those above "
                    f"{fmt.full_scale:g} as Inf: the checkpoint was not made for it; pass the target when loading "
                    "instead of changing the checkpoint's configuration"
                )


def tensors_to_save(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict as it goes to disk.

    Raises:
        FP8StateError: the model is still being measured.
        FP8NotAvailableError: weights are offloaded.
        FP8CheckpointError: a scale that is not set, zero, NaN or infinite.
    """
    state = state_of(model)
    if state is not None and state.phase == "measuring":
        raise FP8StateError("save_pretrained: the model is in measuring state: run your data, then convert(model)")
    tensors, modules = model.state_dict(), fp8_modules(model)
    if any(module.weight.device.type == "meta" for module in modules.values()):
        raise FP8NotAvailableError("save_pretrained: some weights are offloaded: load the model without offloading")
    check_scales(model, "saved")
    for name in modules:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].unsqueeze(0)
    return tensors


def check_scales(model: PreTrainedModel, action: str) -> None:
    """Refuse scales that are not set, zero, negative, NaN or infinite (`action`: "loaded" or "saved")."""
    scales = [
        (name, key, getattr(module, key))
        for name, module in fp8_modules(model).items()
        for key in ("weight_scale", "input_scale")
    ]
    for name, key, scale in (*scales, *all_attention_scales(model)):
        if scale is None or scale.device.type == "meta":
            continue
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            found = scale.flatten()[:4].tolist()
            raise FP8CheckpointError(
                f"{name}.{key} is {found} and cannot be {action}: expected finite values above 0; the checkpoint is "
                "damaged, quantize the original model again"
            )
