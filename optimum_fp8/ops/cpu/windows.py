"""Convolutions as matrix products: a row is what the window of one output position reaches, and is never laid out.

Rows are read where they lie, in a copy of the input that has its padding, and results go where the output has them. A
transposed convolution is several products, one for each phase of its stride, with the taps that reach that phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..arguments import ConvCall

_KEPT_POSITIONS = 1 << 14  # places of more are found anew in each call: that takes little beside them, and much memory
Slice = tuple[int, int | None, int]
_ALL: Slice = (0, None, 1)


class Axis(NamedTuple):
    """One spatial dimension of a product.

    Attributes:
        taps: which of the kernel's are in it, as a slice is made of.
        offsets: of the taps, from where a window begins.
        start, step, windows: these begin at start, start + step, … in the padded input; so many.
        outputs: the positions that they are of, in the output, likewise.
    """

    taps: Slice
    offsets: tuple[int, ...]
    start: int
    step: int
    windows: int
    outputs: Slice


class Windows(NamedTuple):
    """The products of a convolution.

    Attributes:
        padding: zeros before and after, for each spatial dimension.
        size: of the output, for each spatial dimension.
        products: the axes of each.
    """

    padding: tuple[tuple[int, int], ...]
    size: tuple[int, ...]
    products: tuple[tuple[Axis, ...], ...]


def windows_of(call: ConvCall) -> Windows | None:
    """The products that a convolution is; None where it is none (a phase that no tap reaches, an empty output)."""
    dims = call.weight.ndim - 2
    geometry = (call.stride, call.padding, call.dilation, call.output_padding)
    return _windows(call.x.shape[-dims:], call.weight.shape[2:], call.transposed, *map(tuple, geometry))


@lru_cache(maxsize=256)
def _windows(
    image: Sequence[int], kernel: Sequence[int], transposed: bool, *geometry: tuple[int, ...]
) -> Windows | None:
    along = [(_phases if transposed else _ordinary)(*one) for one in zip(image, kernel, *geometry, strict=True)]
    padding, size, axes = (tuple(each) for each in zip(*along, strict=True))
    products: list[tuple[Axis, ...]] = [()]
    for choice in axes:
        products = [(*product, axis) for product in products for axis in choice]
    if min(size) < 1 or any(not axis.offsets or axis.windows < 1 for product in products for axis in product):
        return None
    return Windows(padding, size, tuple(products))


_Along = tuple[tuple[int, int], int, list[Axis]]  # padding, size of the output, and the axes: one a phase


def _ordinary(image: int, kernel: int, stride: int, padding: int, dilation: int, _: int) -> _Along:
    count = (image + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    offsets = tuple(range(0, dilation * kernel, dilation))
    return (padding, padding), count, [Axis(_ALL, offsets, 0, stride, count, _ALL)]


def _phases(image: int, kernel: int, stride: int, padding: int, dilation: int, more: int) -> _Along:
    """Output position o is that of `o + padding = stride · q + phase`; tap k adds input q - (k · dilation - phase) /
    stride to it, where that is whole."""
    size = (image - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1
    before = dilation * (kernel - 1) // stride
    after = max(0, (padding + size - 1) // stride - image + 1)
    axes = []
    for output in range(min(stride, size)):
        q, phase = divmod(output + padding, stride)
        taps = [tap for tap in range(kernel) if (tap * dilation - phase) % stride == 0]
        offsets = tuple(before - (tap * dilation - phase) // stride for tap in taps)
        some = (taps[0], taps[-1] + 1, taps[1] - taps[0] if len(taps) > 1 else 1) if taps else (0, 0, 1)
        count = (size - 1 - output) // stride + 1
        axes.append(Axis(some, offsets, q, 1, count, (output, None, stride)))
    return (before, after), size, axes


def weights_of(weight: torch.Tensor, products: Sequence[tuple[Axis, ...]]) -> list[torch.Tensor]:
    """The taps of each product, `[out, channels, k…]`, side by side in memory, or channels last where they all are.

    Where phases have as many taps each, one copy lays them all out: it shares its work among threads once.
    """
    steps = [axis.taps[2] for axis in products[0]]
    dividing = all(size % step == 0 for size, step in zip(weight.shape[2:], steps, strict=True))
    if len(products) == math.prod(steps) > 1 and dividing:
        by_phase = weight
        for dim in range(-1, -len(steps) - 1, -1):
            by_phase = by_phase.unflatten(dim, (-1, steps[dim])).movedim(dim, 0)
        by_phase = by_phase.contiguous()
        return [by_phase[tuple(axis.taps[0] for axis in product)] for product in products]
    parts = [spatial(weight, (slice(*axis.taps) for axis in product)) for product in products]
    return [part if part.movedim(1, -1).is_contiguous() else part.contiguous() for part in parts]


def padded(x: torch.Tensor, padding: Sequence[tuple[int, int]]) -> torch.Tensor:
    """`x` `[N, C, …]`, contiguous, with zeros around it."""
    if not any(map(any, padding)):
        return x.contiguous()
    size = [before + image + after for image, (before, after) in zip(x.shape[2:], padding, strict=True)]
    copy = torch.zeros((*x.shape[:2], *size), dtype=x.dtype, device=x.device)
    inside = [slice(before, before + image) for image, (before, _) in zip(x.shape[2:], padding, strict=True)]
    spatial(copy, inside).copy_(x)
    return copy


def spatial(x: torch.Tensor, slices: Iterable[slice]) -> torch.Tensor:
    """Some of the positions of `x` `[N, C, …]`."""
    index = (slice(None), slice(None), *slices)
    return x[index]


def places(
    x: Sequence[int], y: Sequence[int], channels: int, product: tuple[Axis, ...], weight_channels_last: bool
) -> torch.Tensor:
    """int32 `[M + K + M]`, in elements: where the windows on an input begin, how far on each value of a window is, and
    where the first channel of each result is.

    Args:
        x: N, and strides of the padded input `[N, C, …]`.
        y: strides of the output.
        channels: of a window.
        product: its axes.
        weight_channels_last: whether weights lie as `[out, k…, channels]`, not as `[out, channels, k…]`.
    """
    few = x[0] * math.prod(axis.windows for axis in product) <= _KEPT_POSITIONS
    return (_places if few else _places.__wrapped__)(x, y, channels, product, weight_channels_last)


@lru_cache(maxsize=64)
def _places(
    x: Sequence[int], y: Sequence[int], channels: int, product: tuple[Axis, ...], weight_channels_last: bool
) -> torch.Tensor:
    count, x_strides = x[0], x[1:]
    begins, results = [_steps(0, x_strides[0], count)], [_steps(0, y[0], count)]
    along = [_steps(0, x_strides[1], channels)]
    for axis, of_x, of_y in zip(product, x_strides[2:], y[2:], strict=True):
        begins.append(_steps(axis.start * of_x, axis.step * of_x, axis.windows))
        along.append(torch.tensor(axis.offsets, device="cpu") * of_x)
        first, _, step = axis.outputs
        results.append(_steps(first * of_y, step * of_y, axis.windows))
    along = [*along[1:], along[0]] if weight_channels_last else along
    return torch.cat([_all_sums(each) for each in (begins, along, results)]).to(torch.int32)


def _steps(first: int, step: int, count: int) -> torch.Tensor:
    return torch.arange(count, device="cpu") * step + first


def _all_sums(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One of each part, added up: all there are, the last part's changing first."""
    total = parts[0]
    for part in parts[1:]:
        total = (total[:, None] + part).flatten()
    return total
