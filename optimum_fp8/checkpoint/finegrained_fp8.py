"""The format `fp8` of transformers' FineGrainedFP8Config, in which DeepSeek publishes: `X.weight` and
`X.weight_scale_inv`, a multiplier all the same, for blocks of 128 × 128, or for groups of 32 in e8m0 (MXFP8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import FP8CheckpointError
from ..ops.operands import BLOCK
from ..scales import PerBlock
from .engine_schemes import (
    MX_GROUP,
    as_e8m0,
    check_layer,
    granularity_of,
    input_of,
    is_microscaled,
    layers,
    not_expressed,
)
from .format import Checkpoint, Record, register_format

NAME = "fp8"
_ELSE = "export it as 'compressed-tensors', or quantize with FP8Config.preset('FP8_BLOCK')"


class FineGrainedFP8:
    """The four methods of a format, for `fp8`."""

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise FP8CheckpointError, naming module and feature, for what the format cannot express."""
        microscaled = set()
        for record in checkpoint.records:
            if "weight" not in record.tensors:
                raise not_expressed(record, NAME, "scales of attention and caches", _ELSE)
            check_layer(record, NAME)
            _check_scheme(record)
            assert record.scheme is not None
            microscaled.add(is_microscaled(record.scheme))
            if len(microscaled) > 1:
                raise not_expressed(record, NAME, "another size of blocks than other layers", _ELSE)

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Codes as they are, and scales by the names that transformers gives them."""
        found = {}
        for record in checkpoint.records:
            assert record.scheme is not None
            scale = record.tensors["weight_scale"]
            found[f"{record.name}.weight_scale_inv"] = as_e8m0(scale) if is_microscaled(record.scheme) else scale
            others = {name: tensor for name, tensor in record.tensors.items() if name != "weight_scale"}
            found |= {f"{record.name}.{name}": tensor for name, tensor in others.items()}
        return found

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """`quantization_config` as FineGrainedFP8Config has it."""
        first = next(iter(layers(checkpoint.records))).scheme
        assert first is not None
        sizes = {"weight_block_size": [1, MX_GROUP], "scale_fmt": "ue8m0"}
        return {
            "quant_method": NAME,
            "activation_scheme": "dynamic",
            **(sizes if is_microscaled(first) else {"weight_block_size": [BLOCK, BLOCK]}),
            "modules_to_not_convert": checkpoint.all_names(checkpoint.left_out),
        }

    def records(self, files: Sequence[str]) -> Checkpoint:
        """Not there: such checkpoints are read by `native_config`."""
        raise FP8CheckpointError(
            f"a checkpoint in the format {NAME!r} is loaded with from_pretrained(path, config=native_config(path))"
        )


register_format(NAME, FineGrainedFP8())


def _check_scheme(record: Record) -> None:
    granularity, inputs = granularity_of(record), input_of(record)
    assert record.scheme is not None
    if is_microscaled(record.scheme):
        if inputs != "group_32":
            raise not_expressed(record, NAME, f"MXFP8 with inputs scaled by {inputs}", _ELSE)
    elif not isinstance(granularity, PerBlock) or inputs != "group_128":
        raise not_expressed(record, NAME, f"weights scaled {granularity} with inputs scaled by {inputs}", _ELSE)
