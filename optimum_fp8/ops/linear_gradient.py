"""The gradient of a product with an FP8 weight with respect to its input: an operator as the product is one."""

from __future__ import annotations

import torch

from . import reference_gradients
from .arguments import LinearInputGradientCall
from .declare import call, declare
from .records import CallRecord


def linear_input_gradient(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    *,
    full_scale: float,
    record: CallRecord | None = None,
) -> torch.Tensor:
    """∂/∂x of `linear`: grad (w_q · s_w) with float32 accumulation, rounded once; 0 where x saturated.

    The rounding of x to FP8 counts as the identity (straight-through), whatever the arithmetic of the product.

    Args:
        grad: the gradient of the product's result, `[…, out]`, bfloat16, float16 or float32.
        weight: `[out, in]`, FP8.
        weight_scale: as `linear` takes it.
        x: the input `[…, in]` of the product, where it may saturate; None: nowhere (weight-only, dynamic scales).
        input_scale: its scale, as `linear` takes it; None with `x`.
        full_scale: the value the input saturates at: the gradient is 0 where |x / input_scale| is above.
        record: counts the call for the module that makes it.

    Returns:
        `[…, in]` in `grad`'s dtype.

    Raises:
        FP8OperandError: `grad`, `weight` and `x` do not fit one another.
        FP8ScaleError: a scale does not fit what it belongs to.
    """
    arguments = LinearInputGradientCall(grad, weight, weight_scale, x, input_scale, full_scale)
    return call("linear_input_gradient", arguments, record)


def _fake(call: LinearInputGradientCall) -> torch.Tensor:
    return call.grad.new_empty((*call.grad.shape[:-1], call.weight.shape[1]))


declare(
    "linear_input_gradient",
    "(Tensor grad, Tensor weight, Tensor weight_scale, Tensor? x, Tensor? input_scale, float full_scale) -> Tensor",
    LinearInputGradientCall,
    _fake,
    reference_gradients.linear_input_gradient,
    attributed_by=("weight",),
)
