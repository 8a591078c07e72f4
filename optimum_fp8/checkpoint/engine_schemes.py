"""What serving engines call the ways to scale a layer, and how their files hold the scales."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import FP8CheckpointError
from ..ops.operands import BLOCK
from ..scales import Granularity, PerBlock, PerGroup, PerTensor, PerToken, Scheme
from .format import Record

MX_GROUP = 32  # values that share a scale in MXFP8
E8M0_BIAS = 127
QUERY_KEY_VALUE = ("q_scale", "k_scale", "v_scale")


def layers(records: Iterable[Record]) -> list[Record]:
    """The records with weights; the others are of attention and caches."""
    return [record for record in records if "weight" in record.tensors]


def is_microscaled(scheme: Scheme) -> bool:
    """Whether weights have scales of e8m0 for groups of 32 values."""
    return scheme.weight.granularity == PerGroup(MX_GROUP) and scheme.weight.rounding != "identity"


def granularity_of(record: Record) -> Granularity:
    """That of a layer's weight scale; a scale whose value is fixed is one for the tensor, and has one dimension."""
    assert record.scheme is not None
    scale, said = record.tensors["weight_scale"], record.scheme.weight.granularity
    one_block = isinstance(said, PerBlock | PerGroup) and scale.ndim > 1
    return PerTensor() if scale.numel() == 1 and not one_block else said


def check_layer(record: Record, format: str) -> None:
    """Refuse a layer that engines have no linear layer for.

    Raises:
        FP8CheckpointError: names the layer and what it is.
    """
    assert record.scheme is not None
    weight, scheme = record.tensors["weight"], record.scheme
    wrong = None
    if record.kind == "embedding":
        wrong = "is a table of embeddings in FP8: quantize without quantize_embeddings"
    elif record.stores_in_out:
        wrong = "has a weight [in, out], as no Linear has: list it in modules_to_not_convert"
    elif weight.ndim != 2:
        wrong = f"has a weight of {weight.ndim} dimensions, a convolution's: list it in modules_to_not_convert"
    elif weight.dtype != torch.float8_e4m3fn:
        wrong = f"is in {weight.dtype}: quantize with fp8_config='E4M3'"
    elif isinstance(granularity_of(record), PerBlock) and weight.shape[1] % BLOCK:
        wrong = f"has {weight.shape[1]} inputs, which blocks of {BLOCK} do not divide"
    elif isinstance(granularity_of(record), PerGroup) and weight.shape[1] % scheme.weight.granularity.group:
        wrong = f"has {weight.shape[1]} inputs, which groups of {scheme.weight.granularity.group} do not divide"
    if wrong:
        raise FP8CheckpointError(f"format={format!r}: {record.name} {wrong}; engines have no such linear layer")


def not_expressed(record: Record, format: str, what: str, advice: str) -> FP8CheckpointError:
    """The error for a feature that a format cannot express."""
    return FP8CheckpointError(f"format={format!r} cannot express {what}, which {record.name} has: {advice}")


def input_of(record: Record) -> str:
    """How a layer's input is scaled: "none", "static", "tensor", "token", "group_128" or "group_32"."""
    scheme = record.scheme
    assert scheme is not None
    if "input_scale" in record.tensors:
        return "static"
    if not scheme.is_dynamic:
        return "none"
    granularity = scheme.input.granularity
    if isinstance(granularity, PerToken):
        return "token"
    return f"group_{granularity.group}" if isinstance(granularity, PerGroup) else "tensor"


def as_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Scales that are powers of two as e8m0 bytes (uint8): the exponent plus 127.

    Raises:
        FP8CheckpointError: one is no power of two.
    """
    mantissa, exponent = torch.frexp(scale)
    if not bool((mantissa == 0.5).all()):
        raise FP8CheckpointError(
            "a scale is no power of two, as those of MXFP8 are: quantize with scale_method='mxfp8'"
        )
    return (exponent - 1 + E8M0_BIAS).to(torch.uint8)
