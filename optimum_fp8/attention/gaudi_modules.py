"""Helper modules of model files for Gaudi that are one operation of attention: `Softmax` and `ModuleFusedSDPA`.

As with any attention module, the plan says what becomes of an operation. (A `Matmul` runs in `function_mode`.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError
from ..modules.handler import Target, register_handler
from ..scales import Scheme
from .detect import Kind
from .function_mode import AttentionMode
from .handler import AttentionHandler, softmax_scale
from .handlers import WholeAttention, stores_keys
from .plan import plan_of
from .scale_module import scale_of

_SDPA_ARGUMENTS = (
    *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "softmax_mode", "recompute_mode"),
    *("valid_sequence_lengths", "padding_side"),
)
# How the kernel is to compute, not what.
_SDPA_MODES = ("softmax_mode", "recompute_mode", "padding_side")


def round_softmax(module: Any) -> None:
    """Have the output of a `Softmax` rounded to FP8, or observed, as its plan says."""
    leave_softmax(module)
    module.register_forward_hook(_softmax)


def leave_softmax(module: Any) -> None:
    """Take the hook of `round_softmax` off."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _softmax]:
        del module._forward_hooks[key]


def _softmax(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
    plan = plan_of(module)
    if plan is not None and plan.observe is not None:
        plan.observe("p", output)
    if plan is None or plan.scheme is None:
        return None
    scale, fmt = scale_of(module, "p_scale"), plan.scheme.fmt
    assert scale is not None
    codes = ops.cast_to_fp8(output, scale, fmt.dtype, fmt.full_scale)
    return ops.cast_from_fp8(codes, scale, output.dtype)


def override_sdpa(module: Any) -> None:
    """Replace the forward of a `ModuleFusedSDPA` by attention in FP8, whatever kernel it holds."""
    leave_sdpa(module)
    module.__dict__["forward"] = partial(_sdpa, module, module.forward)


def leave_sdpa(module: Any) -> None:
    """Put the forward of a `ModuleFusedSDPA` back."""
    if getattr(module.__dict__.get("forward"), "func", None) is _sdpa:
        del module.__dict__["forward"]


def _sdpa(module: Any, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    plan = plan_of(module)
    if plan is None:
        return original(*args, **kwargs)
    given = dict(zip((*_SDPA_ARGUMENTS, "further arguments"), args, strict=False)) | kwargs
    query, key, value = given.pop("query"), given.pop("key"), given.pop("value")
    mask, dropout, is_causal, scale = (given.pop(name, None) for name in _SDPA_ARGUMENTS[3:7])
    unknown = [name for name, argument in given.items() if name not in _SDPA_MODES and argument is not None]
    if plan.scheme is not None and unknown:
        raise FP8NotAvailableError(
            f"{plan.name} (ModuleFusedSDPA) was given {', '.join(unknown)}, which attention in FP8 does not take: pass "
            "an attn_mask (flash_attention_causal_mask=False), or put the module on the blocklist"
        )
    output = AttentionMode(module, plan).fused(
        partial(original, *args, **kwargs), query, key, value, mask, dropout or 0.0, bool(is_causal), scale
    )
    if plan.observe is not None:
        plan.observe("output", output)
    return output


class SoftmaxHandler(AttentionHandler):
    """`Softmax` modules: their output is rounded."""

    kind, way, types = "attention softmax", Kind.SOFTMAX, ("Softmax",)

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return False

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return ()

    def enter(self, module: Any) -> None:
        round_softmax(module)

    def leave(self, module: Any) -> None:
        leave_softmax(module)

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        return {"p_scale": softmax_scale(target.scheme)} if target.scheme.rounds_attention else {}

    def expected(self, scheme: Scheme) -> tuple[str, ...]:
        return ("p_scale",) if scheme.rounds_attention else ()


class FusedHandler(WholeAttention):
    """`ModuleFusedSDPA` modules: attention as a whole."""

    kind, way, types = "attention fused", Kind.FUSED, ("ModuleFusedSDPA",)

    def reads_cache(self, module: Any, model: nn.Module) -> bool:
        return stores_keys(model)

    def tells(self, scheme: Scheme) -> tuple[str, ...]:
        return ("q",) if scheme.rounds_attention else ()

    def enter(self, module: Any) -> None:
        override_sdpa(module)

    def leave(self, module: Any) -> None:
        leave_sdpa(module)


for _handler in (SoftmaxHandler(), FusedHandler()):
    register_handler(_handler)
