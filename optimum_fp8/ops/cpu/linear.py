"""Products with FP8 weights on the native library. What does not depend on the input is packed once, and used again for
as long as the weights, scales and biases stay what and where they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from struct import Struct

import torch
import torch.nn.functional as F

from ..reference import ARITHMETICS, BLOCK, is_blocked
from .kernels import FORMATS, TYPES, CpuKernels, refuses_format, refuses_input_scale, refuses_scales
from .library import Library, check, threads

_OF_A_CALL, _THAT_STAYS = Struct("=10q"), Struct("=10qd")  # fp8cpu_linear_args
_CPU = torch.device("cpu")


class Linear:
    """The operators `linear` and `linears` on one variant of the library."""

    def __init__(self, kernels: CpuKernels):
        self.kernels = kernels

    def refuses_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        full_scale: float,
        arithmetic: str,
    ) -> str | None:
        if x.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"inputs in {x.dtype} with weights in {weight.dtype}"
        out, k = weight.shape if weight.ndim == 2 else (0, 0)
        if not k or x.ndim == 0 or x.shape[-1] != k or not weight.is_contiguous():
            return f"an input of {tuple(x.shape)} with weights of {tuple(weight.shape)}, strides {weight.stride()}"
        if bias is not None and (bias.dtype not in TYPES or bias.shape != (out,)):
            return f"a bias of {tuple(bias.shape)} in {bias.dtype}"
        if arithmetic not in ARITHMETICS:
            return "unknown arithmetic"  # the reference says which are known
        if input_scale is not None and (reason := refuses_format(weight.dtype, full_scale)):
            return reason
        return refuses_scales(x, weight_scale, input_scale)

    def refuses_linears(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        weight_scales: Sequence[torch.Tensor],
        input_scales: Sequence[torch.Tensor | None],
        biases: Sequence[torch.Tensor | None],
        full_scale: float,
        arithmetic: str,
    ) -> str | None:
        for one in zip(weights, weight_scales, input_scales, biases, strict=True):
            reason = self.refuses_linear(x, *one, full_scale, arithmetic)
            if reason is not None:
                return reason
        return None

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        full_scale: float,
        arithmetic: str,
    ) -> torch.Tensor:
        return self.linears(x, [weight], [weight_scale], [input_scale], [bias], full_scale, arithmetic)[0]

    def linears(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        weight_scales: Sequence[torch.Tensor],
        input_scales: Sequence[torch.Tensor | None],
        biases: Sequence[torch.Tensor | None],
        full_scale: float,
        arithmetic: str,
    ) -> list[torch.Tensor]:
        if arithmetic == "qdq":
            each = zip(weights, weight_scales, input_scales, biases, strict=True)
            return [self.kernels.qdq(F.linear, x, *one, full_scale) for one in each]
        # The copies that `contiguous` may make must live until the call returns.
        scales = [scale.contiguous() for scale in weight_scales]
        added = [None if bias is None else bias.contiguous() for bias in biases]
        return self._packed(weights, scales, added, full_scale, arithmetic)(x, input_scales)

    def prepare_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        full_scale: float,
        arithmetic: str,
    ) -> Callable[..., torch.Tensor | None] | None:
        again = self.prepare_linears(x, [weight], [weight_scale], [input_scale], [bias], full_scale, arithmetic)
        if again is None:
            return None

        def linear(x, weight, weight_scale, input_scale, bias, *rest):  # type: ignore[no-untyped-def]
            outputs = again(x, (weight,), (weight_scale,), (input_scale,), (bias,), *rest)
            return None if outputs is None else outputs[0]

        return linear

    def prepare_linears(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        weight_scales: Sequence[torch.Tensor],
        input_scales: Sequence[torch.Tensor | None],
        biases: Sequence[torch.Tensor | None],
        full_scale: float,
        arithmetic: str,
    ) -> Callable[..., list[torch.Tensor] | None] | None:
        stay = (*weights, *weight_scales, *biases)
        if arithmetic == "qdq" or not all(tensor is None or tensor.is_contiguous() for tensor in stay):
            return None
        packed = self._packed(weights, weight_scales, biases, full_scale, arithmetic)
        return _Again(packed, x.dtype, stay, (full_scale, arithmetic))

    def _packed(
        self,
        weights: Sequence[torch.Tensor],
        weight_scales: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        full_scale: float,
        arithmetic: str,
    ) -> _Packed:
        each = zip(weights, weight_scales, biases, strict=True)
        parts = [(one[0].shape[0], _pack(*one, full_scale, arithmetic)) for one in each]
        return _Packed(self.kernels.library, self.kernels.variant, weights[0].shape[1], parts)


def _pack(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, full_scale: float, arithmetic: str
) -> bytes:
    """What stays from call to call."""
    out, k = weight.shape
    per_channel = scale.numel() > 1
    blocked = per_channel and is_blocked(scale, weight)
    return _THAT_STAYS.pack(
        out,
        k,
        weight.data_ptr(),
        FORMATS[weight.dtype],
        scale.data_ptr(),
        per_channel and not blocked,
        BLOCK if blocked else 0,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else TYPES[bias.dtype],
        arithmetic == "gaudi",
        full_scale,
    )


class _Packed:
    """Weights, scales and biases, packed; whoever has it sees to it that they stay where they are."""

    def __init__(self, library: Library, variant: int, k: int, parts: Sequence[tuple[int, bytes]]):
        self.library, self.variant, self.k, self.parts = library, variant, k, parts

    def __call__(self, x: torch.Tensor, input_scales: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """`[…, out]` for each weight, with `x` `[…, k]`."""
        x = x.contiguous()  # a copy, if it is one, lives until the call returns; so do those of scales
        input_scales = [None if scale is None else scale.contiguous() for scale in input_scales]
        leading, dtype, k = x.shape[:-1], x.dtype, self.k
        of_all = (self.variant, threads(), x.numel() // k, x.data_ptr(), TYPES[dtype], k)
        outputs, arguments = [], b""
        for (out, part), scale in zip(self.parts, input_scales, strict=True):
            y = torch.empty((*leading, out), dtype=dtype, device=_CPU)
            per_tensor = scale is None or scale.numel() == 1
            pointer = 0 if scale is None else scale.data_ptr()
            arguments += _OF_A_CALL.pack(*of_all, pointer, not per_tensor, y.data_ptr(), out) + part
            outputs.append(y)
        check(self.library.linear(arguments, len(outputs)), "linear")
        return outputs


class _Again:
    """Calls that are like an earlier one: with its weights, scales and biases, none of which it keeps alive."""

    def __init__(
        self, packed: _Packed, dtype: torch.dtype, stay: Sequence[torch.Tensor | None], rest: tuple[float, str]
    ):
        self.packed, self.dtype, self.rest = packed, dtype, rest
        self.seen = [None if one is None else (weakref.ref(one), one.data_ptr(), one.shape) for one in stay]

    def __call__(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        weight_scales: Sequence[torch.Tensor],
        input_scales: Sequence[torch.Tensor | None],
        biases: Sequence[torch.Tensor | None],
        *rest: object,
    ) -> list[torch.Tensor] | None:
        """The outputs, or None where the call is not like it."""
        if rest != self.rest or x.dtype is not self.dtype or not x.is_cpu or x.shape[-1] != self.packed.k:
            return None
        for seen, one in zip(self.seen, (*weights, *weight_scales, *biases), strict=True):
            if seen is None or one is None:
                if seen is not one:
                    return None
            elif seen[0]() is not one or one.data_ptr() != seen[1] or one.shape != seen[2]:
                return None
        for scale in input_scales:
            if scale is not None and refuses_input_scale(x, scale):
                return None
        return self.packed(x, input_scales)
