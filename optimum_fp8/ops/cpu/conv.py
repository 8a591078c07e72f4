"""Convolution on a CPU, the fastest way there is for one: as a linear layer, as products of windows with FP8 weights on
the native library, or torch's own after native casts, in bfloat16 where that is exact, else in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...errors import FP8Error
from .. import reference
from ..arguments import ConvCall, LinearCall
from ..operands import channels_last_of, refuses_format, refuses_scales
from ..reference import ARITHMETICS
from .casts import Casts, qdq
from .library import FORMATS, TYPES, check, threads
from .linear import Linear
from .prepared import OF_A_CALL, THAT_STAYS
from .torch_products import are_powers_of_two
from .windows import Axis, padded, places, spatial, weights_of, windows_of

WITH_TORCHS_BFLOAT16 = ("avx512amx", "avx512bf16")  # variants of processors on which that is fast, and rounds once
OF_WINDOWS = (*WITH_TORCHS_BFLOAT16, "tiles")  # variants that multiply bfloat16
_LEAST_CHANNELS, _MANY_POSITIONS = 16, 4  # out of a group, for windows; a channel, for torch
_CPU = torch.device("cpu")


class _Product(NamedTuple):
    """A product of a convolution, for each group, as the library takes it, and what must live until it ran."""

    packed: bytes
    keeps: tuple[torch.Tensor, ...]


class Conv:
    """The operator `conv` on one variant of the library."""

    def __init__(self, casts: Casts, variant: str):
        self.casts, self.linear = casts, Linear(casts, variant)
        self.multiplies_windows, self.uses_torchs_bfloat16 = variant in OF_WINDOWS, variant in WITH_TORCHS_BFLOAT16

    def refuses(self, call: ConvCall) -> str | None:
        x, weight, weight_scale, input_scale = call[:4]
        if x.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"inputs in {x.dtype} with weights in {weight.dtype}"
        if call.arithmetic not in ARITHMETICS:
            return "unknown arithmetic"  # the reference says which are known
        if input_scale is not None and (reason := refuses_format(weight.dtype, call.full_scale)):
            return reason
        try:
            reference.check_conv(call)
        except FP8Error as error:  # which the reference raises
            return str(error)
        return refuses_scales(x, weight_scale, input_scale)

    def run(self, call: ConvCall) -> torch.Tensor:
        def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return reference.convolve(call, x, weight, bias)

        if call.arithmetic == "qdq":
            return qdq(self.casts, convolve, call)
        if call.bias is not None and call.bias.dtype not in TYPES:
            call = call._replace(bias=call.bias.float())
        scale = call.weight_scale if call.input_scale is None else call.input_scale * call.weight_scale
        if _is_product_of_rows(call):
            return self._by_rows(call)
        for way in self._ways(call):
            if (result := way(call, scale)) is not None:
                return result
        values, weight = self._values(call, torch.float32), self._decoded(call.weight, torch.float32)
        product = convolve(values, weight).mul_(reference.along_channels(call, scale))
        bias = None if call.bias is None else reference.along_channels(call, call.bias)
        return reference.with_bias(product, bias, call.x.dtype, call.arithmetic)

    def _ways(self, call: ConvCall) -> Sequence[Callable[[ConvCall, torch.Tensor], torch.Tensor | None]]:
        """What is tried of bfloat16, the fastest first: windows save torch's laying out of the weight, and cost their
        own, which counts where many are multiplied with few channels."""
        out, windows = len(call.weight) // call.groups, windows_of(call)
        if 0 in call.weight.shape or call.input_scale is None and call.x.dtype != torch.bfloat16:
            return []
        if not self.multiplies_windows or windows is None or out < _LEAST_CHANNELS:
            return [self._by_torch]
        positions = math.prod(windows.size) * (len(call.x) if call.x.ndim == call.weight.ndim else 1)
        ways = [self._by_windows, self._by_torch]
        return ways if positions <= _MANY_POSITIONS * out else ways[::-1]

    def _by_rows(self, call: ConvCall) -> torch.Tensor:
        """The linear layer that a convolution by single positions is, of channels that lie side by side."""
        x = spatial(call.x, (slice(None, None, stride) for stride in call.stride)).movedim(1, -1)
        scale = call.weight_scale.reshape(-1) if call.weight_scale.numel() == 1 else call.weight_scale.flatten(1)
        rest = (call.input_scale, call.bias, call.full_scale, call.arithmetic)
        return self.linear.run(LinearCall(x, call.weight.flatten(1).contiguous(), scale, *rest)).movedim(-1, 1)

    def _values(self, call: ConvCall, dtype: torch.dtype) -> torch.Tensor:
        """What the input's codes stand for, unscaled, or the input, in a dtype that holds either."""
        if call.input_scale is None:
            return call.x.to(dtype)
        codes = self.casts.cast_to_fp8(call.x, call.input_scale, call.weight.dtype, call.full_scale)
        return self._decoded(codes, dtype)

    def _decoded(self, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.casts.cast_from_fp8(codes, torch.ones(1, dtype=torch.float32, device=_CPU), dtype)

    def _by_torch(self, call: ConvCall, scale: torch.Tensor) -> torch.Tensor | None:
        """torch's convolution in bfloat16, which is the same where scales are powers of two: then weights are bfloat16
        with them too, and sums in float32 are rounded once, bias and all."""
        bias, gaudi = call.bias, call.arithmetic == "gaudi"
        if call.transposed or call.x.dtype != torch.bfloat16 or bias is not None and bias.dtype != torch.bfloat16:
            return None
        if not self.uses_torchs_bfloat16 or not are_powers_of_two(scale) or not torch.backends.mkldnn.enabled:
            return None
        weight = self.casts.cast_from_fp8(call.weight, scale, torch.bfloat16)
        product = reference.convolve(call, self._values(call, torch.bfloat16), weight, None if gaudi else bias)
        return product if bias is None or not gaudi else product + reference.along_channels(call, bias)

    def _by_windows(self, call: ConvCall, scale: torch.Tensor) -> torch.Tensor | None:
        """The product of windows with the weight; None where it is none, or places in memory are too many."""
        windows, batched = windows_of(call), call.x.ndim == call.weight.ndim
        if windows is None:
            return None
        call = call if batched else call._replace(x=call.x[None])
        size = (len(call.x), len(call.weight), *windows.size)
        y = torch.empty(size, dtype=call.x.dtype, device=_CPU, memory_format=_form_of_output(call))
        x = padded(self._values(call._replace(x=call.x.contiguous()), torch.bfloat16), windows.padding)
        if max(x.numel(), y.numel()) >= 1 << 31:
            return None
        scale, bias = scale.contiguous(), None if call.bias is None else call.bias.contiguous()
        products = zip(weights_of(call.weight, windows.products), windows.products, strict=True)
        parts = [self._product(call._replace(weight=weight), x, y, scale, bias, axes) for weight, axes in products]
        packed, count = b"".join(part.packed for part in parts), len(parts) * call.groups
        check(self.casts.library.linear(packed, count), "conv")
        return y if batched else y[0]

    def _product(
        self,
        call: ConvCall,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        product: tuple[Axis, ...],
    ) -> _Product:
        weight, channels_last = call.weight, not call.weight.is_contiguous()
        (all_out, channels), k, per_channel = weight.shape[:2], weight[0].numel(), scale.numel() > 1
        where, out = places((len(x), *x.stride()), y.stride(), channels, product, channels_last), all_out // call.groups
        packed = b""
        for first in range(0, all_out, out):
            x_at, y_at = first // out * channels * x.stride(1), first * y.stride(1)
            packed += OF_A_CALL.pack(
                *(self.casts.variant, threads(), (len(where) - k) // 2),
                *(x.data_ptr() + x_at * x.element_size(), TYPES[x.dtype], 0, 0, 0, 0, 0),
                *(y.data_ptr() + y_at * y.element_size(), TYPES[y.dtype], y.stride(1), where.data_ptr()),
            )
            packed += THAT_STAYS.pack(
                *(out, k, weight.data_ptr() + first * k, FORMATS[weight.dtype]),
                *(scale.data_ptr() + per_channel * first * scale.element_size(), per_channel, 0, 0, 0),
                *((0, 0) if bias is None else (bias.data_ptr() + first * bias.element_size(), TYPES[bias.dtype])),
                *(call.arithmetic == "gaudi", call.full_scale),
            )
        return _Product(packed, (weight, where))


def _form_of_output(call: ConvCall) -> torch.memory_format:
    """The memory format that torch's convolution gives its result, of an input `[N, C, …]`."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(call.x.ndim)
    weight_last = channels_last_of(call.weight) if call.transposed else _lies_channels_last(call.weight)
    return form if form and (_lies_channels_last(call.x) or weight_last) else torch.contiguous_format


def _lies_channels_last(x: torch.Tensor) -> bool:
    """Whether torch takes a tensor for channels last by its strides, also where they could be read in two ways."""
    least, stride = 0, x.stride()
    for dim in (1, *range(x.ndim - 1, 1, -1), 0):
        if stride[dim] < max(least, dim == 1) or (dim == 0 and least == stride[1]) or x.shape[dim] == 0:
            return False
        least = stride[dim] * x.shape[dim]
    return True


def _is_product_of_rows(call: ConvCall) -> bool:
    """Whether each output is a product of one position's channels, which lie side by side."""
    if call.transposed or call.groups > 1 or any(call.padding) or max(call.weight.shape[2:]) > 1:
        return False
    return call.x.ndim == call.weight.ndim > 3 and _lies_channels_last(call.x)
