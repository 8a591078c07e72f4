"""`linear` with a dynamic scale as one operator: what compiled graphs call, which would pay for each of its steps.

It is composed of the operators that it stands for: with their kernels, their gradients and their records.
"""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch
from .arguments import LinearCall
from .declare import call, declare_composed
from .dynamic import DynamicScale
from .gradients import wants_gradient
from .records import record_of


def stands_for(arguments: LinearCall) -> bool:
    """While compiling: whether the operator takes the place of the steps of a call of `linear` by a rule. Where there
    is a gradient, a kernel whose own calls the compiler is to see, or an export, the steps are what is asked for."""
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or wants_gradient(arguments):
        return False
    return dispatch.traced_backend(arguments.x.device.type) == ""


def dynamic_linear(arguments: LinearCall) -> Any:
    """The operator, of a call of `linear` whose input scale is a rule."""
    x, weight, weight_scale, rule, bias, full_scale, arithmetic = arguments
    assert isinstance(rule, DynamicScale)
    return torch.ops.optimum_fp8.dynamic_linear(x, weight, weight_scale, bias, *rule, full_scale, arithmetic)


def _composed(x: Any, weight: Any, weight_scale: Any, bias: Any, *others: Any) -> Any:
    rule: Any = DynamicScale(*others[:6])
    arguments = LinearCall(x, weight, weight_scale, rule, bias, *others[6:])
    return call("linear", arguments, None if wants_gradient(arguments) else record_of([weight]))


declare_composed(
    "dynamic_linear",
    "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, int group, float divisor, str rounding, "
    "str fp8_config, str target, ScalarType hp_dtype, float full_scale, str arithmetic) -> Tensor",
    lambda x, weight, *others: x.new_empty((*x.shape[:-1], weight.shape[0])),
    _composed,
)
