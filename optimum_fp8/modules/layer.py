"""LayerHandler: the kind of modules that have one weight, and an FP8Module as their counterpart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8ScaleError
from ..formats import NumberFormat, codes_beyond, holds_codes
from ..measure import Observers
from ..scales import Scheme, always_fits
from .base import FP8Module
from .fake_quant import Delay
from .handler import (
    Change,
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
from .layer_fake_quant import LayerFakeQuant
from .measured_forward import MeasuredForward, sees
from .own_forward import EQUIVALENTS, is_known, measured
from .weight import frozen
from .weight_norm import take_hooks, with_weight_norm, without_weight_norm

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
        own_class: makes the counterpart of subclasses with a forward of their own that goes through the class's.
    """

    family = LAYERS
    scales_beside: tuple[str, ...] = ()  # buffers that are no scales of a quantized weight, though they are called so

    def __init__(
        self,
        kind: str,
        classes: tuple[type[nn.Module], ...],
        fp8_class: type[FP8Module],
        own_class: type[FP8Module] | None = None,
    ):
        self.kind, self.classes, self.fp8_class, self.own_class = kind, classes, fp8_class, own_class
        self.types = tuple(cls.__name__ for cls in classes)

    @property
    def known_types(self) -> tuple[str, ...]:
        return (*self.types, *(EQUIVALENTS if self.own_class else ()))

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return tuple(spoken_type(f"{cls.__module__}.{cls.__name__}") for cls in self.classes)

    def matches(self, module: nn.Module) -> bool:
        return not isinstance(module, FP8Module) and self.base_of(module) is not None

    def base_of(self, module: Any) -> type[nn.Module] | None:
        """The class of this kind that a module is an instance of; None if it is of another kind."""
        return next((base for base in self.classes if isinstance(module, base)), None)

    def plain(self, module: Any) -> Any:
        """What has the one weight that is quantized: the module, or a plain layer that equals it in inference."""
        return without_weight_norm(module)

    def unplain(self, layer: nn.Module) -> nn.Module:
        """What goes into the place of an FP8 module, given its plain layer."""
        return with_weight_norm(layer)

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        module = self.plain(module)
        base: Any = self.base_of(module)
        weight = module._parameters.get("weight")
        if not self.computes_just_that(module, base):
            return Why(Reason.UNFIT, f"{type(module).__name__} has a forward of its own")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return Why(Reason.UNFIT, "its forward was replaced")
        if "weight" not in module._parameters or len(module._parameters) > 2:
            return Why(Reason.UNFIT, "its weight is parametrized")
        if isinstance(weight, torch.Tensor) and holds_codes(weight.dtype):
            return Why(Reason.CODES, f"its weight is {weight.dtype}")
        if scales := [name for name in module._buffers if "scale" in name and name not in self.scales_beside]:
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

    def computes_just_that(self, module: Any, base: Any) -> bool:
        """Whether a module's forward computes what that of the class `base` does, or is known to the FP8 module."""
        return type(module).forward is base.forward or self.runs_own(module)

    def runs_own(self, module: Any) -> bool:
        """Whether a module's class has a forward of its own that is run as it is, through the product of its class."""
        base: Any = self.base_of(module)
        return self.own_class is not None and type(module).forward is not base.forward and is_known(type(module))

    def observe(self, target: Target, observers: Observers) -> None:
        if not isinstance(target.module, FP8Module):
            observers.attach_weight(target.name, target.module, lambda module: self.to_out_in(self.plain(module)))
        if not target.scheme.needs_ranges:
            return
        if isinstance(target.module, FP8Module) or not self.runs_own(target.module):
            observers.attach(target.name, target.module)
            return
        forward = partial(measured, target.module, sees(observers, target.name))
        observers.add(MeasuredForward(target.module, forward))

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
        plain = self.plain(module)
        try:
            made.set_weight(*quantize(plain.weight, self.to_out_in(plain), scheme))
        except FP8ScaleError as error:
            raise FP8ScaleError(f"{target.name}: {error}") from None
        made.set_scheme(scheme, input_scale)
        return Conversion(made)

    def fake_quant(self, target: Target, delay: Delay) -> LayerFakeQuant:
        module = target.module
        if self.plain(module) is not module:
            raise FP8NotAvailableError(
                f"{target.name}: fake_quant=True cannot train a {type(module).__name__} whose weight is normalized "
                "before it is used: remove the normalization, or put the module on the blocklist"
            )
        cls = self.fp8_class
        return LayerFakeQuant(target, delay, cls.to_out_in, self.runs_own(module), cls.rows_are_tokens)

    def to_out_in(self, layer: Any) -> torch.Tensor:
        """The weight of a plain layer with output channels first."""
        return self.fp8_class.to_out_in(layer, layer.weight.detach())

    def empty(self, target: Target) -> FP8Module:
        """An FP8 module for the place of the target's; its weight and scales are not set yet.

        Raises:
            FP8StateError: the module's bias does not fit its weight.
        """
        plain = self.plain(target.module)
        made_by = self.own_class if self.own_class and self.runs_own(plain) else self.fp8_class
        made = made_by(plain, target.scheme)  # type: ignore[call-arg, arg-type]
        made.name, made.derived = target.name, plain is not target.module
        made.check_bias()
        return made

    def converted(self, model: nn.Module) -> dict[str, Any]:
        named = model.named_modules()
        classes = (self.fp8_class, self.own_class)
        return {name: module for name, module in named if type(module) in classes and self._stands_for(module)}

    def _stands_for(self, module: FP8Module) -> bool:
        return self.base_of(module.origin) is not None

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        return self.unplain(module.restored(dtype))

    def around(self, model: nn.Module, modules: Mapping[str, nn.Module], others: Iterable[nn.Module]) -> list[Change]:
        return take_hooks(module for module in modules.values() if isinstance(module, FP8Module))

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        if saved is None and self.plain(target.module) is not target.module:
            return None  # its weight is there when all that it follows from has been loaded
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

    def rescheme(self, target: Target, fit: FitWeight) -> None:
        module, scheme, input_scale = target.module, target.scheme, self.scales_for(target).get("input_scale")
        module.set_weight(*fit(module.codes, module.weight_scale, scheme))
        module.set_scheme(scheme, input_scale)

    def row(self, module: Any) -> Row | None:
        if not isinstance(module, FP8Module):
            return None
        scheme, scales = str(module.scheme), module.scales()
        error = module.requantized
        remark = "" if error is None else f"quantized again, with an error of {100 * error:.1f} %"
        high_precision = module.high_precision
        return Row(module.activations, module.record, scheme, scales, high_precision=high_precision, remark=remark)


def fp8_modules(model: nn.Module) -> dict[str, FP8Module]:
    """All FP8 modules of `model` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Module)}
