"""Layers that serving engines fuse, query with key and value and gate with up, and that share one scale for it."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FP8ConfigError, FP8SelectionError
from ..scales import PerTensor
from .plan import Layer, with_shared_scales

# Names that siblings have which are given the same input, and are fused.
_SIBLINGS = [
    *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v")),
    *(("wq", "wk", "wv"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1")),
]


def siblings_of(name: str) -> list[str]:
    """The names of the layers that are fused with the layer `name`, itself among them; empty where none would be."""
    parent, dot, leaf = name.rpartition(".")
    names = next((names for names in _SIBLINGS if leaf in names), ())
    return [f"{parent}{dot}{each}" for each in names]


def share_scales(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers, siblings with one scale per tensor: the largest of their own.

    Raises:
        FP8ConfigError: the scales of siblings are not per tensor.
        FP8SelectionError: there are no siblings.
    """
    groups = []
    for name in layers:
        siblings = siblings_of(name)
        group = [each for each in siblings if each in layers] if name in siblings[:1] else []
        schemes = {layers[each].scheme for each in group}
        if len(group) < 2 or len(schemes) > 1:
            continue
        granularity = layers[name].scheme.weight.granularity
        if not isinstance(granularity, PerTensor):
            raise FP8ConfigError(
                f"share_scales is about scales per tensor, but those of {name} are {granularity}: leave it out, or use "
                "a scale_method with weights per tensor, such as maxabs_hw"
            )
        groups.append(group)
    if not groups:
        raise FP8SelectionError(
            "share_scales: no layers in FP8 have names that tell they are fused (such as q_proj, k_proj and v_proj, or "
            "gate_proj and up_proj) and one scheme: leave it out"
        )
    return with_shared_scales(layers, groups)
