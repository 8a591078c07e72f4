"""Products with FP8 weights in float64, what float32 sums and roundings may make of them, and codes to try them with.

What is allowed: half a unit in the last place of the output for each rounding to it, and (K + 8) · 2⁻²⁴ of the sum of
magnitudes for float32 sums in whatever order. Below, float32 itself ends (steps of 2⁻¹⁴⁹); and where a variant
multiplies pairs of bfloat16, the processor takes operands, products and sums below 2⁻¹²⁶ for zero, whatever its mode.
"""

from __future__ import annotations

import torch

from optimum_fp8 import ops
from optimum_fp8.ops.cpu.torch_products import FROM_ROWS

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def step_at(value, dtype):
    """The distance between neighbours of `dtype` around `value`."""
    info = torch.finfo(dtype)
    return 2.0 ** torch.log2(value.abs().clamp(min=info.smallest_normal)).floor() * info.eps


def along(scale, size, rows=1):
    """Scales by groups, or by blocks of so many rows, repeated over `size` values of a row."""
    group = next(group for group in (128, 32) if scale.shape[-1] == -(-size // group))
    return scale.repeat_interleave(rows, 0).repeat_interleave(group, -1)[..., :size]


def products(x, weight, weight_scale, input_scale, full_scale, pairs=False):
    """The products times their scales in float64, and what float32 may make of them."""
    values, weights, scale, largest = x.double(), weight.float(), weight_scale.reshape(-1), torch.ones(1)
    if weight_scale.ndim == 2 and weight_scale.shape[1] > 1 or weight_scale.numel() not in (1, weight.shape[0]):
        rows = 1 if weight_scale.shape[0] == weight.shape[0] > 1 else 128
        weights, scale = weights * along(weight_scale, weight.shape[1], rows)[: weight.shape[0]], torch.ones(1)
        largest = weight_scale.max()
    if input_scale is not None:
        with ops.backend("reference"):
            values = ops.cast_to_fp8(x, input_scale, weight.dtype, full_scale)
        if input_scale.ndim == x.ndim and input_scale.shape[-1] > 1:
            values = values.float() * along(input_scale, x.shape[-1])
            largest = largest * input_scale.max() if input_scale.numel() else largest
        else:
            scale = input_scale * scale
        values = values.double()
    weights, scale = weights.double(), scale.double()
    terms = x.shape[-1] + 8
    bound = (values.abs() @ weights.abs().T) * scale * terms * 2.0**-24 + (terms * scale + 4) * 2.0**-149
    if pairs:
        bound = bound + (weights.abs().nan_to_num().sum(1) + terms * largest.double()) * 2.0**-125 * scale
    return (values @ weights.T) * scale, bound


def excess(y, product, bound, bias, arithmetic):
    """How much further `y` is from the exact result than it may be; -inf where both are the same NaN or infinity."""
    dtype, result = y.dtype, product
    if bias is not None:
        offset = bias.double()
        if arithmetic == "gaudi":
            offset = bias.to(dtype).double()
            bound = bound + step_at(product.abs() + bound, dtype) / 2
        result = product + offset
        bound = bound + result.abs() * 2.0**-23 + 2.0**-149
    bound = bound + step_at(result.abs() + bound, dtype) / 2
    found = y.double()
    alike = (found.isnan() & result.isnan()) | (found == result)
    overflows = result.abs() + bound > torch.finfo(dtype).max
    alike |= overflows & (found.abs() >= (result.abs() - bound).clamp(max=torch.finfo(dtype).max))
    return torch.where(alike, -torch.inf, ((found - result).abs() - bound).nan_to_num(nan=torch.inf))


def uses_pairs(backend, x, weight_scale, input_scale):
    """Whether a backend multiplies pairs of bfloat16, alone or in tiles, where the activations fit; or may leave such
    products to torch, which does."""
    if backend in ("cpu_avx512bf16", "cpu_avx512amx", "cpu_tiles"):
        return input_scale is not None or x.dtype == torch.bfloat16
    return backend.removeprefix("cpu_") in FROM_ROWS and x.dtype == torch.bfloat16


def codes_like(shape, fp8, finite=True):
    """Codes of all kinds, subnormal ones and both zeros as often as normal ones; NaN and Inf where asked for."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes = torch.where(torch.rand(shape) < 0.2, codes & 0x87, codes)
    special = (codes & 0x7F) >= (0x7F if fp8 == E4M3 else 0x7C)
    return (codes & ~(special & finite).to(torch.uint8).mul(0x40)).view(fp8)


def scale_for(weight, kind):
    """Scales that make weights of about 1, so that float16 holds the products."""
    out, into = weight.shape
    groups = {f"groups of {group}": (out, -(-into // group)) for group in (128, 32)}
    shape = {"tensor": (1,), "channel": (out, 1), "blocks": (-(-out // 128), -(-into // 128)), **groups}[kind]
    return (torch.rand(shape) + 0.5) / torch.finfo(weight.dtype).max
