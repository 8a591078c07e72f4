"""Gradients of operators: the kernel that each has at torch's key "Autograd".

An operator rounds its inputs to FP8, a step function whose derivative is zero almost everywhere. Its gradient is the
straight-through one: that of the same operator without the rounding, and zero where the rounding saturates. Codes and
scales are constants, and have none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from ..errors import FP8NotAvailableError
from ..formats import is_fp8
from .prepared import is_plain

_NO_GRADIENT = (
    "there is no gradient through optimum_fp8::{}: call optimum_fp8.dequantize(model) to fine-tune all of it, put the "
    "module that calls this on the blocklist, or run it under torch.no_grad()"
)
_NOT_FORWARDS = (
    "there is no gradient through optimum_fp8::{} in forward mode (torch.func.jvp, dual tensors): take it backwards, "
    "or of what optimum_fp8.dequantize(model) returns"
)

_OF_CODES = (
    "there is no gradient through optimum_fp8::{} for codes that were cast to FP8 from what wants one: give it "
    "what they were cast from, and scales"
)
_ONLY_ONCE = (
    "there is no gradient through the gradient of optimum_fp8::{} (create_graph=True): take second derivatives of what "
    "optimum_fp8.dequantize(model) returns"
)


@dataclass(frozen=True)
class Gradient:
    """The gradient of one operator.

    Attributes:
        keep: from a call and the names of the arguments that want a gradient, the call as it is kept until then: with
            None in the place of tensors that are not needed.
        of: from the call that was kept, the gradients of its results (one that is None is zero) and those names, the
            gradients of its arguments by name; those left out have none.
    """

    keep: Callable[[Any, Collection[str]], Any]
    of: Callable[[Any, tuple[torch.Tensor | None, ...], Collection[str]], Mapping[str, torch.Tensor]]


def without(call: Any, *names: str) -> Any:
    """The call with None in the place of these arguments."""
    return call._replace(**dict.fromkeys(names))


CONSTANT = Gradient(lambda call, wanted: without(call, "x"), lambda call, gradients, wanted: {})
"""Of an operator whose result counts as a constant, however it follows from the arguments."""


def recomputed(op: str, names: tuple[str, ...]) -> Gradient:
    """The gradient of an operator with one result by the operator `<op>_gradient`, which computes it again.

    Args:
        op: its name.
        names: the arguments that have a gradient.
    """

    def of(call: Any, gradients: tuple[torch.Tensor | None, ...], wanted: Collection[str]) -> dict[str, torch.Tensor]:
        found = [name for name in names if name in wanted]
        if any(is_fp8(getattr(call, name).dtype) for name in found):
            raise FP8NotAvailableError(_OF_CODES.format(op))
        operator = getattr(torch.ops.optimum_fp8, f"{op}_gradient")
        constants = [name for name in wanted if name not in names]
        return dict(zip(found, operator(gradients[0], found, constants, *call), strict=True)) if found else {}

    return Gradient(lambda call, wanted: call, of)


def wants_gradient(arguments: Any) -> bool:
    """Whether a call on these arguments is to be recorded for a gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments
    )


def autograd_kernel(
    op: str, arguments: Any, implementation: Callable[..., Any], gradient: Gradient | None
) -> Callable[..., Any]:
    """The operator's kernel at the key "Autograd": a plain call goes straight to its kernel, which is quicker than what
    torch makes of `register_autograd`; without a `gradient`, one that is wanted is refused when it is asked for."""
    below = _below_autograd(op)
    function = _function(op, arguments, below, gradient)

    def kernel(keyset: Any, *args: Any) -> Any:
        if is_plain(args):
            return implementation(*args)
        if any(_has_tangent(arg) for arg in args):
            raise FP8NotAvailableError(_NOT_FORWARDS.format(op))
        return function.apply(keyset, *args) if wants_gradient(args) else below(keyset, *args)

    return kernel


def composed_autograd_kernel(op: str, composed: Callable[..., Any]) -> Callable[..., Any]:
    """As `autograd_kernel`, of an operator that is composed of others, which are differentiated in its place."""
    below = _below_autograd(op)

    def kernel(keyset: Any, *args: Any) -> Any:
        if is_plain(args) or wants_gradient(args) or any(_has_tangent(arg) for arg in args):
            return composed(*args)
        return below(keyset, *args)

    return kernel


def _below_autograd(op: str) -> Callable[..., Any]:
    """The operator's kernel at the keys behind "Autograd"."""
    overload = getattr(torch.ops.optimum_fp8, op).default

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return below


def _function(
    op: str, arguments: Any, below: Callable[..., Any], gradient: Gradient | None
) -> type[torch.autograd.Function]:
    names: tuple[str, ...] = arguments._fields

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            if gradient is not None:
                ctx.wanted = [name for name, needed in zip(names, ctx.needs_input_grad[1:], strict=True) if needed]
                kept = gradient.keep(arguments._make(args), ctx.wanted)
                ctx.is_saved = [_can_be_saved(argument) for argument in kept]
                pairs = list(zip(kept, ctx.is_saved, strict=True))
                ctx.others = [None if is_saved else argument for argument, is_saved in pairs]
                ctx.save_for_backward(*[argument for argument, is_saved in pairs if is_saved])
            return below(keyset, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
            if all(each is None for each in gradients):
                return (None,) * (1 + len(names))
            if gradient is None:
                raise FP8NotAvailableError(_NO_GRADIENT.format(op))
            tensors = iter(ctx.saved_tensors)
            pairs = zip(ctx.is_saved, ctx.others, strict=True)
            kept = arguments._make(next(tensors) if is_saved else other for is_saved, other in pairs)
            with torch.no_grad():
                found = gradient.of(kept, gradients, ctx.wanted)
            if torch.is_grad_enabled():  # another derivative may be wanted
                tensors = [argument for argument in (*gradients, *kept) if isinstance(argument, torch.Tensor)]
                found = {name: _Once.apply(op, value, *tensors) for name, value in found.items()}
            return None, *[found.get(name) for name in names]

    Differentiated.__name__ = f"optimum_fp8_{op}"
    return Differentiated


class _Once(torch.autograd.Function):
    """A gradient that has none of its own with respect to what it follows from."""

    @staticmethod
    def forward(ctx: Any, op: str, value: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.op = op
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise FP8NotAvailableError(_ONLY_ONCE.format(ctx.op))


def _can_be_saved(argument: Any) -> bool:
    """Whether autograd keeps it and watches for changes; of a tensor made in inference mode it sees none."""
    return isinstance(argument, torch.Tensor) and not argument.is_inference()


def _has_tangent(argument: Any) -> bool:
    """Whether it carries a gradient forwards, as inside of torch.func.jvp."""
    if forward_ad._current_level < 0 or not isinstance(argument, torch.Tensor):
        return False
    return forward_ad.unpack_dual(argument).tangent is not None
