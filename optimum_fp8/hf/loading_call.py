"""What was said to the `from_pretrained` or `save_pretrained` that is under way.

transformers hands quantizers the model and its files, but not the arguments with which they were found: the tokenizer
and the processor for calibration have to be looked for with the same. They are read from the frame of the call, which
changes nothing of transformers. Half of them are parameters of `from_pretrained`, the others are its local variables.
Likewise the state dict that `save_pretrained` is given, which it replaces by what the quantizer returns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import FP8NotAvailableError
from ..lifecycle import Origin
from ..modules.fused_experts import FP8FusedExperts
from ..selection import Decision

_ARGUMENTS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "trust_remote_code",  # handed on as the user gave it
)
_MODEL, _AUTO = "transformers.modeling_utils", "transformers.models.auto.auto_factory"


def loading_origin(model: Any) -> Origin:
    """Where `model` is being loaded from; of a model that is not, the place that it names."""
    name: str = getattr(model, "name_or_path", "") or ""
    arguments: dict[str, Any] = {}
    for frame in _calls("from_pretrained"):
        values = frame.f_locals
        if frame.f_globals["__name__"] == _MODEL and not arguments:
            name = values["pretrained_model_name_or_path"] or name
            arguments = {key: values.get(key) for key in _ARGUMENTS}
        elif frame.f_globals["__name__"] == _AUTO and arguments:
            arguments["code_revision"] = values.get("code_revision")
            break
    return Origin(str(name), {key: value for key, value in arguments.items() if value not in (None, "")})


def refuse_distributed_loading() -> None:
    """Refuse to calibrate what transformers is about to spread over processes.

    Raises:
        FP8NotAvailableError: it was told to, by `tp_plan`, `device_mesh` or a `distributed_config`.
    """
    if asked := _asked_to_spread():
        raise FP8NotAvailableError(
            f"calibration of a model that from_pretrained spreads over processes ({asked}): load it whole in "
            "each process, or measure it with prepare, after fully_shard; the FP8 "
            "checkpoint can be used in any way"
        )


def refuse_zero3() -> None:
    """Refuse to load or train in FP8 what DeepSpeed's ZeRO-3 is going to cut into parts.

    Raises:
        FP8NotAvailableError: a configuration of DeepSpeed with stage 3 is in force (`HfDeepSpeedConfig`, or
            `TrainingArguments(deepspeed=…)`).
    """
    if is_deepspeed_zero3_enabled():
        raise FP8NotAvailableError(
            "a model with an FP8Config under DeepSpeed's ZeRO-3 (zero_optimization: stage 3), which cuts every "
            "parameter into parts: expected FP8 weights to stay whole. Train adapters with ZeRO-2, DDP or FSDP2; "
            "quantize in one process, and measure what does not fit by FSDP2 (fully_shard, then prepare)"
        )


def refuse_spread_experts(model: nn.Module) -> None:
    """Refuse to spread over processes what holds the stacked weights of experts in FP8.

    Raises:
        FP8NotAvailableError: `from_pretrained` was told to, and the model has such experts.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, FP8FusedExperts)]
    if names and (asked := _asked_to_spread()):
        raise FP8NotAvailableError(
            f"{len(names)} modules of experts in FP8 ({names[0]}, …) cannot be spread over processes by expert or "
            f"tensor parallelism ({asked}): their plans know nothing of scales; load the model whole in each "
            "process, or put the experts on the blocklist and quantize again"
        )


def refuse_experts_on_disk(decisions: Iterable[Decision], device_map: Any) -> None:
    """Refuse to leave the stacked weights of experts in FP8 on disk.

    Raises:
        FP8NotAvailableError: `device_map` puts some there.
    """
    on_disk = [key for key, device in device_map.items() if device == "disk"] if isinstance(device_map, dict) else []
    names = [each.name for each in decisions if each.selected and each.handler.kind == "fused_experts"]
    found = [name for name in names if any(key == "" or f"{name}.".startswith(f"{key}.") for key in on_disk)]
    if found:
        raise FP8NotAvailableError(
            f"device_map puts {len(found)} modules of experts in FP8 on disk ({found[0]}, …), from where their stacks "
            "cannot be brought in: leave them on a device or on the CPU"
        )


def refuse_weights_on_disk(device_map: Any, pre_quantized: bool, dequantize: bool) -> None:
    """Refuse to leave weights on disk that are quantized or dequantized while they are loaded.

    Raises:
        FP8NotAvailableError: `device_map` puts some there.
    """
    if not isinstance(device_map, dict) or "disk" not in device_map.values():
        return
    if not pre_quantized:
        raise FP8NotAvailableError(
            "device_map puts modules on disk, and weights quantized while loading cannot be offloaded there: "
            "use calibration='sequential' with a dataset, which keeps all of them on disk; or quantize and "
            "save the model once, then load the FP8 checkpoint with this device_map"
        )
    if dequantize:
        raise FP8NotAvailableError("dequantize=True cannot be combined with modules on disk: drop one of them")


def _asked_to_spread() -> str | None:
    """The argument of the `from_pretrained` under way that spreads the model over processes, or None."""
    for frame in _calls("from_pretrained"):
        values = frame.f_locals
        found = [name for name in ("tp_plan", "device_mesh", "distributed_config") if values.get(name) is not None]
        if found:
            return found[-1]
    return None


def given_state_dict(model: Any) -> Mapping[str, torch.Tensor] | None:
    """The state dict that `model` is being saved with, where the caller gave one and this process writes it."""
    asked = saving_arguments(model)
    given: Mapping[str, torch.Tensor] | None = asked["state_dict"] if asked.get("is_main_process") else None
    return given


def saving_arguments(model: Any) -> Mapping[str, Any]:
    """The arguments of the `save_pretrained` of `model` that is under way; empty where there is none."""
    values: Mapping[str, Any] = next((frame.f_locals for frame in _calls("save_pretrained")), {})
    return values if values.get("self") is model else {}


def reads_data(device_map: Any) -> bool:
    """Whether a model is loaded with a `device_map` that wants its tensors, and not their shapes and names alone."""
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return not places or any(str(place) != "meta" for place in places)


def _calls(function: str) -> Iterator[FrameType]:
    """The frames of transformers' function of that name, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") in (_MODEL, _AUTO):
            yield frame
        frame = frame.f_back
