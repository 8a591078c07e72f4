"""The operators on the native library: what it takes and refuses, and how tensors become its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from struct import Struct

import torch
import torch.nn.functional as F

from ...formats import number_format
from ...rounding import scale_from_maxabs
from .. import reference
from ..reference import BLOCK
from .library import Library, check, threads

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in FORMATS}
_CAST = Struct("=14qd")


class CpuKernels:
    """The operators on one variant of the library."""

    def __init__(self, library: Library, variant: str):
        self.library, self.variant = library, library.variants[variant]

    # --- casts ----------------------------------------------------------------------------------------------------

    def refuses_cast_to_fp8(
        self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float
    ) -> str | None:
        if x.dtype not in TYPES and x.dtype not in FORMATS:
            return f"inputs in {x.dtype}"
        return refuses_format(dtype, full_scale) or _refuses_scale(x, scale)

    def cast_to_fp8(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
        x = x.float() if x.dtype in FORMATS else x
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        self._encode(x, scale, codes, full_scale, None)
        return _strided_like(x, codes)

    def cast_to_fp8_with_maxabs(
        self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        maxabs = torch.zeros(1, dtype=torch.float32, device=x.device)
        self._encode(x, scale, codes, full_scale, maxabs)
        return _strided_like(x, codes), maxabs

    def refuses_cast_to_fp8_by_range(
        self, x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool, dtype: torch.dtype, full_scale: float
    ) -> str | None:
        if scale_of_range.dtype != torch.float32 or scale_of_range.numel() != 1 << 15:
            return f"scales by range of {tuple(scale_of_range.shape)} in {scale_of_range.dtype}"
        if x.numel() == 0:
            return "an empty input"
        return refuses_format(dtype, full_scale) or self.refuses_maxabs(x, False)

    def cast_to_fp8_by_range(
        self, x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool, dtype: torch.dtype, full_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        shape = (x.shape[0], *[1] * (x.ndim - 1)) if per_row else (1,)
        scale, maxabs = (torch.zeros(shape, dtype=torch.float32, device=x.device) for _ in range(2))
        self._encode(x, scale, codes, full_scale, maxabs, scale_of_range.contiguous())
        return codes, scale, maxabs

    def refuses_maxabs(self, x: torch.Tensor, per_token: bool) -> str | None:
        return None if x.dtype in TYPES else f"inputs in {x.dtype}"

    def maxabs(self, x: torch.Tensor, per_token: bool) -> torch.Tensor:
        found = torch.zeros((*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32, device=x.device)
        self._encode(x, None, None, 0.0, found)
        return found

    def _encode(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        codes: torch.Tensor | None,
        full_scale: float,
        maxabs: torch.Tensor | None,
        scale_of_range: torch.Tensor | None = None,
    ) -> None:
        x, scale = x.contiguous(), None if scale is None else scale.contiguous()
        of_rows, block = maxabs if scale is None else scale, 0 if scale is None else _block_of(scale, x)
        assert of_rows is not None
        rows = x.shape[0] if block else of_rows.numel()
        arguments = _CAST.pack(
            self.variant,
            threads(),
            rows,
            x.numel() // rows if rows else 0,
            x.data_ptr(),
            0 if codes is None else codes.data_ptr(),
            TYPES[x.dtype],
            0 if codes is None else FORMATS[codes.dtype],
            0 if scale is None else scale.data_ptr(),
            int(scale is not None and scale.numel() > 1),
            block,
            0 if maxabs is None else maxabs.data_ptr(),
            int(maxabs is not None and maxabs.numel() > 1),
            0 if scale_of_range is None else scale_of_range.data_ptr(),
            full_scale,
        )
        check(self.library.encode(arguments), "cast_to_fp8")

    def refuses_cast_from_fp8(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> str | None:
        if x.dtype not in FORMATS or dtype not in TYPES:
            return f"from {x.dtype} to {dtype}"
        return _refuses_scale(x, scale)

    def cast_from_fp8(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        given, x, scale, block = x, x.contiguous(), scale.contiguous(), _block_of(scale, x)
        values, rows = torch.empty(x.shape, dtype=dtype, device=x.device), x.shape[0] if block else scale.numel()
        arguments = _CAST.pack(
            self.variant,
            threads(),
            rows,
            x.numel() // rows if rows else 0,
            x.data_ptr(),
            values.data_ptr(),
            TYPES[dtype],
            FORMATS[x.dtype],
            scale.data_ptr(),
            int(scale.numel() > 1),
            block,
            0,
            0,
            0,
            0.0,
        )
        check(self.library.decode(arguments), "cast_from_fp8")
        return _strided_like(given, values)

    def refuses_dynamic_scale(self, x: torch.Tensor, per_token: bool, *rest: object) -> str | None:
        return "an empty input" if x.numel() == 0 else self.refuses_maxabs(x, per_token)

    def dynamic_scale(
        self,
        x: torch.Tensor,
        per_token: bool,
        divisor: float,
        rounding: str,
        fp8_config: str,
        target: str,
        hp_dtype: torch.dtype,
    ) -> torch.Tensor:
        if x.dtype == hp_dtype == torch.bfloat16:
            maxabs = torch.zeros((*x.shape[:-1], 1) if per_token else (1,), dtype=torch.float32, device=x.device)
            scale = torch.empty_like(maxabs)
            scale_of_range = _scale_of_range(per_token, divisor, rounding, fp8_config, target)
            self._encode(x, scale, None, 0.0, maxabs, scale_of_range)
            return scale
        maxabs = self.maxabs(x, per_token).to(x.dtype)
        return _scale(maxabs, per_token, divisor, rounding, fp8_config, target, hp_dtype)

    # --- convolution ----------------------------------------------------------------------------------------------

    def refuses_conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        *rest: object,
    ) -> str | None:
        if x.dtype not in TYPES or weight.dtype not in FORMATS:
            return f"inputs in {x.dtype} with weights in {weight.dtype}"
        if weight_scale.numel() not in (1, weight.shape[0]) or (input_scale is not None and input_scale.numel() != 1):
            return f"weight scales of {tuple(weight_scale.shape)}, or input scales that are not per tensor"
        return refuses_scales(x, weight_scale, input_scale)

    def conv2d(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        full_scale: float,
        arithmetic: str,
    ) -> torch.Tensor:
        """The casts are ours; the product of exact FP8 values in float32 is torch's own convolution."""
        convolve = partial(F.conv2d, stride=stride, padding=padding, dilation=dilation, groups=groups)
        if arithmetic == "qdq":
            return self.qdq(convolve, x, weight, weight_scale, input_scale, bias, full_scale)
        one = torch.ones(1, dtype=torch.float32, device=x.device)
        values, scale = x.float(), weight_scale.reshape(-1, 1, 1)
        if input_scale is not None:
            codes = self.cast_to_fp8(x, input_scale, weight.dtype, full_scale)
            values, scale = self.cast_from_fp8(codes, one, torch.float32), input_scale * scale
        product = convolve(values, self.cast_from_fp8(weight, one, torch.float32)).mul_(scale)
        return reference.with_bias(product, None if bias is None else bias.reshape(-1, 1, 1), x.dtype, arithmetic)

    def qdq(
        self,
        product: Callable[..., torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        full_scale: float,
    ) -> torch.Tensor:
        """`product` of what the codes of `x` and of the weight stand for, in `x`'s dtype."""
        if input_scale is not None:
            x = self.cast_from_fp8(self.cast_to_fp8(x, input_scale, weight.dtype, full_scale), input_scale, x.dtype)
        dequantized = self.cast_from_fp8(weight, weight_scale, x.dtype)
        return product(x, dequantized, None if bias is None else bias.to(x.dtype))


def _strided_like(x: torch.Tensor, contiguous: torch.Tensor) -> torch.Tensor:
    """`contiguous` with the strides that an elementwise operation on `x` gives its result (channels last, say)."""
    if x.is_contiguous():
        return contiguous
    return torch.empty_like(x, dtype=contiguous.dtype).copy_(contiguous)


def refuses_format(dtype: torch.dtype, full_scale: float) -> str | None:
    """Why codes cannot be made: of no FP8 format, or saturating at what it cannot hold."""
    return None if 0 < full_scale <= _LARGEST.get(dtype, 0) else f"casts to {dtype} that saturate at {full_scale}"


def refuses_scales(x: torch.Tensor, weight_scale: torch.Tensor, input_scale: torch.Tensor | None) -> str | None:
    """Why scales of a product cannot be taken: they are float32, the input's one or one a row."""
    if weight_scale.dtype != torch.float32:
        return f"weight scales in {weight_scale.dtype}"
    return None if input_scale is None else refuses_input_scale(x, input_scale)


def refuses_input_scale(x: torch.Tensor, input_scale: torch.Tensor) -> str | None:
    """As `refuses_scales`, of the input's."""
    if input_scale.dtype != torch.float32:
        return f"input scales in {input_scale.dtype}"
    if input_scale.numel() != 1 and input_scale.shape != (*x.shape[:-1], 1):
        return f"input scales of {tuple(input_scale.shape)} for an input of {tuple(x.shape)}"
    return None


def _refuses_scale(x: torch.Tensor, scale: torch.Tensor) -> str | None:
    if scale.dtype != torch.float32:
        return f"scales in {scale.dtype}"
    if scale.numel() != 1 and not _is_by_rows(x, scale) and not _block_of(scale, x):
        return f"scales of shape {tuple(scale.shape)} for an input of {tuple(x.shape)}"
    return None


def _is_by_rows(x: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `scale` has x's leading dimensions, then ones: one scale for what lies in one piece."""
    if scale.ndim != x.ndim:
        return False
    rows = next((dim for dim in range(x.ndim) if scale.shape[dim] != x.shape[dim]), x.ndim)
    return all(size == 1 for size in scale.shape[rows:])


def _block_of(scale: torch.Tensor, x: torch.Tensor) -> int:
    """The side of the blocks that share a scale; 0 where scales are not by blocks."""
    if scale.numel() == 1 or x.ndim != 2 or _is_by_rows(x, scale):
        return 0
    return BLOCK if tuple(scale.shape) == tuple(-(-size // BLOCK) for size in x.shape) else 0


def _scale(
    maxabs: torch.Tensor,
    per_token: bool,
    divisor: float,
    rounding: str,
    fp8_config: str,
    target: str,
    hp_dtype: torch.dtype,
) -> torch.Tensor:
    fmt = number_format(fp8_config, target)
    return scale_from_maxabs(maxabs, divisor, rounding, fmt, hp_dtype, reciprocal=fmt.is_gaudi and not per_token)


@cache
def _scale_of_range(per_token: bool, divisor: float, rounding: str, fp8_config: str, target: str) -> torch.Tensor:
    """The scale of every bfloat16 range, by its bits, float32 `[32768]`: looking it up is quicker than rounding it."""
    ranges = torch.arange(1 << 15, dtype=torch.int16, device="cpu").view(torch.bfloat16)
    return _scale(ranges, per_token, divisor, rounding, fp8_config, target, torch.bfloat16)
