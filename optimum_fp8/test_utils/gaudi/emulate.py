"""`emulated`: the operators of the bridge on CPU tensors, for the time of a `with` block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ...errors import FP8ConfigError, FP8StateError, nearest
from . import attention, casts, conv, experts, gemm, reductions, reorder, softmax
from .bridge import stand_in
from .calls import Arguments
from .device import BRIDGES, CHIPS, Device
from .schemas import SCHEMAS

NAMESPACE = "hpu"
Function = Callable[[Arguments, Device], Any]


@dataclass(frozen=True)
class Operator:
    """An operator with all its overloads.

    Attributes:
        check: refuses arguments by their shapes and dtypes, and gives outputs without contents.
        compute: gives outputs of those shapes and dtypes.
    """

    check: Function
    compute: Function


OPERATORS = {
    "cast_to_fp8_v2": Operator(casts.check_cast_to, casts.cast_to),
    "cast_to_fp8_hybrid": Operator(casts.check_cast_to_hybrid, casts.cast_to_hybrid),
    "cast_from_fp8": Operator(casts.check_cast_from, casts.cast_from),
    "fp8_gemm": Operator(gemm.check_gemm_out, gemm.gemm_out),
    "fp8_gemm_v2": Operator(gemm.check_gemm, gemm.gemm),
    "conv2d_fp8": Operator(conv.check_conv, conv.conv),
    "softmax_fp8": Operator(softmax.check_softmax, softmax.softmax),
    "sum_fp8": Operator(reductions.check_sum, reductions.sum_fp8),
    "calculate_scale_for_cast": Operator(reductions.check_calculate_scale, reductions.calculate_scale),
    "cast_to_fp8_just_in_time": Operator(reductions.check_cast_just_in_time, reductions.cast_just_in_time),
    "kv_reorder": Operator(reorder.check_reordered, reorder.reordered),
    "kv_reorder_": Operator(reorder.check_reorder, reorder.reorder_),
    "in_place_interleave": Operator(reorder.check_interleaved, reorder.interleaved),
    "in_place_interleave_": Operator(reorder.check_interleave, reorder.interleave_),
    "sdpa_recomp_fwd": Operator(attention.check_recompute, attention.recompute),
    "fp8_sdpa_recomp_fwd": Operator(attention.check_fp8_recompute, attention.fp8_recompute),
    "fp8_sdpa_fwd": Operator(attention.check_fp8, attention.fp8),
    "mixture_of_experts": Operator(experts.check_experts, experts.experts),
}

IN_PLACE = ("kv_reorder_", "in_place_interleave_")


def _bind(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments by their names in the schema; the dispatcher leaves defaults out."""
    named = {argument.name: argument.default_value for argument in schema.arguments}
    named.update(zip(named, args, strict=False))
    return Arguments(**named | kwargs)


def _register(library: torch.library.Library, schema: str, device: Device) -> None:
    library.define(schema)
    full_name = schema.partition("(")[0]
    name, _, overload = full_name.partition(".")
    operator, parsed = OPERATORS[name], torch._C.parse_schema(f"{NAMESPACE}::{schema}")

    def check(*args: Any, **kwargs: Any) -> Any:
        return operator.check(_bind(parsed, args, kwargs), device)

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = _bind(parsed, args, kwargs)
        operator.check(arguments, device)
        device.record(name, overload or "default", arguments)
        with torch.device("cpu"):  # whatever device is the default
            return operator.compute(arguments, device)

    library.impl(full_name, check, "Meta")
    library.impl(full_name, run, "CPU")


def _make_functional(in_place: str) -> None:
    """Tell compilers how an operator in place is written without: as the one of the same name without underscore."""

    def functional(context: Any, x: Any, *args: Any) -> Any:
        with context.redispatch_to_next():
            out = getattr(torch.ops.hpu, in_place.removesuffix("_"))(*context.unwrap_tensors((x, *args)))
        context.replace(x, out)
        context.commit_update(x)
        context.sync(x)
        return x

    getattr(torch.ops.hpu, in_place).default.py_functionalize_impl(functional)


def _require_known(value: str, known: Any, what: str) -> None:
    if value not in known:
        raise FP8ConfigError(f"emulated: {what}={value!r} is unknown: {nearest(value, known)}")


@contextmanager
def emulated(chip: str, *, bridge: str = BRIDGES[-1], lazy: bool = True, seed: int = 0) -> Iterator[Device]:
    """Have `torch.ops.hpu` and `habana_frameworks` within a `with` block, computed on the CPU; afterwards not.

    Tensors stay where they are: there is no device called "hpu". Only inference is emulated, no gradients.

    Args:
        chip: "gaudi2" or "gaudi3".
        bridge: the generation of the PyTorch bridge: which operators and overloads there are.
        lazy: lazy mode, in which start-up calls mark tensors as constant.
        seed: of stochastic rounding.

    Yields:
        The device, with a record of what was asked of it.

    Raises:
        FP8ConfigError: an unknown chip or bridge.
        FP8StateError: there is a bridge already, a real or an emulated one.
    """
    _require_known(chip, CHIPS, "chip")
    _require_known(bridge, BRIDGES, "bridge")
    if "habana_frameworks" in sys.modules or find_spec("habana_frameworks") is not None:
        raise FP8StateError("emulated: habana_frameworks is there already; emulate only without it, one at a time")
    device = Device(CHIPS[chip], bridge, lazy, seed)
    library = torch.library.Library(NAMESPACE, "DEF")
    try:
        for schema in SCHEMAS[bridge]:
            _register(library, schema, device)
        for in_place in IN_PLACE:
            _make_functional(in_place)
        with stand_in(device):
            yield device
    finally:
        library._destroy()
