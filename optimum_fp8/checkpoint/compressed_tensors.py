"""The format compressed-tensors, which vLLM, SGLang and transformers load: `X.weight` `[out, in]` in FP8,
`X.weight_scale`, and `X.input_scale` where it is static; attention modules have `Y.q_scale`, `Y.k_scale`, `Y.v_scale`.

Field by field as the package compressed-tensors reads them in its versions 0.17 to 0.20.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import FP8CheckpointError
from ..scales import PerBlock, PerChannel, PerGroup, PerTensor
from .engine_schemes import (
    QUERY_KEY_VALUE,
    as_e8m0,
    check_layer,
    granularity_of,
    input_of,
    is_microscaled,
    layers,
    not_expressed,
)
from .format import Checkpoint, Record, register_format

NAME = "compressed-tensors"
_FLOAT, _MX, _MIXED = "float-quantized", "mxfp8-quantized", "mixed-precision"
_INPUTS = {
    "static": {"strategy": "tensor", "dynamic": False},
    "tensor": {"strategy": "tensor", "dynamic": True},
    "token": {"strategy": "token", "dynamic": True},
    "group_128": {"strategy": "group", "group_size": 128, "dynamic": True},
    "group_32": {"strategy": "group", "group_size": 32, "dynamic": True},
}


class CompressedTensors:
    """The four methods of a format, for compressed-tensors."""

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise FP8CheckpointError, naming module and feature, for what the format cannot express."""
        for record in checkpoint.records:
            if "weight" in record.tensors:
                check_layer(record, NAME)
                _arguments(record)
            else:
                _check_attention(record)
        _kv_cache_scheme(checkpoint.records)

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Codes and scales as they are, but scales of MXFP8 as bytes of e8m0."""
        found = {}
        for record in checkpoint.records:
            for name, tensor in record.tensors.items():
                bytes_wanted = name == "weight_scale" and record.scheme is not None and is_microscaled(record.scheme)
                found[f"{record.name}.{name}"] = as_e8m0(tensor) if bytes_wanted else tensor
        return found

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """`quantization_config`: a group for each way to scale, the most frequent first."""
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for record in layers(checkpoint.records):
            arguments = _arguments(record)
            groups.setdefault(repr(arguments), (arguments, []))[1].append(record.name)
        by_size = sorted(groups.values(), key=lambda group: -len(group[1]))
        alone = len(by_size) == 1
        formats = {arguments["format"] for arguments, _ in by_size}
        return {
            "quant_method": NAME,
            "format": formats.pop() if len(formats) == 1 else _MIXED,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": {
                f"group_{number}": {**arguments, "targets": ["Linear"] if alone else checkpoint.all_names(names)}
                for number, (arguments, names) in enumerate(by_size)
            },
            "ignore": checkpoint.all_names(checkpoint.left_out),
            "kv_cache_scheme": _kv_cache_scheme(checkpoint.records),
        }

    def records(self, files: Sequence[str]) -> Checkpoint:
        """Not there: such checkpoints are read by `native_config`."""
        raise FP8CheckpointError(
            f"a checkpoint in the format {NAME!r} is loaded with from_pretrained(path, config=native_config(path))"
        )


register_format(NAME, CompressedTensors())


def _arguments(record: Record) -> dict[str, Any]:
    """A group of the configuration without its targets."""
    assert record.scheme is not None
    granularity, inputs = granularity_of(record), input_of(record)
    microscaled = is_microscaled(record.scheme)
    if isinstance(granularity, PerTensor):
        weights: dict[str, Any] = {"strategy": "tensor"}
    elif isinstance(granularity, PerChannel):
        weights = {"strategy": "channel"}
    elif isinstance(granularity, PerBlock):
        weights = {"strategy": "block", "block_structure": [granularity.rows, granularity.columns]}
    elif isinstance(granularity, PerGroup) and microscaled:
        weights = {"strategy": "group", "group_size": granularity.size, "scale_dtype": "torch.uint8"}
    else:
        raise not_expressed(
            record, NAME, f"weights scaled {granularity}", "use FP8Config.preset('FP8_BLOCK') or 'MXFP8'"
        )
    if (inputs == "group_32") != (microscaled and inputs != "none") or (
        inputs == "group_128" and not isinstance(granularity, PerBlock)
    ):
        raise not_expressed(
            record, NAME, f"weights scaled {granularity} with inputs scaled by {inputs}", "use a preset"
        )
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    taken = None if inputs == "none" else {**common, **_INPUTS[inputs]}
    if taken is not None and microscaled:
        taken["scale_dtype"] = "torch.uint8"
    return {
        "format": _MX if microscaled else _FLOAT,
        "weights": {**common, "dynamic": False, **weights},
        "input_activations": taken,
        "output_activations": None,
    }


def _check_attention(record: Record) -> None:
    others = sorted(set(record.tensors) - set(QUERY_KEY_VALUE))
    if others:
        raise not_expressed(
            record,
            NAME,
            f"{' and '.join(others)}",
            f"quantize with kv_cache=True and without attention=True, or leave them to the engine: without={others}",
        )
    if not {"k_scale", "v_scale"} <= set(record.tensors):
        found = ", ".join(sorted(record.tensors)) or "no calibrated scales"
        raise not_expressed(
            record,
            NAME,
            f"a cache in FP8 with {found}",
            "calibrate attention: FP8Config(…, overrides={'attn$': {'activation_scheme': 'static'}})",
        )


def _kv_cache_scheme(records: Sequence[Record]) -> dict[str, Any] | None:
    caches = [record for record in records if "weight" not in record.tensors]
    if not caches:
        return None
    by_head = {record.tensors["k_scale"].ndim == 3 for record in caches}
    if len(by_head) > 1:
        raise not_expressed(caches[-1], NAME, "caches by tensor beside caches by head", "use one attention_granularity")
    strategy = "attn_head" if by_head.pop() else "tensor"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}
