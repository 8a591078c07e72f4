"""LayerHandler: the kind of modules that have one weight, and an FP8Module as their counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8ScaleError
from ..formats import NumberFormat, codes_beyond, holds_codes
from ..measure import Observers
from ..scales import Scheme, always_fits
from .base import FP8Module
from .handler import (
    Conversion,
    Family,
    FitWeight,
    ModuleHandler,
    Quantize,
    Reason,
    Row,
    Surroundings,
    Target,
    Why,
    spoken_type,
)
from .weight import frozen

LAYERS = Family(
    "layers",
    "selected modules",
    "calibrate with data that reaches them, put them on the blocklist, or set ignore_modules_wo_measures=True; "
    "measurements made while they were dynamic, by other overrides say, do not hold their ranges",
)


class LayerHandler(ModuleHandler):
    """Modules of some classes, each with one weight, that an FP8Module replaces.

    Args:
        kind: the kind's name.
        classes: the classes it is for, subclasses included.
        fp8_class: makes the counterpart from a module and a scheme.
        equivalents: names of subclasses with a forward of their own that computes just what the class does.
    """

    family = LAYERS

    def __init__(
        self,
        kind: str,
        classes: tuple[type[nn.Module], ...],
        fp8_class: type[FP8Module],
        equivalents: tuple[str, ...] = (),
    ):
        self.kind, self.classes, self.fp8_class, self.equivalents = kind, classes, fp8_class, equivalents
        self.types = tuple(cls.__name__ for cls in classes)

    @property
    def known_types(self) -> tuple[str, ...]:
        return (*self.types, *self.equivalents)

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return tuple(spoken_type(f"{cls.__module__}.{cls.__name__}") for cls in self.classes)

    def matches(self, module: nn.Module) -> bool:
        return self.base_of(module) is not None

    def base_of(self, module: Any) -> type[nn.Module] | None:
        """The class of this kind that a module is an instance of; None if it is of another kind."""
        return next((base for base in self.classes if isinstance(module, base)), None)

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        base: Any = self.base_of(module)
        weight = module._parameters.get("weight")
        if type(module).forward is not base.forward and type(module).__name__ not in self.equivalents:
            return Why(Reason.UNFIT, f"{type(module).__name__} has a forward of its own")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return Why(Reason.UNFIT, "its forward was replaced")
        if "weight" not in module._parameters or len(module._parameters) > 2:
            return Why(Reason.UNFIT, "its weight is parametrized")
        if isinstance(weight, torch.Tensor) and holds_codes(weight.dtype):
            return Why(Reason.CODES, f"its weight is {weight.dtype}")
        if scales := [name for name in module._buffers if "scale" in name]:
            return Why(Reason.UNFIT, f"it has {scales[0]!r} beside its weight")
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.numel() == 0:
            found = f"({tuple(weight.shape)}, {weight.dtype})" if isinstance(weight, torch.Tensor) else f"({weight})"
            return Why(Reason.UNFIT, f"its weight is not a floating-point matrix {found}")
        if text := self.fp8_class.refuses(module):
            return Why(Reason.UNFIT, text)
        granularity = scheme.weight.granularity
        if granularity.matrices_only and weight.ndim != 2:
            return Why(Reason.UNFIT, f"its weight of {weight.ndim} dimensions cannot be scaled {granularity}")
        return None

    def observe(self, target: Target, observers: Observers) -> None:
        if not isinstance(target.module, FP8Module):
            observers.attach_weight(target.name, target.module, self.fp8_class.to_out_in)
        if target.scheme.needs_ranges:
            observers.attach(target.name, target.module)

    def missing(self, target: Target) -> Why | None:
        reached = not target.scheme.needs_ranges or "input" in target.ranges.kinds
        return None if reached else Why(Reason.NEVER_REACHED)

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        module, scheme, input_scale = target.module, target.scheme, self.scales_for(target).get("input_scale")
        if isinstance(module, FP8Module):  # its weight became FP8 while loading
            before = (module.scheme, module.input_scale)
            return Conversion(
                apply=lambda: module.set_scheme(scheme, input_scale), undo=lambda: module.set_scheme(*before)
            )
        made = self.empty(target)
        try:
            made.set_weight(*quantize(module.weight, made.to_out_in(module.weight.detach()), scheme))
        except FP8ScaleError as error:
            raise FP8ScaleError(f"{target.name}: {error}") from None
        made.set_scheme(scheme, input_scale)
        return Conversion(made)

    def empty(self, target: Target) -> FP8Module:
        """An FP8 module for the place of the target's; its weight and scales are not set yet.

        Raises:
            FP8StateError: the module's bias does not fit its weight.
        """
        made = self.fp8_class(target.module, target.scheme)  # type: ignore[call-arg, arg-type]
        made.name = target.name
        made.check_bias()
        return made

    def converted(self, model: nn.Module) -> dict[str, Any]:
        named = model.named_modules()
        return {name: module for name, module in named if type(module) is self.fp8_class and self._stands_for(module)}

    def _stands_for(self, module: FP8Module) -> bool:
        return self.base_of(module.origin) is not None

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        return module.restored(dtype)

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        made = self.empty(target)
        if saved is None:
            # Checkpoint tensors may be cast to the dtype of the parameter they are for: not to FP8 before scaling.
            made.register_parameter("weight", frozen(torch.empty(made.weight_shape, device="meta")))
        elif target.scheme.is_static:
            made.input_scale = frozen(torch.full((1,), torch.nan, dtype=torch.float32, device="meta"))
        return made

    def loaded(self, target: Target) -> None:
        target.module.set_scheme(target.scheme, target.module.input_scale)

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        return {**dict(module.named_parameters(recurse=False)), "weight": module.codes}

    def pack(self, module: Any) -> None:
        module.pack()

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        scheme = target.scheme
        if not scheme.is_static:
            return {}
        return {"input_scale": target.static_scale("input") if scheme.needs_ranges else scheme.static_scale(0.0)}

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        return {} if module.input_scale is None else {"input_scale": module.input_scale}

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        module.input_scale = frozen(scales["input_scale"].to(module.input_scale.device))

    def fit_weight(self, target: Target, made_for: NumberFormat, fit: FitWeight) -> None:
        name, module, fmt = target.name, target.module, target.scheme.fmt
        if fmt != made_for and not always_fits(target.scheme.weight, made_for, fmt):
            if module.codes.is_meta:
                raise FP8NotAvailableError(f"{name}: changing the target to {fmt.target} cannot be offloaded")
            module.set_weight(*fit(module.codes, module.weight_scale, target.scheme))
        elif wrong := codes_beyond(module.codes, fmt):
            raise FP8CheckpointError(
                f"{name}.weight {wrong}: the checkpoint was not made for it; pass the target when loading instead of "
                "changing the checkpoint's configuration"
            )

    def row(self, module: Any) -> Row | None:
        if not isinstance(module, FP8Module):
            return None
        scheme, scales = str(module.scheme), module.scales()
        return Row(module.activations, module.record, scheme, scales, high_precision=module.high_precision)


def fp8_modules(model: nn.Module) -> dict[str, FP8Module]:
    """All FP8 modules of `model` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Module)}
