"""The reference of gradients: plain torch that defines them on any device.

A gradient is formed of values in float32, accumulated in float32 and rounded once, to its own dtype. The weight is what
its codes and scales say, in float32, whichever the arithmetic of the product was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import FP8OperandError
from ..formats import is_fp8
from .arguments import LinearInputGradientCall
from .operands import broadcast_scale, check_weight_scale, is_along_input
from .straight_through import saturates, straight_through


def linear_input_gradient(call: LinearInputGradientCall) -> torch.Tensor:
    _check_linear(call)
    weight, scale, grad = call.weight.float(), call.weight_scale, call.grad.float()
    if is_along_input(scale, call.weight):
        weight = weight * broadcast_scale(scale, call.weight)
    else:
        grad = grad * scale.reshape(-1)
    return zero_where_saturated((grad @ weight).to(call.grad.dtype), call.x, call.input_scale, call.full_scale)


def zero_where_saturated(
    gradient: torch.Tensor, x: torch.Tensor | None, scale: torch.Tensor | None, full_scale: float
) -> torch.Tensor:
    """`gradient`, in which zeros are written where the cast of `x` by `scale` saturates; nowhere without them."""
    if x is None or scale is None:
        return gradient
    return gradient.masked_fill_(saturates(x, scale, full_scale), 0)


def recompute(reference: Callable[[Any], torch.Tensor], call: Any) -> list[torch.Tensor]:
    """The gradients of an operator by torch's autograd, through its reference.

    Args:
        reference: the definition of the operator.
        call: the gradient of the result; the names of the arguments whose gradients are wanted, and of those that count
            as constants though they follow from others, as dynamic scales do; then the operator's own arguments.
    """
    own = {name: getattr(call, name) for name in call.operator._fields}
    wanted = {name: own[name].detach().requires_grad_() for name in call.wanted}
    constants = {name: own[name].detach().requires_grad_() for name in call.constants}
    with _autograd(), straight_through():
        result = reference(call.operator(**own | wanted | constants))
        found = torch.autograd.grad(result, list(wanted.values()), call.grad, allow_unused=True)
    pairs = zip(found, wanted.values(), strict=True)
    return [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]


@contextmanager
def _autograd() -> Iterator[None]:
    """Record operations for their gradients, inside of an operator too, where torch no longer does."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(included, excluded - _AUTOGRAD):
        yield


def _keys_of_autograd() -> Any:
    """What torch leaves out below autograd: keys that are not all known by name."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._AutoDispatchBelowAutograd():
        return torch._C._dispatch_tls_local_exclude_set() - excluded


_AUTOGRAD = _keys_of_autograd()


def _check_linear(call: LinearInputGradientCall) -> None:
    """Refuse operands that do not belong together.

    Raises:
        FP8OperandError: names what was found and expected.
        FP8ScaleError: a scale does not fit the weight, or the input.
    """
    grad, weight, x = call.grad, call.weight, call.x
    if is_fp8(grad.dtype) or not grad.is_floating_point() or not is_fp8(weight.dtype):
        raise FP8OperandError(
            f"linear_input_gradient: a gradient in {grad.dtype} and a weight in {weight.dtype}: expected a gradient in "
            "high precision and a weight in FP8 (codes that are held as bytes are seen as FP8 by .view(dtype))"
        )
    if weight.ndim != 2 or grad.ndim == 0 or grad.shape[-1] != weight.shape[0]:
        raise FP8OperandError(
            f"linear_input_gradient: a gradient of shape {tuple(grad.shape)} and a weight of shape "
            f"{tuple(weight.shape)}: expected (…, out) and (out, in)"
        )
    if x is not None and x.shape != (*grad.shape[:-1], weight.shape[1]):
        raise FP8OperandError(
            f"linear_input_gradient: an input of shape {tuple(x.shape)} for a gradient of shape {tuple(grad.shape)} "
            f"and a weight of shape {tuple(weight.shape)}: expected {(*grad.shape[:-1], weight.shape[1])}"
        )
    check_weight_scale(call.weight_scale, weight)
