"""The operators, declared once: schema, fake kernel (shapes under torch.compile), and a typed function to call.

`scale` always means the dequantization multiplier `s` (x ≈ codes · s), float32. `full_scale` is the value casts
saturate at. `owner` is the number of the module on whose account a call is counted (`dispatch.new_owner`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import FP8NotAvailableError
from . import dispatch, reference


class _Library(torch.library.Library):
    """The operators' library, where a call that is plain goes straight to its kernel.

    What torch makes of `register_autograd` takes longer than a small kernel, even where no gradient is wanted: compiled
    graphs, which call operators through the dispatcher, would pay for it with every token.
    """

    def impl(self, op_name, fn, dispatch_key="", **options):  # type: ignore[no-untyped-def]
        if dispatch_key == "Autograd":
            implementation, made_by_torch = _implementations[op_name], fn

            def fn(keyset, *args):  # type: ignore[no-untyped-def]
                found = dispatch.run_prepared(op_name, args[-1], *args[:-1]) if op_name in _counted else None
                if found is not None:
                    return found
                return implementation(*args) if dispatch.is_plain(*args) else made_by_torch(keyset, *args)

        super().impl(op_name, fn, dispatch_key, **options)


_library = _Library("optimum_fp8", "DEF")
_implementations: dict[str, Callable[..., Any]] = {}
_counted: set[str] = set()
_SCHEMAS = {
    "cast_to_fp8": "(Tensor x, Tensor scale, ScalarType dtype, float full_scale) -> Tensor",
    "cast_to_fp8_with_maxabs": "(Tensor x, Tensor scale, ScalarType dtype, float full_scale) -> (Tensor, Tensor)",
    "cast_to_fp8_by_range": "(Tensor x, Tensor scale_of_range, bool per_row, ScalarType dtype, float full_scale) -> "
    "(Tensor, Tensor, Tensor)",
    "cast_from_fp8": "(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    "maxabs": "(Tensor x, bool per_token) -> Tensor",
    "dynamic_scale": "(Tensor x, bool per_token, float divisor, str rounding, str fp8_config, str target, "
    "ScalarType hp_dtype) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, float full_scale, "
    "str arithmetic, int owner) -> Tensor",
    "linears": "(Tensor x, Tensor[] weights, Tensor[] weight_scales, Tensor?[] input_scales, Tensor?[] biases, "
    "float full_scale, str arithmetic, int[] owners) -> Tensor[]",
    "conv2d": "(Tensor x, Tensor weight, Tensor weight_scale, Tensor? input_scale, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, float full_scale, str arithmetic, int owner) -> Tensor",
}


def cast_to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    """Quantize: round-to-nearest-even of clamp(x · (1/scale), ±full_scale); NaN stays NaN, nothing else becomes it.

    Args:
        x: any shape, a floating-point dtype.
        scale: float32, `(1,)` or broadcastable to `x` (`(out, 1)` per channel, `(…, 1)` per token), or
            `(⌈out/128⌉, ⌈in/128⌉)` by blocks of an `x` of two dimensions.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        full_scale: 448, 240 (Gaudi2) or 57344 (E5M2).

    Returns:
        codes of `x`'s shape in `dtype`.
    """
    return call("cast_to_fp8", 0, x, scale, dtype, full_scale)


def cast_to_fp8_with_maxabs(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cast_to_fp8` and, in the same pass over `x`, its largest magnitude: codes, and float32 `(1,)` as `maxabs`."""
    return call("cast_to_fp8_with_maxabs", 0, x, scale, dtype, full_scale)


