"""The format of NVIDIA's ModelOpt, which vLLM, SGLang and TensorRT-LLM load: `X.weight` `[out, in]` in FP8 and
`X.weight_scale`, `X.input_scale` where it is static, and the scales of a cache below its projections.

| quant_algo | `X.weight_scale` | `X.input_scale` |
|---|---|---|
| FP8 | float32, no dimension | float32, no dimension |
| FP8_PER_CHANNEL_PER_TOKEN | float32 `[out]` | |
| FP8_PB_WO | float32 `[out / 128, 1, in / 128, 1]` | |
| MXFP8 | uint8 `[out, in / 32]`, exponents plus 127 | |

Of attention `Y.k_proj.k_scale` and `Y.v_proj.v_scale`, float32 without dimension. Where layers differ, the algorithm is
MIXED_PRECISION, and each has its own. As ModelOpt 0.47 writes it, and vLLM 0.32 reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import FP8CheckpointError
from ..ops.operands import BLOCK
from ..scales import PerBlock, PerChannel, PerTensor
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

NAME = "modelopt"
FP8, PER_CHANNEL, PER_BLOCK, MXFP8 = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"
MIXED = "MIXED_PRECISION"
CONFIG_FILE = "hf_quant_config.json"  # beside config.json, which says the same in another way
_PRODUCER = {"name": "optimum_fp8"}
_ELSE = "export it as 'compressed-tensors'"
_FLOAT = {"dynamic": False, "num_bits": 8, "type": "float"}
# Layers whose names have one of these are built in high precision by vLLM, whatever the checkpoint says.
_NEVER_IN_FP8 = ("vision_tower", "vision_model", "visual")


class ModelOpt:
    """The four methods of a format, for ModelOpt, and the file that stands beside `config.json`."""

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise FP8CheckpointError, naming module and feature, for what the format cannot express."""
        for record in checkpoint.records:
            if "weight" in record.tensors:
                check_layer(record, NAME)
                _check_name(record, checkpoint.left_out)
                algorithm_of(record)
            else:
                _check_attention(record)

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Codes as they are, and scales in the shapes that are read."""
        found: dict[str, torch.Tensor] = {}
        for record in checkpoint.records:
            if "weight" not in record.tensors:
                found |= {
                    f"{record.name}.{part[0]}_proj.{part}": scale.reshape(()) for part, scale in record.tensors.items()
                }
                continue
            found[f"{record.name}.weight"] = record.tensors["weight"]
            found[f"{record.name}.weight_scale"] = _weight_scale(record)
            if "input_scale" in record.tensors:
                found[f"{record.name}.input_scale"] = record.tensors["input_scale"].reshape(())
        return found

    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """`quantization_config` of `config.json`."""
        algorithms, common = _algorithms(checkpoint)
        said = {
            "quant_method": NAME,
            "quant_algo": common,
            "ignore": [] if common == MIXED else sorted(checkpoint.left_out),
            "producer": dict(_PRODUCER),
        }
        if common == MIXED:
            said["quantized_layers"] = {name: _of_layer(algorithm) for name, algorithm in algorithms.items()}
            said["config_groups"] = {
                f"group_{number}": {**_group(algorithm), "targets": names}
                for number, (algorithm, names) in enumerate(_by_algorithm(algorithms))
            }
        elif common == FP8:
            said["config_groups"] = {"group_0": {**_group(FP8), "targets": ["Linear"]}}
        return said | ({"kv_cache_scheme": dict(_FLOAT)} if _has_cache(checkpoint) else {})

    def files(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """`hf_quant_config.json`."""
        algorithms, common = _algorithms(checkpoint)
        said: dict[str, Any] = {"quant_algo": common, "kv_cache_quant_algo": FP8 if _has_cache(checkpoint) else None}
        if common == MIXED:
            said["quantized_layers"] = {name: _of_layer(algorithm) for name, algorithm in algorithms.items()}
        else:
            said |= _of_layer(common) | {"exclude_modules": sorted(checkpoint.left_out)}
        return {CONFIG_FILE: {"producer": dict(_PRODUCER), "quantization": said}}

    def records(self, files: Sequence[str]) -> Checkpoint:
        """Not there: vLLM, SGLang and TensorRT-LLM load these checkpoints."""
        raise FP8CheckpointError(f"checkpoints in the format {NAME!r} are not read by optimum_fp8")


register_format(NAME, ModelOpt())


def algorithm_of(record: Record) -> str:
    """ModelOpt's name for the way in which a layer is scaled.

    Raises:
        FP8CheckpointError: it has none.
    """
    assert record.scheme is not None
    granularity, inputs = granularity_of(record), input_of(record)
    if is_microscaled(record.scheme):
        found = MXFP8 if inputs == "group_32" else None
    elif isinstance(granularity, PerTensor):
        found = FP8 if inputs == "static" else None
    elif isinstance(granularity, PerChannel):
        found = PER_CHANNEL if inputs == "token" else None
    else:  # weights alone are in FP8, and vLLM rounds inputs as we do
        found = PER_BLOCK if isinstance(granularity, PerBlock) and inputs in ("none", "group_128") else None
    if found is None:
        raise not_expressed(record, NAME, f"weights scaled {granularity} with inputs scaled by {inputs}", _ELSE)
    if found == PER_BLOCK and (rows := record.tensors["weight"].shape[0]) % BLOCK:
        raise not_expressed(record, NAME, f"{rows} outputs, which blocks of {BLOCK} do not divide", _ELSE)
    return found


def _algorithms(checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """The algorithm of each layer, and that of the model."""
    algorithms = {record.name: algorithm_of(record) for record in layers(checkpoint.records)}
    different = set(algorithms.values())
    return algorithms, different.pop() if len(different) == 1 else MIXED


def _of_layer(algorithm: str) -> dict[str, Any]:
    return {"quant_algo": algorithm} | ({"group_size": MX_GROUP} if algorithm == MXFP8 else {})


def _group(algorithm: str) -> dict[str, Any]:
    """A group of `config.json`, in which ModelOpt repeats what the algorithm says already."""
    of_both = _FLOAT | ({"group_size": MX_GROUP} if algorithm == MXFP8 else {})
    of_weights = of_both | ({"strategy": "channel"} if algorithm == PER_CHANNEL else {})
    return (
        {"quant_algo": algorithm} if algorithm == PER_BLOCK else {"input_activations": of_both, "weights": of_weights}
    )


def _by_algorithm(algorithms: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Each algorithm with the layers that have it, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for name in sorted(algorithms):
        groups.setdefault(algorithms[name], []).append(name)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _weight_scale(record: Record) -> torch.Tensor:
    scale, algorithm = record.tensors["weight_scale"], algorithm_of(record)
    shapes: Mapping[str, tuple[int, ...]] = {FP8: (), PER_CHANNEL: (-1,), PER_BLOCK: (scale.shape[0], 1, -1, 1)}
    return as_e8m0(scale) if algorithm == MXFP8 else scale.reshape(shapes[algorithm])


def _has_cache(checkpoint: Checkpoint) -> bool:
    return any("weight" not in record.tensors for record in checkpoint.records)


def _check_name(record: Record, left_out: Sequence[str]) -> None:
    """Refuse a layer that vLLM would take for one in high precision, by its name: it looks for parts of names."""
    parts = record.name.split(".")
    if place := next((part for part in parts if any(each in part for each in _NEVER_IN_FP8)), None):
        advice = f"list {place!r} in modules_to_not_convert, or {_ELSE}"
        raise not_expressed(record, NAME, f"a layer of {place} in FP8, which readers build in high precision", advice)
    if covering := next((each for each in left_out if each in record.name), None):
        what = f"a name with {covering} in it, which stays in high precision: readers look for parts of names"
        raise not_expressed(record, NAME, what, _ELSE)


def _check_attention(record: Record) -> None:
    names = set(record.tensors)
    if others := sorted(names - {"k_scale", "v_scale"}):
        raise not_expressed(record, NAME, " and ".join(others), f"leave them to the engine: without={others}")
    if names != {"k_scale", "v_scale"}:
        raise not_expressed(
            record,
            NAME,
            f"a cache in FP8 with {', '.join(sorted(names)) or 'no calibrated scales'}",
            "calibrate attention: FP8Config(…, overrides={'attn$': {'activation_scheme': 'static'}})",
        )
    if any(scale.numel() != 1 for scale in record.tensors.values()):
        raise not_expressed(record, NAME, "scales of a cache by head", f"{_ELSE}, or quantize by tensor")
