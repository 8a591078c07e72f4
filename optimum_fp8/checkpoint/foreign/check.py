"""Whether the tensors of a checkpoint are what its configuration says: by their names, dtypes and shapes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from ...errors import FP8CheckpointError
from ...ops.operands import BLOCK
from ..engine_schemes import E8M0_BIAS, MX_GROUP
from .headers import Files, Header
from .layers import BY_BLOCK, CHANNEL, MX, STATIC, Found, Layer

_FLOATS, _EXPONENTS = ("F32", "BF16", "F16"), ("U8", "F8_E8M0")
_E8M0_NAN = 255

# What tools call tensors that belong to quantized weights and activations: none may be left over unread.
_COMPANION = re.compile(
    r"(?:weight|input|output|activation|prob_output|[qkvp]|kv|[qkv]_cache)_"
    r"(?:scale|zero_point|global_scale|packed|shape|g_idx|quantizer).*"
    r"|q(?:weight|zeros|scales|scale_\w+)|.*scale_inv|_(?:data|scale|weight_qdata|weight_scale)"
)


def check_found(method: str, found: Found, files: Files) -> None:
    """Refuse a checkpoint whose tensors are not what is said of them, or that has others which mean something.

    Raises:
        FP8CheckpointError: names the tensor, what was found and what was expected.
    """
    if not found.layers:
        raise FP8CheckpointError(
            f"quant_method={method!r}: {files.folder} has no layer in FP8: expected weights in F8_E4M3 or F8_E5M2"
        )
    for name, layer in found.layers.items():
        _check_layer(method, name, layer, files.headers)
    for name, cache in found.caches.items():
        for ours, key in cache.keys.items():
            header = _header(method, f"{name}.{ours}", key, files.headers)
            if header.dtype not in _FLOATS or (not found.by_head and _numel(header.shape) != 1):
                expected = "one for each head" if found.by_head else "a single number"
                raise _wrong(method, key, header, f"{expected}, in {' or '.join(_FLOATS)}")
    _refuse_the_rest(method, found, files)


def _check_layer(method: str, name: str, layer: Layer, headers: Mapping[str, Header]) -> None:
    weight = _header(method, f"{name}.weight", layer.keys["weight"], headers)
    if not weight.is_fp8 or len(weight.shape) != 2:
        raise _wrong(method, layer.keys["weight"], weight, "codes [out, in] in F8_E4M3 or F8_E5M2")
    scale = _header(method, f"{name}.weight_scale", layer.keys.get("weight_scale"), headers)
    expected = scale_shape(layer.weights, layer.shape(weight.shape))
    dtypes = _EXPONENTS if layer.weights == MX else (*_FLOATS, "F8_E8M0")
    if _squeezed(scale.shape) != _squeezed(expected) or scale.dtype not in dtypes:
        raise _wrong(
            method, layer.keys["weight_scale"], scale, f"{list(expected)} in {' or '.join(dtypes)}, for {weight}"
        )
    if (layer.inputs == STATIC) != ("input_scale" in layer.keys):
        if layer.inputs == STATIC:
            _header(method, f"{name}.input_scale", None, headers)
        raise FP8CheckpointError(
            f"quant_method={method!r}: {layer.keys['input_scale']} is in the files, but the configuration says that "
            f"inputs are scaled by {layer.inputs}: one of them was edited; correct the configuration, or copy the "
            "checkpoint again"
        )
    if layer.inputs == STATIC:
        header = _header(method, f"{name}.input_scale", layer.keys["input_scale"], headers)
        if _numel(header.shape) != 1 or header.dtype not in _FLOATS:
            raise _wrong(method, layer.keys["input_scale"], header, f"a single number in {' or '.join(_FLOATS)}")


def scale_shape(weights: str, shape: Collection[int]) -> tuple[int, ...]:
    """The shape of the scale of a weight `[out, in]`, as we have it."""
    out, size = shape
    if weights == BY_BLOCK:
        return -(-out // BLOCK), -(-size // BLOCK)
    if weights == MX:
        return out, -(-size // MX_GROUP)
    return (out, 1) if weights == CHANNEL else (1,)


def as_ours(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A scale of a file as float32 of the shape that we have: exponents (uint8, float8_e8m0fnu) become 2^(b - 127).

    Raises:
        FP8CheckpointError: another number of values; an exponent that stands for NaN.
    """
    if scale.numel() != torch.Size(shape).numel():
        raise FP8CheckpointError(f"found a scale {tuple(scale.shape)}, expected {shape}")
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scale.view(torch.uint8)
        if bool((exponents == _E8M0_NAN).any()):
            raise FP8CheckpointError("found a scale of e8m0 that is NaN")
        scale = torch.exp2(exponents.double() - E8M0_BIAS)  # the least, 2^-127, is no normal float32
    return scale.to(torch.float32).reshape(shape)


def _header(method: str, ours: str, key: str | None, headers: Mapping[str, Header]) -> Header:
    if key is None or key not in headers:
        raise FP8CheckpointError(
            f"quant_method={method!r}: {key or ours} is missing, which the configuration says is there: the checkpoint "
            "is damaged or incomplete; copy it again"
        )
    return headers[key]


def _wrong(method: str, key: str, header: Header, expected: str) -> FP8CheckpointError:
    return FP8CheckpointError(f"quant_method={method!r}: {key} is {header}, expected {expected}")


def _refuse_the_rest(method: str, found: Found, files: Files) -> None:
    """Refuse codes that belong to no layer, and whatever else beside weights the reader did not take."""
    parts = [each.keys for each in found.layers.values()] + [each.keys for each in found.caches.values()]
    taken = {key for keys in parts for key in keys.values()} | found.unread
    for key, header in files.headers.items():
        if key in taken:
            continue
        leaf = key.rpartition(".")[2]
        if header.dtype.startswith("F8_"):
            raise FP8CheckpointError(
                f"quant_method={method!r}: {key} is {header}, codes that no layer of the configuration has: they are "
                "not read; expected two-dimensional weights of linear layers"
            )
        if "." in key and _COMPANION.fullmatch(leaf):
            raise FP8CheckpointError(
                f"quant_method={method!r}: {key} ({header}) belongs to something that is quantized and is not read by "
                "this package, so that it would be lost silently: see docs/other-checkpoints.md for what is read"
            )


def zero_points(files: Files, keys: Collection[str], method: str) -> frozenset[str]:
    """Those of `keys` that are zero points, all of them zero, as FP8's are.

    Raises:
        FP8CheckpointError: one that is not zero.
    """
    found = [key for key in keys if key.endswith("_zero_point")]
    for key in found:
        if bool(files.read(key).float().any()):
            raise FP8CheckpointError(f"quant_method={method!r}: {key} is not zero: FP8 codes have no zero point")
    return frozenset(found)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
