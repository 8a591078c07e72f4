"""How much of what can be in FP8 is in FP8, in bytes of the weights in high precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_fp8 import quantization_report

LAYERS = (nn.Linear, nn.Conv2d, Conv1D)
STACKS = ("gate_up_proj", "up_proj", "down_proj", "gate_proj")
_BY_DEFAULT = ("kept by default", "its weight is the first of the model")


class Coverage(NamedTuple):
    """Bytes of weights: that can be in FP8, that are, and why others are not counted."""

    eligible: int
    in_fp8: int
    by_default: int
    unreached: int
    left: dict[str, int]

    @property
    def share(self) -> float:
        return self.in_fp8 / self.eligible if self.eligible else 0.0


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model in high precision that a kind of FP8 module exists for, by name; tied ones once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = module._parameters
        keys = ["weight"] if isinstance(module, LAYERS) else []
        keys += [key for key in STACKS if (each := own.get(key)) is not None and each.ndim == 3]
        for key in keys:
            tensor = own.get(key)
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{name}.{key}"] = tensor
    return found


def called(model: nn.Module, run: Any) -> set[str]:
    """The names of the modules that are given something while `run()` runs; of those with several names, all."""
    reached: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [each for each in (*args, *kwargs.values()) if torch.is_tensor(each)]
        if not tensors or any(each.numel() for each in tensors):
            reached.add(module)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    run()
    for handle in handles:
        handle.remove()
    return {name for name, module in model.named_modules() if module in reached}


def coverage(original: nn.Module, quantized: nn.Module, reached: set[str]) -> Coverage:
    """Compare the weights of the original with what became of them.

    Args:
        original: in high precision.
        quantized: the same model, converted.
        reached: the modules that its forward passes call.
    """
    report = quantization_report(quantized)
    reasons = {row.name: row.reason for row in report.modules if not row.quantized}
    reasons |= {name: row.reason for row in report.others for name in row.names}
    codes = set(codes_of(quantized))
    eligible = in_fp8 = by_default = unreached = 0
    left: dict[str, int] = {}
    for name, tensor in weights(original).items():
        module, size = name.rpartition(".")[0], tensor.numel() * tensor.element_size()
        reason = reasons.get(module, "not in the report")
        if name in codes:
            in_fp8 += size
        elif reason.startswith(_BY_DEFAULT):
            by_default += size
            continue
        elif module not in reached and "never reached" in reason:
            unreached += size
            continue
        else:
            left[reason] = left.get(reason, 0) + size
        eligible += size
    return Coverage(eligible, in_fp8, by_default, unreached, left)


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """FP8 codes and scales of a converted model by name, stacks of experts as stacks."""
    found = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("_scale")}
    for name, module in model.named_modules():
        for key, tensor in module._parameters.items():
            if tensor is not None and tensor.dtype == torch.float8_e4m3fn:
                found |= {f"{name}.{key}": tensor.data, f"{name}.{key}_scale": module._parameters[f"{key}_scale"].data}
                for scale in ("input_scale", "intermediate_scale"):
                    if (value := getattr(module, scale, None)) is not None:
                        found[f"{name}.{scale}"] = value.data
    return found
