"""Casts, ranges and dynamic scales on the native library: what it takes and refuses, and how tensors become its
arguments."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

import torch

from ..arguments import DynamicScaleCall, Product
from ..operands import BINS, block_of, group_of, group_shape, is_by_rows, refuses_format
from .library import FORMATS, TYPES, Library, check, threads
from .ranges import scale_of_range, scale_of_ranges

_CAST = Struct("=15qd")
_HISTOGRAM = Struct("=7q")


class Casts:
    """The operators of `ops/casts.py` on one variant of the library."""

    def __init__(self, library: Library, variant: str):
        self.library, self.variant = library, library.variants[variant]
        self.backend = f"cpu_{variant}"

    def refuses_cast_to_fp8(
        self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float
    ) -> str | None:
        if x.dtype not in TYPES and x.dtype not in FORMATS:
            return f"inputs in {x.dtype}"
        return refuses_format(dtype, full_scale) or _refuses_scale(x, scale)

    def cast_to_fp8(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
        x = x.float() if x.dtype in FORMATS else x
        codes = torch.empty_like(x, dtype=dtype)
        if (rows := _rows_in_memory(x, codes, scale)) is not None:
            self._encode(rows[0], scale, rows[1], full_scale, None)
            return codes
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        self._encode(x, scale, codes, full_scale, None)
        return _strided_like(x, codes)

    def refuses_cast_to_fp8_by_range(
        self, x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool, dtype: torch.dtype, full_scale: float
    ) -> str | None:
        if scale_of_range.dtype != torch.float32 or scale_of_range.numel() != 1 << 15:
            return f"scales by range of {tuple(scale_of_range.shape)} in {scale_of_range.dtype}"
        if x.numel() == 0:
            return "an empty input"
        return refuses_format(dtype, full_scale) or self.refuses_maxabs(x, 0)

    def cast_to_fp8_by_range(
        self, x: torch.Tensor, scale_of_range: torch.Tensor, per_row: bool, dtype: torch.dtype, full_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.empty(x.shape, dtype=dtype, device=x.device)
        shape = (x.shape[0], *[1] * (x.ndim - 1)) if per_row else (1,)
        scale, maxabs = (torch.zeros(shape, dtype=torch.float32, device=x.device) for _ in range(2))
        self._encode(x, scale, codes, full_scale, maxabs, scale_of_range.contiguous())
        return codes, scale, maxabs

    def refuses_maxabs(self, x: torch.Tensor, group: int) -> str | None:
        if group > 0 and x.shape[-1:] and x.shape[-1] % group:
            return f"rows of {x.shape[-1]} values in groups of {group}"
        return None if x.dtype in TYPES else f"inputs in {x.dtype}"

    def maxabs(self, x: torch.Tensor, group: int, *, only_finite: bool = False) -> torch.Tensor:
        found = torch.zeros(group_shape(x.shape, group), dtype=torch.float32, device=x.device)
        self._encode(x, None, None, 0.0, found, only_finite=only_finite)
        return found

    def refuses_histogram(self, x: torch.Tensor) -> str | None:
        return None if x.dtype in TYPES else f"inputs in {x.dtype}"

    def histogram(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, counts = x.contiguous(), torch.zeros(BINS, dtype=torch.int64, device=x.device)
        maxabs = torch.zeros(1, dtype=torch.float32, device=x.device)
        arguments = _HISTOGRAM.pack(
            self.variant, threads(), x.numel(), x.data_ptr(), TYPES[x.dtype], counts.data_ptr(), maxabs.data_ptr()
        )
        check(self.library.histogram(arguments), "histogram")
        return counts, maxabs

    def _encode(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        codes: torch.Tensor | None,
        full_scale: float,
        maxabs: torch.Tensor | None,
        scale_of_range: torch.Tensor | None = None,
        *,
        only_finite: bool = False,
    ) -> None:
        x, scale = x.contiguous(), None if scale is None else scale.contiguous()
        of_rows = maxabs if scale is None else scale
        block = 0 if scale is None or maxabs is not None else _square_of(scale, x)  # ranges are never those of blocks
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
            int(only_finite),
            0 if scale_of_range is None else scale_of_range.data_ptr(),
            full_scale,
        )
        check(self.library.encode(arguments), "cast_to_fp8")

    def refuses_cast_from_fp8(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> str | None:
        if x.dtype not in FORMATS or dtype not in TYPES:
            return f"from {x.dtype} to {dtype}"
        return _refuses_scale(x, scale)

    def cast_from_fp8(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty_like(x, dtype=dtype)
        if (in_memory := _rows_in_memory(x, values, scale)) is not None:
            self.decode(in_memory[0], scale, in_memory[1])
            return values
        values = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.decode(x, scale, values)
        return _strided_like(x, values)

    def decode(self, x: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> None:
        """As `cast_from_fp8`, into a contiguous tensor."""
        x = x.contiguous()
        block, scale = _square_of(scale, x), scale.contiguous()
        rows = x.shape[0] if block else scale.numel()
        arguments = _CAST.pack(
            self.variant,
            threads(),
            rows,
            x.numel() // rows if rows else 0,
            x.data_ptr(),
            values.data_ptr(),
            TYPES[values.dtype],
            FORMATS[x.dtype],
            scale.data_ptr(),
            int(scale.numel() > 1),
            block,
            0,
            0,
            0,
            0,
            0.0,
        )
        check(self.library.decode(arguments), "cast_from_fp8")

    def refuses_dynamic_scale(self, call: DynamicScaleCall) -> str | None:
        return "an empty input" if call.x.numel() == 0 else self.refuses_maxabs(call.x, call.group)

    def dynamic_scale(self, call: DynamicScaleCall) -> torch.Tensor:
        x, group = call.x, call.group
        if call.hp_dtype == torch.bfloat16:
            maxabs = torch.zeros(group_shape(x.shape, group), dtype=torch.float32, device=x.device)
            scale = torch.empty_like(maxabs)
            self._encode(x, scale, None, 0.0, maxabs, scale_of_range(group == 0, *call[2:6]), only_finite=True)
            return scale
        return scale_of_ranges(self.maxabs(x, group, only_finite=True).to(x.dtype), group == 0, *call[2:])


def _rows_in_memory(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both `[rows, values]` in the order of memory (channels last, say), where that is dense, the same in both, and has
    what shares a scale in one piece; None of what is contiguous anyway, or cannot be taken so."""
    rows = scale.numel()
    if x.is_contiguous() or x.stride() != y.stride() or rows == 0 or not (rows == 1 or rows == x.shape[0]):
        return None
    size = x.numel() // rows
    if rows > 1 and (x.stride(0) != size or scale.shape[:1] != x.shape[:1] or not is_by_rows(scale, x)):
        return None
    return x.as_strided((rows, size), (size, 1)), y.as_strided((rows, size), (size, 1))


