"""Linear layers of which each of several processes holds a part: what those of all libraries have in common.

The classes of the libraries are known by their names, and by what they have: none of the libraries is imported. A layer
that is split by rows holds some columns of its weight: it multiplies a part of the input, and the results are added up
over the processes. The bias is added to the sum, once. A layer split by columns holds some rows of its weight, and its
outputs are parts of the whole output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..measure import Observers
from ..scales import Scheme
from .all_reduce import Peers
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
    handlers,
)
from .layer import LayerHandler
from .linear import FP8LinearBase
from .measured_forward import MeasuredForward
from .weight import frozen

PARTIAL, SUM = "output", "output2"  # of a layer split by rows: what is measured of its results, by INC's numbering
_SUM_SCALES = {"partial_scale": PARTIAL, "output_scale": SUM}


def imported(module: Any, name: str) -> Any:
    """What the file of a module's class, or of a class that it derives from, calls by `name`; None if nothing.

    Args:
        module: the original, or what stands for it.
        name: of a function or a module.
    """
    files = (sys.modules.get(cls.__module__) for cls in type(getattr(module, "origin", module)).__mro__)
    return next((vars(file)[name] for file in files if file is not None and name in vars(file)), None)


class FP8RowParallel(FP8LinearBase):
    """Base of layers split by rows, with an FP8 weight `[out, in / processes]`.

    The static methods say how a library's layer is computed around its product; they are given the FP8 module, or the
    original while it is measured.

    Attributes:
        partial_scale: float32 `(1,)`, of a process's own result, where the sum is taken in FP8; else None.
        output_scale: the same for the sum.
    """

    scale_names = (*FP8LinearBase.scale_names, "partial_scale", "output_scale")

    may_sum_in_fp8 = True  # whether results are of one layer among many, and not what the model returns

    partial_scale: nn.Parameter | None
    output_scale: nn.Parameter | None

    @staticmethod
    def peers(module: Any) -> Peers:
        """The processes over which the results are added up; one where they are not."""
        raise NotImplementedError

    @staticmethod
    def own_part(module: Any, x: torch.Tensor) -> torch.Tensor:
        """The part of an input that this process multiplies."""
        return x

    @staticmethod
    def added_bias(module: Any) -> torch.Tensor | None:
        """The bias that is added to the sum."""
        return module.bias  # type: ignore[no-any-return]

    @staticmethod
    def original_product(module: Any, x: torch.Tensor) -> torch.Tensor:
        """The product in high precision, without bias."""
        return torch.nn.functional.linear(x, module.weight)

    @staticmethod
    def returned(module: Any, output: torch.Tensor) -> Any:
        """What the layer returns with an output."""
        return output

    @classmethod
    def measured(cls, module: Any, see: Callable[[str, torch.Tensor], None], input: torch.Tensor) -> Any:
        """The forward pass in high precision; `see` is given the result of this process, and the sum."""
        output = cls.original_product(module, cls.own_part(module, input))
        see(PARTIAL, output.detach())  # a tensor of its own: the sum may be written over the result
        output = cls.peers(module).all_reduce(output)
        see(SUM, output)
        return cls.returned(module, _with_bias(output, cls.added_bias(module)))

    def computed(self, input: torch.Tensor) -> Any:
        """The forward pass in FP8."""
        peers, bias = self.peers(self), self.added_bias(self)
        x = self.own_part(self, input)
        if peers.count == 1:
            return self.returned(self, self.product(x, bias))
        output = self.product(x, None)
        if self.partial_scale is not None and self.output_scale is not None and _is_decoding(input):
            output = peers.all_reduce_in_fp8(output, self.partial_scale, self.output_scale, self.scheme.fmt, self.name)
        else:
            output = peers.all_reduce(output)
        return self.returned(self, _with_bias(output, bias))


def _with_bias(output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return output if bias is None else output + bias.to(output.dtype)


def _is_decoding(input: torch.Tensor) -> bool:
    """Whether an input `[batch, length, in]` is one new token of each sequence."""
    return input.ndim > 2 and input.shape[1] == 1


class ParallelHandler(LayerHandler):
    """Linear layers of a library, known by their class names.

    Args:
        kind: the kind's name.
        types: names of the classes, those of subclasses aside.
        fp8_class: their counterpart.
        peers: the processes that hold the parts of a layer.
        lacking: what tells that a module is another library's, for messages; None if it is not.
    """

    def __init__(
        self,
        kind: str,
        types: tuple[str, ...],
        fp8_class: type[FP8LinearBase],
        peers: Callable[[Any], Peers],
        lacking: Callable[[Any], str | None],
    ):
        super().__init__(kind, (), fp8_class)
        self.types, self.peers, self.lacking = types, peers, lacking

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # models that have none need not be told of them

    def base_of(self, module: Any) -> type[nn.Module] | None:
        if isinstance(module, nn.Linear):  # as other libraries' classes of these names may be
            return None
        return next((cls for cls in type(module).__mro__ if cls.__name__ in self.types), None)

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        if text := self.lacking(module):
            return Why(Reason.UNFIT, f"{type(module).__name__} of a library that is not known: {text}")
        if len(arguments := inspect.signature(type(module).forward).parameters) != 2:
            return Why(Reason.UNFIT, f"its forward has other arguments than an input: {', '.join(arguments)}")
        if getattr(module, "bias", None) is not None and "bias" not in module._parameters:
            return Why(Reason.UNFIT, "its bias is no parameter")
        return super().refusal(module, scheme, around)

    def fake_quant(self, target: Target, delay: Any) -> Any:
        return ModuleHandler.fake_quant(self, target, delay)  # they are layers of libraries for inference


class RowParallelHandler(ParallelHandler):
    """Layers split by rows: their results are measured, too, and may be added up in FP8."""

    def sums_in_fp8(self, module: Any, scheme: Scheme) -> bool:
        """Whether a module adds up results at all, and is to do so in FP8."""
        asked = scheme.fp8_all_reduce and scheme.is_static and self._rows.may_sum_in_fp8
        return asked and self._rows.peers(module).count > 1

    @property
    def _rows(self) -> type[FP8RowParallel]:
        assert issubclass(self.fp8_class, FP8RowParallel)
        return self.fp8_class

    def observe(self, target: Target, observers: Observers) -> None:
        if not self._rows.may_sum_in_fp8:
            super().observe(target, observers)
            return
        observers.attach_weight(target.name, target.module)
        if target.scheme.needs_ranges:
            observers.attach(target.name, target.module, outputs=False)
            see = partial(observers.observe, target.name)
            forward = partial(self._rows.measured, target.module, see)
            observers.add(MeasuredForward(target.module, forward))

    def missing(self, target: Target) -> Why | None:
        if (why := super().missing(target)) or not target.scheme.needs_ranges:
            return why
        unseen = self.sums_in_fp8(target.module, target.scheme) and not {PARTIAL, SUM} <= target.ranges.kinds
        return Why(Reason.NEVER_REACHED) if unseen else None

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        conversion, scheme = super().convert(target, model, quantize), target.scheme
        if self.sums_in_fp8(target.module, scheme):
            made: Any = conversion.replacement
            scales = self.scales_for(target)
            for name in _SUM_SCALES:
                setattr(made, name, frozen(scales[name].to(made.codes.device)))
        return conversion

    def expect(self, target: Target, saved: Mapping[str, tuple[int, ...]] | None) -> nn.Module | None:
        made: Any = super().expect(target, saved)
        if saved is not None and self.sums_in_fp8(target.module, target.scheme):
            made.partial_scale, made.output_scale = (
                frozen(torch.full((1,), torch.nan, dtype=torch.float32, device="meta")) for _ in range(2)
            )
        return made  # type: ignore[no-any-return]

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        scales, scheme, module = super().scales_for(target), target.scheme, target.module
        if getattr(module, "partial_scale", None) is None and not self.sums_in_fp8(module, scheme):
            return scales
        fixed = scheme.static_scale(torch.zeros(()))
        for name, kind in _SUM_SCALES.items():
            scales[name] = target.static_scale(kind) if scheme.needs_ranges else fixed
        return scales

    def run_time_scales(self, module: Any) -> dict[str, torch.Tensor]:
        own = {name: getattr(module, name) for name in _SUM_SCALES}
        return super().run_time_scales(module) | {name: scale for name, scale in own.items() if scale is not None}

    def rescale(self, module: Any, scales: Mapping[str, torch.Tensor]) -> None:
        super().rescale(module, scales)
        for name in scales.keys() & _SUM_SCALES.keys():
            setattr(module, name, frozen(scales[name].to(module.codes.device)))

    def rescheme(self, target: Target, fit: FitWeight) -> None:
        ModuleHandler.rescheme(self, target, fit)  # which refuses: each process would have to find the same scales

    def row(self, module: Any) -> Row | None:
        row = super().row(module)
        if row is not None and module.partial_scale is not None:
            return Row(**{**vars(row), "scheme": f"{row.scheme}, all-reduce of new tokens in FP8"})
        return row


def part_of(model: nn.Module) -> tuple[int, int] | None:
    """Which part of a model this process holds, and of how many, where layers are split over processes; else None."""
    kinds = [handler for handler in handlers() if isinstance(handler, ParallelHandler)]
    for module in model.modules():
        origin = getattr(module, "origin", module)
        for handler in kinds:
            if handler.base_of(origin) is not None and not handler.lacking(origin):
                peers = handler.peers(origin)
                if peers.count > 1:
                    return peers.rank, peers.count
    return None
