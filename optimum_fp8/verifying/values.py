"""The values of a checkpoint: codes that are NaN, scales that are not sound, what looks as if it was never set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from ..formats import is_fp8, not_finite
from ..scales import unsound
from .finding import Finding, error, warning
from .formats import WEIGHT_SCALES
from .layers import Layer
from .opened import COPY, Opened

_AGAIN = "quantize the original model again"
_E8M0_NAN, _E8M0_BIAS = 255, 127
Read = Callable[[str], torch.Tensor]


def check_values(opened: Opened, layers: list[Layer], read: Read, sealed: bool) -> Iterator[Finding]:
    """What is wrong with codes, scales and all the rest.

    Args:
        opened: the checkpoint.
        layers: its codes.
        read: reads a tensor by its name.
        sealed: whether each tensor is known to be as it was saved: then what is odd was meant.
    """
    codes, scales = {layer.weight for layer in layers}, set(scales_in(opened))
    for layer in layers:
        yield from _check_codes(layer.weight, read(layer.weight), sealed)
    ones: list[str] = []
    for name in sorted(scales):
        scale = decoded_scale(read(name))
        if scale.numel() == 0:
            yield error(name, "an empty scale", "values above 0", COPY)
        elif unsound(scale):
            yield error(name, _how(scale), "finite values above 0", _AGAIN)
        elif bool((scale == 1).all()):
            ones.append(name)
    yield from _never_set(ones, scales, read, sealed)
    for name in sorted(opened.tensors.keys() - codes - scales):
        tensor = read(name) if opened.tensors[name].dtype is not None else torch.zeros(())
        if tensor.is_floating_point() and tensor.itemsize > 1 and not bool(tensor.isfinite().all()):
            yield error(name, "values that are NaN or Inf", "finite values", COPY)


def scales_in(opened: Opened) -> list[str]:
    """The names of all scales: of weights, inputs, attention and caches."""
    return [name for name in opened.tensors if _is_scale(name)]


def _is_scale(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf.endswith(("_scale", "_scale_inv")) or leaf in WEIGHT_SCALES or leaf.startswith("scale_")


def decoded_scale(scale: torch.Tensor) -> torch.Tensor:
    """A scale as float32: bytes of E8M0 are powers of two."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scale.view(torch.uint8).float()
        return torch.where(exponents == _E8M0_NAN, torch.nan, torch.exp2(exponents - _E8M0_BIAS))
    return scale.float()


def _how(scale: torch.Tensor) -> str:
    bad = ~torch.isfinite(scale) | (scale <= 0)
    return f"{scale[bad][:4].tolist()} ({int(bad.sum())} of {scale.numel()} values)"


def _check_codes(name: str, codes: torch.Tensor, sealed: bool) -> Iterator[Finding]:
    if not is_fp8(codes.dtype) or not codes.numel():
        return
    if not_finite(codes):
        yield error(name, "codes that are NaN or Inf", "finite codes", COPY)
    elif not bool((codes.view(torch.uint8) & 0x7F).any()):
        say = warning if sealed else error
        yield say(name, "codes that are all zero", "the codes of a weight", "compare with the original (--against)")


def _never_set(ones: Collection[str], scales: Collection[str], read: Read, sealed: bool) -> Iterator[Finding]:
    """Scales of exactly 1 among others of the same kind that are no powers of two."""
    for leaf in sorted({name.rpartition(".")[2] for name in ones}):
        alike = [name for name in scales if name.rpartition(".")[2] == leaf]
        of_one = [name for name in ones if name.rpartition(".")[2] == leaf]
        by_choice = (
            sealed or len(alike) > len(of_one) and all(_powers_of_two(decoded_scale(read(each))) for each in alike)
        )
        for name in () if by_choice else sorted(of_one):
            yield warning(name, "a scale of exactly 1", "one that was measured", "was it ever set? calibrate again")


def _powers_of_two(scale: torch.Tensor) -> bool:
    return bool((torch.frexp(scale).mantissa == 0.5).all())
