"""What a checkpoint of another maker says of each layer in FP8: the intermediate between all formats and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import FP8CheckpointError, nearest

TENSOR, CHANNEL, BY_BLOCK, MX = "tensor", "channel", "block", "mx"
STATIC, PER_TENSOR, TOKEN, GROUP_128, GROUP_128_E8M0, GROUP_32, NONE = (
    *("static", "tensor", "token", "group_128", "group_128_e8m0", "group_32", "none"),
)

# How weights and inputs may be scaled together, and the keys of FP8Config that say so.
_KEYS: dict[tuple[str, str], dict[str, Any]] = {
    (TENSOR, STATIC): {"scale_method": "full_range", "activation_scheme": "static"},
    (TENSOR, TOKEN): {"scale_method": "full_range", "activation_scheme": "dynamic"},
    (TENSOR, PER_TENSOR): {"scale_method": "full_range_by_tensor", "activation_scheme": "dynamic"},
    (TENSOR, NONE): {"scale_method": "full_range", "activation_scheme": "weight_only"},
    (CHANNEL, STATIC): {"scale_method": "full_range_pcs", "activation_scheme": "static"},
    (CHANNEL, TOKEN): {"scale_method": "full_range_pcs", "activation_scheme": "dynamic"},
    (CHANNEL, PER_TENSOR): {"scale_method": "full_range_pcs_by_tensor", "activation_scheme": "dynamic"},
    (CHANNEL, NONE): {"scale_method": "full_range_pcs", "activation_scheme": "weight_only"},
    (BY_BLOCK, GROUP_128): {"scale_method": "block_128", "activation_scheme": "dynamic"},
    (BY_BLOCK, GROUP_128_E8M0): {"scale_method": "block_128_e8m0", "activation_scheme": "dynamic"},
    (BY_BLOCK, NONE): {"scale_method": "block_128", "activation_scheme": "weight_only"},
    (MX, GROUP_32): {"scale_method": "mxfp8", "activation_scheme": "dynamic"},
    (MX, NONE): {"scale_method": "mxfp8", "activation_scheme": "weight_only"},
}


@dataclass(frozen=True)
class Layer:
    """One layer in FP8.

    Attributes:
        weights: how its weight is scaled: "tensor", "channel", "block" (128 × 128) or "mx" (32 values, exponents).
        inputs: how its input is: "static", "tensor" and "token" by their own range, "group_128", "group_128_e8m0",
            "group_32", or "none".
        keys: the names of its tensors in the files, by ours: "weight", "weight_scale", "input_scale".
        transposed: whether its weight is stored `[in, out]`.
        options: keys of FP8Config that hold for it besides those of its scheme, or in their place.
    """

    weights: str
    inputs: str
    keys: Mapping[str, str]
    transposed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape `[out, in]` of its weight, which is stored in another."""
        return stored[::-1] if self.transposed else stored


@dataclass(frozen=True)
class Cache:
    """The calibrated scales of the keys and values that one attention module caches.

    Attributes:
        keys: the names of the tensors in the files, by ours: "k_scale", "v_scale".
    """

    keys: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds.

    Attributes:
        layers: those in FP8, by their names in the files.
        caches: attention modules whose keys and values are cached in FP8, by their names there.
        by_head: whether each head has a scale of its own.
        unread: names of tensors that change nothing here, such as zero points of zero.
    """

    layers: Mapping[str, Layer]
    caches: Mapping[str, Cache] = field(default_factory=dict)
    by_head: bool = False
    unread: frozenset[str] = frozenset()


def keys_for(name: str, layer: Layer, method: str) -> dict[str, Any]:
    """The keys of FP8Config that ask for a layer's scheme.

    Raises:
        FP8CheckpointError: weights and inputs that are not scaled so together here.
    """
    found = _KEYS.get((layer.weights, layer.inputs))
    if found is None:
        known = "; ".join(f"{weights} with {inputs}" for weights, inputs in _KEYS)
        raise FP8CheckpointError(
            f"quant_method={method!r}: {name} has weights scaled by {layer.weights} with inputs scaled by "
            f"{layer.inputs}, which is not read: expected {known}"
        )
    return {**found, **layer.options}


def not_read(method: str, place: str, found: Any, supported: str) -> FP8CheckpointError:
    """The error for what a checkpoint says and this package cannot do: where, what was found, what is supported."""
    return FP8CheckpointError(f"quant_method={method!r}: {place} is {found!r}, which is not read: expected {supported}")


def check_fields(method: str, place: str, said: Any, known: Mapping[str, tuple[Any, ...] | None]) -> dict[str, Any]:
    """The fields of an object in a configuration, all of them known.

    Args:
        method: the quant_method, for messages.
        place: of the object in the configuration, for messages.
        said: the object.
        known: the fields that may be there, with the values that they may have; None: any.

    Raises:
        FP8CheckpointError: names the field, what was found and what is supported.
    """
    if not isinstance(said, Mapping):
        raise not_read(method, place, said, "an object")
    for name, value in said.items():
        if name not in known:
            raise FP8CheckpointError(
                f"quant_method={method!r}: {place} has the field {name!r} ({value!r}), which is unknown and may change "
                f"what is computed: {nearest(str(name), known)}"
            )
        values = known[name]
        if values is not None and value not in values:
            raise not_read(method, f"{place}.{name}", value, " or ".join(map(repr, values)))
    return dict(said)
