"""What it means to write to the weight of an FP8 module: the values are quantized again, by the scheme of the module.

Adapters do that when they are merged. They take themselves off again by subtracting what they added, which would round
once more; so what the weight was before is kept with the adapter, and comes back as it was.
"""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError, FP8ScaleError, FP8StateError
from ..scales import quantize_weight

logger = logging.getLogger(__name__)

_FORMER = "fp8_former_weights"  # on a layer of peft's
_CALLS = 8  # between a method of an adapter's layer and the assignment
_NOTICE = (
    "weights of FP8 modules were written to, as merging an adapter does, and quantized again: "
    "quantization_report(model) gives the error of each; optimum_fp8.merge_lora merges into a checkpoint instead"
)


@dataclass(frozen=True)
class Former:
    """What a weight was before an adapter was merged into it.

    Attributes:
        codes: `[out, in, …]`, FP8.
        scale: float32, theirs.
        error: how far the weight that replaced it is from the exact sum, as the norm of the difference.
        requantized: what the module said of its own error then.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    error: float
    requantized: float | None

    def is_meant_by(self, values: torch.Tensor) -> bool:
        """Whether values are these but for the error that comes off with the adapter, and their own rounding."""
        exact = ops.cast_from_fp8(self.codes, self.scale, torch.float32)
        distance, rounding = float((values.float() - exact).norm()), torch.finfo(values.dtype).eps * float(exact.norm())
        return abs(distance - self.error) <= 0.05 * self.error + rounding


@torch.no_grad()
def rewrite(module: Any, values: torch.Tensor) -> None:
    """Have the weight of an FP8 module be `values`, quantized by its scheme; parameters stay the same objects.

    Args:
        module: an FP8Module; `requantized` is set to ‖FP8(values) - values‖ / ‖values‖.
        values: of the original weight's shape, in high precision.

    Raises:
        FP8StateError: another shape.
        FP8ScaleError: the values hold NaN or Inf.
        FP8NotAvailableError: the module's weight follows from others, or is not here as a whole.
    """
    _refuse(module, values)
    values, scheme = module.to_out_in(values.detach()), module.scheme
    codes, scale = module.codes, module.weight_scale
    adapter, taken_off = _adapter_at_work()
    kept: list[Former] = [] if adapter is None else vars(adapter).setdefault(_FORMER, [])
    former = kept.pop() if taken_off and kept else None
    if former is not None and former.is_meant_by(values):
        new, new_scale = former.codes.to(codes.device), former.scale.to(codes.device)
        module.requantized = former.requantized
    else:
        try:
            new, new_scale, _ = quantize_weight(values.contiguous(), scheme.weight, scheme.fmt, scheme.hp_dtype)
        except FP8ScaleError as wrong:
            raise FP8ScaleError(f"{module.name}: {wrong}") from None
        exact = values.float()
        error = float((ops.cast_from_fp8(new, new_scale, torch.float32) - exact).norm())
        if not taken_off:
            kept.append(Former(codes.detach(), scale.detach(), error, module.requantized))
        module.requantized = error / (float(exact.norm()) or 1.0)
        logger.info("%s: quantized again, %.2f %% of its norm off", module.name, 100 * module.requantized)
        warnings.warn(_NOTICE, stacklevel=4)
    codes.data, scale.data = new, new_scale  # modules that share them go on sharing them
    module.set_weight(codes, scale)
    module.pack()


def _refuse(module: Any, values: torch.Tensor) -> None:
    codes, shape = module.codes, module.weight.shape
    if module.derived:
        raise FP8NotAvailableError(
            f"{module.name}: the weight of this {type(module.origin).__name__} follows from what it is computed of, "
            "and cannot be written to: merge into the original model and convert it again"
        )
    if codes.is_meta or type(codes.data) is not torch.Tensor or codes.shape != module.weight_shape:
        raise FP8NotAvailableError(
            f"{module.name}: the weight is offloaded, or split over processes, and cannot be written to: load the "
            "model as a whole, or merge with optimum_fp8.merge_lora"
        )
    if values.shape != shape:
        raise FP8StateError(
            f"{module.name}: values of shape {tuple(values.shape)} cannot be its weight: expected {tuple(shape)}"
        )


def _adapter_at_work() -> tuple[nn.Module | None, bool]:
    """The layer of an adapter whose `merge` or `unmerge` is running, and whether it is the latter."""
    frame = sys._getframe(1)
    for _ in range(_CALLS):
        if frame.f_back is None:
            break
        frame = frame.f_back
        if frame.f_code.co_name in ("merge", "unmerge"):
            layer = frame.f_locals.get("self")
            if isinstance(layer, nn.Module) and hasattr(layer, "merged_adapters"):
                return layer, frame.f_code.co_name == "unmerge"
    return None, False
