"""A module in fake quantization: it is trained on rounded operands, and evaluated as what it will be converted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import FP8NotAvailableError
from ..measure import Measurements, observer_class
from ..measure.store import DEFAULT_OBSERVER
from .fake_quant import FakeQuant
from .handler import Change, Target
from .quantized_once import QuantizedOnce

CHILD = "fake_quant"  # the name of what remembers, below the module


class FakeQuantized(Change):
    """The forward of a module that stays as it is, put in the place of its own; `undo` takes it away.

    In training it is the module's own, of rounded weights and inputs. In evaluation it is that of the FP8 module that
    the handler makes of the weights and the scales there are, which is kept until they change.

    Args:
        target: the module; its ranges do not matter.
        fake: rounds its operands.
    """

    def __init__(self, target: Target, fake: FakeQuant):
        module = target.module
        place = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        super().__init__(module, place, vars(module).get(place))
        self.target, self.fake = target, fake
        self._converted: tuple[Any, nn.Module] | None = None
        self.put_on()

    def put_on(self) -> None:
        """Have the module compute so from now on."""
        if CHILD in self.owner._modules or hasattr(type(self.owner), CHILD):
            raise FP8NotAvailableError(
                f"{self.target.name}: fake_quant=True keeps what it remembers in an attribute {CHILD!r}, and this "
                f"{type(self.owner).__name__} has one: put the module on the blocklist"
            )
        self.owner._modules[CHILD] = self.fake.train(self.owner.training)
        vars(self.owner)[self.attribute] = self

    def undo(self) -> None:
        self.owner._modules.pop(CHILD, None)
        if self.before is None:
            vars(self.owner).pop(self.attribute, None)
        else:
            vars(self.owner)[self.attribute] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.owner.training:
            self.fake.used = True
            return self.fake.trained(self.owner, *args, **kwargs)
        if self.fake.lacks_ranges:  # as in a first step, where each input is scaled by its own range
            return self.fake.trained(self.owner, *args, **kwargs)
        with torch.no_grad():
            exact = self.converted()(*args, **kwargs)
        if not torch.is_grad_enabled():
            return exact
        rounded = self.fake.trained(self.owner, *args, **kwargs)
        return exact + (rounded - rounded.detach())  # the gradients of training

    def converted(self) -> nn.Module:
        """The FP8 module that a conversion makes now."""
        held = (*self.owner.parameters(), *self.owner.buffers())
        key = [(id(x), x._version, x.dtype, x.device, x.data_ptr()) for x in held]
        if self._converted is None or self._converted[0] != key or _gathers_weights():
            self._converted = key, self._convert()
        return self._converted[1]

    @torch.no_grad()
    def _convert(self) -> nn.Module:
        ranges = self.measured(Measurements("")).at(self.target.name)
        target = replace(self.target, module=_bare(self.owner, self.attribute), ranges=ranges)
        assert target.model is not None
        conversion = target.handler.convert(target, target.model, QuantizedOnce(self.frozen_scales()))
        assert conversion.replacement is not None
        return conversion.replacement.eval()

    def measured(self, measurements: Measurements) -> Measurements:
        """Add the ranges of the module's inputs to measurements."""
        for kind, found in self.fake.ranges().items():
            seen = observer_class(DEFAULT_OBSERVER).from_range(found, 1)
            assert seen is not None
            measurements.add(self.target.name, kind, seen)
        return measurements

    def frozen_scales(self) -> dict[nn.Parameter, torch.Tensor]:
        """The scales that weights keep."""
        named = self.owner.named_parameters(recurse=False)
        scales = {parameter: self.fake.frozen_scale(name) for name, parameter in named}
        return {parameter: scale for parameter, scale in scales.items() if scale is not None}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_converted": None}


def _bare(module: nn.Module, forward: str) -> Any:
    """The module without what makes it a trained one, and of its own class where FSDP gave it another."""
    cls: Any = type(module)
    if dist.is_available() and issubclass(cls, FSDPModule):
        cls = next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))
    made = object.__new__(cls)
    kept = {name: value for name, value in vars(module).items() if name != forward}
    children = {name: child for name, child in module._modules.items() if name != CHILD}
    object.__setattr__(made, "__dict__", {**kept, "_modules": children})
    return made


def _gathers_weights() -> bool:
    """Whether weights may be put together anew for each call, by FSDP, which leaves no trace on them."""
    return dist.is_available() and dist.is_initialized()