def cast_to_fp8_by_range(
    x: torch.Tensor, scale_of_range: torch.Tensor, *, per_row: bool, dtype: torch.dtype, full_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cast_to_fp8` with the scale that follows from `x`'s own range, or from that of each of its rows.

    Args:
        x: `[rows, …]`, a floating-point dtype.
        scale_of_range: float32 `[32768]`, the scale of every range there is in bfloat16, by its bits (NaN: 0x7FC0).
        per_row: one scale a row; else one for the tensor.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        full_scale: 448, 240 (Gaudi2) or 57344 (E5M2).

    Returns:
        contiguous codes of `x`'s shape; the scale and max|x| in float32, `(rows, 1, …)` or `(1,)`.
    """
    return call("cast_to_fp8_by_range", 0, x, scale_of_range, per_row, dtype, full_scale)


def cast_from_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize: x · scale in float32, rounded once to `dtype`; shapes as in `cast_to_fp8`."""
    return call("cast_from_fp8", 0, x, scale, dtype)


def maxabs(x: torch.Tensor, *, per_token: bool = False) -> torch.Tensor:
    """max|x| in float32: `(1,)`, or one a row, `[…, 1]`; NaN where there is a NaN, 0 where there is nothing."""
    return call("maxabs", 0, x, per_token)


def dynamic_scale(
    x: torch.Tensor,
    *,
    per_token: bool,
    divisor: float,
    rounding: str,
    fp8_config: str,
    target: str,
    hp_dtype: torch.dtype,
) -> torch.Tensor:
    """The scale of `x` from its own range: round(max|x| / divisor), as `scales.activation_scale(dynamic=True)`.

    Args:
        x: `[…, features]`, a floating-point dtype.
        per_token: one scale a row, float32 `[…, 1]`; else one for the tensor, float32 `(1,)`.
        divisor: full scale times backoff.
        rounding: "identity", "pow2" or "hardware" (of `fp8_config` on `target`).
        hp_dtype: the dtype the range is rounded to and divided in.
    """
    return call("dynamic_scale", 0, x, per_token, divisor, rounding, fp8_config, target, hp_dtype)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    full_scale: float,
    arithmetic: str = "fused",
    owner: int = 0,
) -> torch.Tensor:
    """y = (x_q · s_x)(w_q · s_w)ᵀ + bias with float32 accumulation; `reference.py` says where it rounds.

    Args:
        x: `[…, in]`, bfloat16, float16 or float32.
        weight: `[out, in]`, FP8.
        weight_scale: float32, `(1,)`, `(out, 1)`, or `(⌈out/128⌉, ⌈in/128⌉)` by blocks.
        input_scale: float32, `(1,)` or `[…, 1]`; None leaves `x` in high precision (weight-only).
        bias: `(out,)` or None.
        full_scale: the value activations saturate at.
        arithmetic: one of `ARITHMETICS`.

    Returns:
        `[…, out]` in `x`'s dtype.

    Raises:
        FP8OperandError: `x`, `weight` and `bias` do not fit one another.
        FP8ScaleError: `weight_scale` does not fit the weight.
    """
    return call("linear", owner, x, weight, weight_scale, input_scale, bias, full_scale, arithmetic)


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    input_scales: Sequence[torch.Tensor | None],
    biases: Sequence[torch.Tensor | None],
    *,
    full_scale: float,
    arithmetic: str = "fused",
    owners: Sequence[int],
) -> list[torch.Tensor]:
    """`linear` of one `x` with several weights, which a kernel can do in one go: arguments as there, one for each."""
    rest = (weights, weight_scales, input_scales, biases, full_scale, arithmetic)
    return call("linears", tuple(owners), x, *rest)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    full_scale: float,
    arithmetic: str = "fused",
    owner: int = 0,
) -> torch.Tensor:
    """2-D convolution with the arithmetic of `linear`.

    Args:
        x: `[N, C, H, W]` or `[C, H, W]`, bfloat16, float16 or float32.
        weight: `[out, C / groups, kh, kw]`, FP8.
        weight_scale: float32, `(1,)` or `(out, 1, 1, 1)`.
        input_scale: float32 `(1,)`, or None (weight-only).
        bias: `(out,)` or None.

    Returns:
        `[N, out, H', W']` (or `[out, H', W']`) in `x`'s dtype.
    """
    geometry = (stride, padding, dilation, groups)
    return call("conv2d", owner, x, weight, weight_scale, input_scale, bias, *geometry, full_scale, arithmetic)


def call(op: str, owner: int | tuple[int, ...], x: torch.Tensor, *rest: Any) -> Any:
    """Through torch's dispatcher, where something on the way wants to see the call; else at once."""
    found = dispatch.run_prepared(op, owner, x, *rest) if owner else None
    if found is not None:
        return found
    if dispatch.is_plain(x, *rest):
        return dispatch.run(op, owner, x, *rest)
    arguments = (x, *rest, owner) if op in _counted else (x, *rest)
    return getattr(torch.ops.optimum_fp8, op)(*arguments)


def _fake_cast(x, scale, dtype, full_scale=0.0):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype)


def _fake_cast_with_maxabs(x, scale, dtype, full_scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype), x.new_empty((1,), dtype=torch.float32)


def _fake_cast_by_range(x, scale_of_range, per_row, dtype, full_scale):  # type: ignore[no-untyped-def]
    shape = (x.shape[0], *[1] * (x.ndim - 1)) if per_row else (1,)
    return (x.new_empty(x.shape, dtype=dtype), *(x.new_empty(shape, dtype=torch.float32) for _ in range(2)))


def _fake_maxabs(x, per_token):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32)


def _fake_dynamic_scale(x, per_token, divisor, rounding, fp8_config, target, hp_dtype):  # type: ignore[no-untyped-def]
    return _fake_maxabs(x, per_token)


def _fake_linear(x, weight, weight_scale, input_scale, bias, full_scale, arithmetic, owner):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linears(x, weights, *rest):  # type: ignore[no-untyped-def]
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_conv2d(x, weight, weight_scale, input_scale, bias, stride, padding, dilation, groups, *rest):  # type: ignore[no-untyped-def]
    return F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups)


_FAKES: dict[str, Callable[..., Any]] = {
    "cast_to_fp8": _fake_cast,
    "cast_to_fp8_with_maxabs": _fake_cast_with_maxabs,
    "cast_to_fp8_by_range": _fake_cast_by_range,
    "cast_from_fp8": _fake_cast,
    "maxabs": _fake_maxabs,
    "dynamic_scale": _fake_dynamic_scale,
    "linear": _fake_linear,
    "linears": _fake_linears,
    "conv2d": _fake_conv2d,
}


def _no_backward(op: str):  # type: ignore[no-untyped-def]
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        raise FP8NotAvailableError(
            f"there is no gradient through optimum_fp8::{op}: FP8 modules are for inference; "
            "call optimum_fp8.dequantize(model) to fine-tune, or run under torch.no_grad()"
        )

    return backward


def declare(op: str, schema: str, fake: Callable[..., Any], defined_by: Callable[..., Any], *, counted: bool) -> None:
    """Make `op` known to torch and to the dispatch. A `counted` operator's last argument is its owner."""

    def implementation(*args):  # type: ignore[no-untyped-def]
        return dispatch.run(op, args[-1], *args[:-1]) if counted else dispatch.run(op, 0, *args)

    _implementations[op] = implementation
    if counted:
        _counted.add(op)
    _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optimum_fp8::{op}", fake, lib=_library)
    torch.library.register_autograd(f"optimum_fp8::{op}", _no_backward(op), lib=_library)
    dispatch.register_kernel(op, dispatch.Kernel(dispatch.REFERENCE, None, defined_by))


for _op, _schema in _SCHEMAS.items():
    declare(_op, _schema, _FAKES[_op], getattr(reference, _op), counted=_op in ("linear", "linears", "conv2d"))