def _strided_like(x: torch.Tensor, contiguous: torch.Tensor) -> torch.Tensor:
    """`contiguous` with the strides that an elementwise operation on `x` gives its result (channels last, say)."""
    if x.is_contiguous():
        return contiguous
    return torch.empty_like(x, dtype=contiguous.dtype).copy_(contiguous)


def _refuses_scale(x: torch.Tensor, scale: torch.Tensor) -> str | None:
    if scale.dtype != torch.float32:
        return f"scales in {scale.dtype}"
    if scale.numel() == 1 or is_by_rows(scale, x) or _square_of(scale, x):
        return None
    group = group_of(scale, x)
    if group and x.shape[-1] % group == 0:
        return None
    return f"scales of shape {tuple(scale.shape)} for an input of {tuple(x.shape)}"


def _square_of(scale: torch.Tensor, x: torch.Tensor) -> int:
    """The side of square blocks, in the two dimensions that the library knows them in; else 0."""
    return block_of(scale, x) if x.ndim == 2 else 0


def refuses_qdq(casts: Casts, call: Product) -> str | None:
    """Why `qdq` cannot take a call: one of its casts cannot."""
    x, weight, weight_scale, input_scale = call[:4]
    reason = casts.refuses_cast_from_fp8(weight, weight_scale, x.dtype)
    if reason is None and input_scale is not None:
        reason = casts.refuses_cast_to_fp8(x, input_scale, weight.dtype, call.full_scale)
    return reason


def qdq(casts: Casts, product: Callable[..., torch.Tensor], call: Product) -> torch.Tensor:
    """`product` of what the codes of the input and of the weight stand for, in the input's dtype."""
    x, weight, weight_scale, input_scale, bias = call[:5]
    if input_scale is not None:
        codes = casts.cast_to_fp8(x, input_scale, weight.dtype, call.full_scale)
        x = casts.cast_from_fp8(codes, input_scale, x.dtype)
    weight = casts.cast_from_fp8(weight, weight_scale, x.dtype)
    return product(x, weight, None if bias is None else bias.to(x.dtype))
