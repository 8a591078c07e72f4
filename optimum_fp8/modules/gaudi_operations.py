"""Helper modules of model files for Gaudi that are one operation of attention: `Softmax` and `ModuleFusedSDPA`.

As with any attention module, the plan says what becomes of an operation. (A `Matmul` is seen as in `overriding`.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError
from .attention import plan_of
from .overriding import Overriding

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "softmax_mode", "recompute_mode")
_SDPA_ARGUMENTS = (*_SDPA, "valid_sequence_lengths", "padding_side")


def round_softmax(module: nn.Module) -> None:
    """Look at what a `Softmax` returns from now on."""
    leave_softmax(module)
    module.register_forward_hook(_softmax)


def leave_softmax(module: nn.Module) -> None:
    """Let a `Softmax` compute on its own again."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _softmax]:
        del module._forward_hooks[key]


def _softmax(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
    plan = plan_of(module)
    if plan is not None and plan.observe is not None:
        plan.observe("p", output)
    if plan is None or plan.recipe is None:
        return None
    scale, fmt = module.p_scale, plan.recipe.fmt
    codes = ops.cast_to_fp8(output, scale, fmt.dtype, fmt.full_scale)
    return ops.cast_from_fp8(codes, scale, output.dtype)


def override_sdpa(module: nn.Module) -> None:
    """Compute what a `ModuleFusedSDPA` computes in its place from now on, whatever kernel it holds."""
    leave_sdpa(module)
    module.__dict__["forward"] = partial(_sdpa, module, module.forward)


def leave_sdpa(module: nn.Module) -> None:
    """Let a `ModuleFusedSDPA` compute on its own again."""
    if getattr(module.__dict__.get("forward"), "func", None) is _sdpa:
        del module.__dict__["forward"]


def _sdpa(module: nn.Module, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    plan = plan_of(module)
    if plan is None:
        return original(*args, **kwargs)
    given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
    if plan.recipe is not None and given.get("valid_sequence_lengths") is not None:
        raise FP8NotAvailableError(
            f"{type(module).__name__} was given valid_sequence_lengths, but attention in FP8 takes a mask: pass "
            "attn_mask, with flash_attention_causal_mask=False, or put the module on the blocklist"
        )
    output = Overriding(module, plan).fused(
        partial(original, *args, **kwargs),
        *(given[name] for name in _SDPA[:3]),
        given.get("attn_mask"),
        given.get("dropout_p") or 0.0,
        bool(given.get("is_causal")),
        given.get("scale"),
    )
    if plan.observe is not None:
        plan.observe("output", output)
    return output
