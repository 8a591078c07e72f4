"""The weights of an FP8 checkpoint against those it was made of: is the difference what rounding to FP8 explains?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..errors import FP8CheckpointError
from ..files.shared_scales import siblings_of
from .finding import Finding, error, warning
from .formats import block_size, without_unit_axes
from .high_precision import HIGH_PRECISION
from .layers import Layer
from .opened import Opened, open_folder, reading
from .values import Read, decoded_scale

# Of float8: half a step, as a share of a normal value, and of the smallest step of subnormal ones.
_HALF_STEPS = {torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}
_STEPS = 2.2  # layers that engines fuse are rounded a second time, and the base or a scale may be rounded to bfloat16
_UNEXPLAINED, _CLIPPED = 1e-4, 0.01  # shares of values
_FACTOR = 0.02  # how far the weights may be too large or too small, all in all
_SHARED_FACTOR = 2.0**-4  # where the shared scale is larger by half a step, all codes may have stayed
_PREFIXES = ("", "model.", "language_model.", "transformer.")


@dataclass(frozen=True)
class Error:
    """How far the weights of a layer are from those it was made of.

    Attributes:
        layer: its name.
        relative: the root of the mean squared difference, over that of the weights.
        unexplained: the share of values that are further off than rounding explains, and are not clipped.
        clipped: the share of values beyond the largest code.
        factor: by which the weights should be multiplied, so that they are nearest to the original.
        is_shared: whether it has the one scale of a layer that engines fuse it with.
    """

    layer: str
    relative: float
    unexplained: float
    clipped: float
    factor: float
    is_shared: bool = False

    @property
    def is_explained(self) -> bool:
        """Whether rounding to FP8 explains it; NaN is not."""
        off = self.unexplained > _UNEXPLAINED or self.clipped > _CLIPPED
        return not off and abs(self.factor - 1) <= (_SHARED_FACTOR if self.is_shared else _FACTOR)


def errors_against(opened: Opened, layers: list[Layer], base: str | os.PathLike[str]) -> list[Error]:
    """The error of each layer whose weight the base has in high precision.

    Raises:
        FP8CheckpointError: the base is no folder, or holds no weights in high precision of these layers.
    """
    other, others, found = open_folder(base), {layer.name: layer for layer in layers}, []
    with reading(opened) as read, reading(other) as read_base:
        for layer in layers:
            name = _name_in(layer.weight, other)
            if name is not None and _is_scaled(opened, layer):
                is_shared = _shares_scale(opened, layer, others, read)
                found.append(_error(layer, read, read_base(name), is_shared))
    if not found and any(_is_scaled(opened, layer) for layer in layers):
        raise FP8CheckpointError(
            f"{other.folder} has none of the weights of {opened.folder} in high precision (such as "
            f"{layers[0].weight}): give the folder of the model that was quantized"
        )
    return [each for each in found if each is not None]


def check_against(opened: Opened, layers: list[Layer], errors: list[Error]) -> Iterator[Finding]:
    """The layers that rounding to FP8 does not explain, and those that the base does not have."""
    known = {each.layer for each in errors}
    for each in errors:
        if not each.is_explained:
            found = f"a relative error of {each.relative:.4f}: {each.unexplained:.1%} of the values are further off "
            found += f"than rounding explains, {each.clipped:.1%} beyond the largest code, and the original is "
            found += f"{each.factor:.3f} times as large"
            expected = "values as near to the original as FP8 has them"
            yield error(each.layer, found, expected, "its scale or its codes are wrong: quantize the original again")
    for layer in layers:
        if layer.weight not in known and _is_scaled(opened, layer):
            yield warning(layer.weight, "no weight of this name and shape in the base", "one", "compare it by hand")


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values `[out, in, …]` of codes and their scale, in float32; blocks and groups are spread over their values."""
    values, factors = codes.float(), decoded_scale(scale)
    if factors.numel() > 1:
        if factors.ndim > values.ndim:
            factors = factors.reshape(without_unit_axes(tuple(factors.shape)))
        halves = factors.ndim > 2 and factors.shape[1:] == (2, 1)  # gate and up of experts, below each other
        factors = factors.reshape(*factors.shape, *[1] * (values.ndim - factors.ndim))
        for axis, (size, count) in enumerate(zip(values.shape, factors.shape, strict=True)):
            if count not in (1, size):
                each = None if halves else block_size(size, count)
                factors = factors.repeat_interleave(each or -(-size // count), dim=axis).narrow(axis, 0, size)
        return values * factors
    return values * factors.reshape(())


def _is_scaled(opened: Opened, layer: Layer) -> bool:
    """Whether a layer has a scale that its codes can be multiplied by; where not, that has been told."""
    if layer.scale is None:
        return False
    shape, codes = opened.tensors[layer.scale].shape, layer.codes.shape
    shape = shape if len(shape) <= len(codes) else without_unit_axes(shape)
    counts = zip(codes, shape, strict=False)
    return set(shape) <= {1} or len(shape) <= len(codes) and all(0 < count <= size for size, count in counts)


def _name_in(weight: str, base: Opened) -> str | None:
    for prefix in _PREFIXES:
        for name in (f"{prefix}{weight}", weight.removeprefix(prefix)):
            header = base.tensors.get(name)
            if header is not None and header.dtype in HIGH_PRECISION:
                return name
    return None


def _shares_scale(opened: Opened, layer: Layer, others: Mapping[str, Layer], read: Read) -> bool:
    """Whether a layer has one scale, the very one of a layer that engines fuse it with."""
    for name in siblings_of(layer.name):
        other = others.get(name)
        if name == layer.name or other is None or other.scale is None or layer.scale is None:
            continue
        if all({*opened.tensors[each].shape} <= {1} for each in (layer.scale, other.scale)):
            one, two = decoded_scale(read(layer.scale)), decoded_scale(read(other.scale))
            if torch.equal(one.flatten(), two.flatten()):
                return True
    return False


def _error(layer: Layer, read: Read, original: torch.Tensor, is_shared: bool) -> Error | None:
    """None: the base has another shape."""
    assert layer.scale is not None
    codes, scale = read(layer.weight).reshape(layer.codes.shape), read(layer.scale)
    shapes, as_stored = (original, original.mT if original.ndim > 1 else original), tuple(codes.shape)
    found = [_difference(layer.weight, codes, scale, each, is_shared) for each in shapes[:1] if each.shape == as_stored]
    if not (found and found[0].is_explained) and original.ndim in (2, 3) or not found:
        turned = shapes[1]  # as those of a class that stores `[in, out]`, which the shape of a square one does not tell
        found += [_difference(layer.weight, codes, scale, turned, is_shared)] if turned.shape == as_stored else []
    return min(found, key=lambda each: each.relative, default=None)


def _difference(name: str, codes: torch.Tensor, scale: torch.Tensor, original: torch.Tensor, is_shared: bool) -> Error:
    weight, values = original.float(), dequantized(codes, scale)
    step = dequantized(torch.ones_like(codes), scale)
    normal, subnormal = _HALF_STEPS[codes.dtype]
    difference = (weight - values).abs()
    off = ~(difference <= _STEPS * (normal * weight.abs() + subnormal * step))
    magnitude = codes.float().abs()
    clipped = off & (magnitude == magnitude.max()) & (weight.abs() > values.abs())
    count, norm = max(1, weight.numel()), float(weight.norm())
    relative = float(difference.norm()) / norm if norm else float(difference.norm())
    power = float((values * values).sum())
    factor = float((values * weight).sum()) / power if power else 1.0 if not norm else float("inf")
    unexplained, beyond = float((off & ~clipped).sum()) / count, float(clipped.sum()) / count
    return Error(name, relative, unexplained, beyond, factor, is_shared)
