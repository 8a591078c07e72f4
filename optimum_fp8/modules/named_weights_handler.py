"""NamedWeightsHandler: the kind of modules that have several weights, each with a name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8ScaleError
from ..formats import NumberFormat, codes_beyond, holds_codes
from ..scales import Scheme, always_fits, scale_shape
from .handler import (
    Conversion,
    FitWeight,
    ModuleHandler,
    Quantize,
    Reason,
    Row,
    Surroundings,
    Target,
    Why,
)
from .layer import LAYERS
from .named_weights import FP8NamedWeights


class NamedWeightsHandler(ModuleHandler):
    """Modules of a class of torch with several weights, that an `FP8NamedWeights` replaces.

    While a model is loaded, they stay in high precision until all of it is there.

    Attributes:
        classes: the classes it is for, subclasses included.
        fp8_class: makes the counterpart from a module and a scheme.
    """

    family = LAYERS
    unlisted_before = True
    classes: tuple[type[nn.Module], ...]
    fp8_class: type[FP8NamedWeights]

    def weight_names(self, module: Any) -> tuple[str, ...]:
        """The names of the parameters that become FP8."""
        raise NotImplementedError

    def may_have(self, name: str) -> bool:
        """Whether a module of this kind may have another parameter with a name."""
        raise NotImplementedError

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.classes)

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        base: Any = next(cls for cls in self.classes if isinstance(module, cls))
        names = self.weight_names(module)
        weights = {name: module._parameters.get(name) for name in names}
        if type(module).forward is not base.forward:
            return Why(Reason.UNFIT, f"{type(module).__name__} has a forward of its own")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return Why(Reason.UNFIT, "its forward was replaced")
        if other := [key for key in module._parameters if key not in names and not self.may_have(key)]:
            return Why(Reason.UNFIT, f"it has {other[0]!r} beside its weights and biases")
        for name, weight in weights.items():
            if weight is None:
                return Why(Reason.UNFIT, f"its {name} is parametrized")
            if holds_codes(weight.dtype):
                return Why(Reason.CODES, f"its {name} is {weight.dtype}")
            if not weight.is_floating_point() or weight.ndim != 2 or weight.numel() == 0:
                found = f"({tuple(weight.shape)}, {weight.dtype})"
                return Why(Reason.UNFIT, f"its {name} is not a floating-point matrix {found}")
        return None

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        module, made = target.module, self.empty(target)
        weights = {}
        for name in made.weight_names:
            weight = module._parameters[name]
            try:
                weights[name] = quantize(weight, weight.detach(), target.scheme)
            except FP8ScaleError as error:
                raise FP8ScaleError(f"{target.name}.{name}: {error}") from None
        made.set_weights(weights)
        made.set_scheme(target.scheme, self.scales_for(target))
        return Conversion(made)

    def empty(self, target: Target) -> FP8NamedWeights:
        """An FP8 module for the place of the target's; its weights and scales are not set yet."""
        made = self.fp8_class(target.module, self.weight_names(target.module), target.scheme)
        made.name = target.name
        return made

    def converted(self, model: nn.Module) -> dict[str, Any]:
        return {name: module for name, module in model.named_modules() if type(module) is self.fp8_class}

    def restore(self, module: Any, dtype: torch.dtype | None = None) -> nn.Module | None:
        return module.restored(dtype)  # type: ignore[no-any-return]

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        if saved is None:
            return None
        made, parameters = self.empty(target), target.module._parameters
        shapes = {name: parameters[name].shape for name in made.weight_names}
        made.expect(shapes, partial(scale_shape, rule=target.scheme.weight))
        return made

    def loaded(self, target: Target) -> None:
        target.module.set_scheme(target.scheme, self.run_time_scales(target.module))

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        return module.tensors()  # type: ignore[no-any-return]

    def pack(self, module: Any) -> None:
        module.pack()

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        scales = {name: module._parameters[name] for name in module.activation_scales}
        return {name: scale for name, scale in scales.items() if scale is not None}

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        module.set_scheme(module.scheme, scales)

    def fit_weight(self, target: Target, made_for: NumberFormat, fit: FitWeight) -> None:
        module, fmt = target.module, target.scheme.fmt
        fits = fmt == made_for or always_fits(target.scheme.weight, made_for, fmt)
        for name in module.weight_names:
            codes = module.codes(name)
            if not fits and codes.is_meta:
                raise FP8NotAvailableError(f"{target.name}: changing the target to {fmt.target} cannot be offloaded")
            if not fits:
                module.set_weights({name: fit(codes, module.scale(name), target.scheme)})
            elif wrong := codes_beyond(codes, fmt):
                raise FP8CheckpointError(
                    f"{target.name}.{name} {wrong}: the checkpoint was not made for it; pass the target when loading "
                    "instead of changing the checkpoint's configuration"
                )
        if not module.codes(module.weight_names[0]).is_meta:
            module.check_codes()

    def rescheme(self, target: Target, fit: FitWeight) -> None:
        module, scheme, scales = target.module, target.scheme, self.scales_for(target)
        module.set_weights({name: fit(module.codes(name), module.scale(name), scheme) for name in module.weight_names})
        module.set_scheme(scheme, scales)

    def row(self, module: Any) -> Row | None:
        if not isinstance(module, FP8NamedWeights):
            return None
        scheme, dtype = module.scheme, module.high_precision
        return Row(scheme.activations, module.record, str(scheme), module.reported(), high_precision=dtype)
