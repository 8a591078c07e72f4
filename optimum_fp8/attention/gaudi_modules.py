"""Helper modules of model files for Gaudi that are one operation of attention: `Softmax` and `B2BMatmul`.

As with any attention module, the plan says what becomes of an operation. (Products run in `function_mode`.)
`BlockSoftmaxConstMax` is a softmax over the blocks of a cache: its own operator computes it in high precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..formats import NumberFormat
from ..modules.handler import Target, register_handler
from ..scales import Scheme
from .detect import Kind
from .handler import AttentionHandler, softmax_scale
from .handlers import ProductHandler
from .plan import plan_of
from .scale_module import scale_of


def round_softmax(module: Any) -> None:
    """Have the output of a `Softmax` rounded to FP8, or observed, as its plan says."""
    leave_softmax(module)
    module.register_forward_hook(_softmax, with_kwargs=True)


def leave_softmax(module: Any) -> None:
    """Take the hook of `round_softmax` off."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _softmax]:
        del module._forward_hooks[key], module._forward_hooks_with_kwargs[key]


def _softmax(module: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor | None:
    plan = plan_of(module)
    if plan is not None and plan.observe is not None:
        plan.observe("p", output)
    if plan is None or plan.scheme is None:
        return None
    scale, fmt = scale_of(module, "p_scale"), plan.scheme.fmt
    assert scale is not None
    if fmt.is_gaudi and plan.scheme.dataflow != "qdq" and type(module).__name__ == "Softmax":
        return _rounded_once(*args, **kwargs, scale=scale, fmt=fmt, record=plan.record)
    codes = ops.cast_to_fp8(output, scale, fmt.dtype, fmt.full_scale)
    return ops.cast_from_fp8(codes, scale, output.dtype)


def _rounded_once(
    x: torch.Tensor,
    dim: int | None = None,
    factor: torch.Tensor | float | None = None,
    *,
    scale: torch.Tensor,
    fmt: NumberFormat,
    record: ops.CallRecord,
    **named: torch.Tensor | float | None,
) -> torch.Tensor:
    """The softmax anew, as INC's operator on Gaudi gives it: of x · factor, rounded to FP8 and to nothing before.

    The factor goes by several names. What the module itself computed is not used: compilers leave it out.
    """
    factor = next((each for each in (factor, *named.values()) if each is not None), None)
    if factor is not None:
        factor = torch.as_tensor(factor, dtype=torch.float32, device=x.device)
    options: dict[str, Any] = {"dtype": fmt.dtype, "full_scale": fmt.full_scale, "record": record}
    return ops.softmax(x, scale, factor, dim=-1 if dim is None else dim, **options)


class SoftmaxHandler(AttentionHandler):
    """`Softmax` modules, of whole rows or over blocks: their output is rounded."""

    kind, way, types = "attention softmax", Kind.SOFTMAX, ("Softmax", "BlockSoftmaxConstMax")

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return False

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return ()

    def enter(self, module: Any) -> None:
        round_softmax(module)

    def leave(self, module: Any) -> None:
        leave_softmax(module)

    def own_scales(self, target: Target) -> dict[str, torch.Tensor]:
        return {"p_scale": softmax_scale(target.scheme)} if target.scheme.rounds_attention else {}

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        return ("p_scale",) if scheme.rounds_attention else ()


class MappingHandler(ProductHandler):
    """`B2BMatmul` modules: products with a matrix that says which block of a cache belongs to which sequence."""

    kind, way, types = "attention mapping", Kind.MAPPING, ("B2BMatmul",)

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return False


for _handler in (SoftmaxHandler(), MappingHandler()):
    register_handler(_handler)
