"""Scale methods of published FP8 checkpoints: scales that use the whole range of FP8, by channels, blocks or groups."""

from __future__ import annotations

from . import values  # noqa: F401  # registers the value rules that methods name
from .granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from .methods import ScaleMethod, register_method
from .rule import ScaleRule

_TENSOR = ScaleRule(PerTensor(), "maxabs", "identity")
_CHANNEL = ScaleRule(PerChannel(), "maxabs", "identity")
_BLOCK = ScaleRule(PerBlock(128, 128), "maxabs", "identity")


def _microscaled(name: str, rounding: str) -> ScaleMethod:
    """OCP's MXFP8: 32 values along the input share a scale that is an exponent alone."""
    rule = ScaleRule(PerGroup(32), "maxabs", rounding)
    return ScaleMethod(name, rule, rule, dynamic_only=True)


for _method in (
    ScaleMethod("full_range", _TENSOR, _TENSOR, dynamic=PerToken()),
    ScaleMethod("full_range_pcs", _CHANNEL, _TENSOR, dynamic=PerToken()),
    ScaleMethod("full_range_by_tensor", _TENSOR, _TENSOR),
    ScaleMethod("full_range_pcs_by_tensor", _CHANNEL, _TENSOR),
    ScaleMethod("block_128", _BLOCK, ScaleRule(PerGroup(128), "maxabs", "identity"), dynamic_only=True),
    ScaleMethod("block_128_e8m0", _BLOCK, ScaleRule(PerGroup(128), "maxabs", "e8m0_ceil"), dynamic_only=True),
    _microscaled("mxfp8", "e8m0_ceil"),
    _microscaled("mxfp8_above", "e8m0_above"),
    _microscaled("mxfp8_floor", "e8m0_floor"),
):
    register_method(_method)
