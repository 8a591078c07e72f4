"""What torch's own products of matrices are good for on this processor: where they are faster than ours, and where they
round as the operators do."""

from __future__ import annotations

import platform
from functools import cache
from typing import NamedTuple

import torch

from ..arguments import LinearCall
from ..operands import is_along_input
from .library import Library

NEVER = 1 << 62


class FromRows(NamedTuple):
    """From so many rows of the input on torch's product of decoded panels is faster than a variant's own kernel."""

    in_bfloat16: int = NEVER
    by_groups: int = NEVER  # in bfloat16, of weights by blocks or groups, which take longer to decode
    in_float32: int = NEVER


# Measured on a Zen 4 as CPU time of one thread, with cold weights of 2048 x 2048 (python -m benchmarks.cpu_linear
# --single-thread --backend cpu_portable). In bfloat16, 24 rows took 6.5 ms on cpu_portable's own kernel and 3.0 in
# panels, on cpu_avx2's 2.5 and 2.2, on cpu_avx512vbmi's 2.3 and 2.1; 512 rows took 122 and 22, 43 and 22, 41 and 22. In
# float32, 512 took 50 in panels: less than on cpu_portable's kernel, and more than on the others.
FROM_ROWS = {
    "portable": FromRows(9, 9, 13),
    "avx2": FromRows(25, 49),
    "avx512": FromRows(20, 80),
    "avx512vbmi": FromRows(20, 80),
}


def from_rows(library: Library, variant: str) -> FromRows:
    """The same, for a variant on this processor."""
    least = FROM_ROWS.get(variant, FromRows())
    return least if has_fast_bfloat16(library) else FromRows(in_float32=least.in_float32)


def has_fast_bfloat16(library: Library) -> bool:
    """Whether torch's products of bfloat16 run on fast instructions for it, as far as that is known: on those that our
    own variants are faster with, on AMX that our compiler did not know, or on Arm's."""
    if not torch.backends.mkldnn.is_available():
        return False
    if library.best in ("avx512amx", "avx512bf16"):
        return True
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "avx512amx" not in library.too_new and torch.cpu._is_amx_tile_supported()


@cache
def rounds_once() -> bool:
    """Whether torch's product of bfloat16 rounds once, after `alpha` is multiplied and the bias is added in float32: by
    trial, on values where rounding twice would show."""
    rows, out, k = 64, 128, 256
    x, weight = (torch.arange(size * k, device="cpu").reshape(size, k) % 31 - 15.0 for size in (rows, out))
    bias, alpha = torch.arange(out, device="cpu") % 61 - 30.0, 0.7001953125
    exact = (x.double() @ weight.double().t()) * alpha + bias.double()
    found = torch.addmm(bias.bfloat16(), x.bfloat16(), weight.bfloat16().t(), alpha=alpha)
    return torch.equal(found, exact.bfloat16())


def are_powers_of_two(scale: torch.Tensor) -> bool:
    """Whether all are, from 2^-63 to 2^64: so far from the ends of float32 that values times them lose nothing."""
    from_least = scale.view(torch.int32) - (64 << 23)  # sign and mantissa of a power are 0, and its exponent has 7 bits
    return not (from_least & ~(0x7F << 23)).any()


def dtype_of_panels(call: LinearCall, rows: int, least: FromRows) -> torch.dtype | None:
    """What panels are multiplied in where that is faster than the variant's own kernel, and as exact; else None."""
    by_groups = is_along_input(call.weight_scale, call.weight)
    if rows >= (least.by_groups if by_groups else least.in_bfloat16) and _is_exact_in_bfloat16(call):
        return torch.bfloat16
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    in_full = precision in ("none", "ieee")  # else torch is told to round the operands
    return torch.float32 if rows >= least.in_float32 and in_full else None


def _is_exact_in_bfloat16(call: LinearCall) -> bool:
    """Whether all that is multiplied is exact in bfloat16, as is the bias that torch adds. Codes are, and codes times
    powers of two; one scale for all is not multiplied with them, but with the sums."""
    bias, scales = call.bias, [scale for scale in (call.weight_scale, call.input_scale) if scale is not None]
    if call.x.dtype != torch.bfloat16 or not torch.backends.mkldnn.enabled:
        return False
    if bias is not None and bias.dtype != torch.bfloat16 and call.arithmetic != "gaudi":
        return False
    if not all(2.0**-63 <= scale.item() <= 2.0**63 for scale in scales if scale.numel() == 1):
        return False
    return all(are_powers_of_two(scale) for scale in scales if scale.numel() > 1) and rounds_once()
