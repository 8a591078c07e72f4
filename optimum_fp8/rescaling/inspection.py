"""inspect: what an FP8 checkpoint is, from the headers of its files, its scales and what it says of itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention import CHILD
from ..checkpoint.folder import CONFIG_FILE, read_json
from ..checkpoint.provenance import provenance_of
from ..config import QUANT_METHOD, FP8Config
from ..errors import FP8CheckpointError
from ..files.source import Stored, reading, tensors_in
from ..formats import is_fp8
from ..selection import scheme_for

_SUFFIXES = ("_scale", "_scale_inv")  # of the name of a weight; the latter is a multiplier all the same
_INPUTS = ("input_scale", "activation_scale", "act_scale")
_E8M0_BIAS = 127


@dataclass
class _Group:
    """Weights in FP8 of one dtype that are scaled in one way."""

    names: list[str] = field(default_factory=list)
    parameters: int = 0
    scales: list[torch.Tensor] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)


def inspect(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint is, as JSON; of one that optimum_fp8 did not write, what its structure tells.

    Args:
        folder: of safetensors, whoever wrote it.

    Returns:
        "folder": its path; "format": its `quant_method`, None for one in high precision; "architectures";
        "size": bytes in "fp8", of "scales" and in "high_precision";
        "weights": for each way of scaling how many there are, their parameters, and the spread of their scales and
        of static scales of inputs, as [smallest, median, largest];
        "attention": scales of attention and caches by name, with how many there are and their spread;
        "tensors": how many there are of each dtype;
        and of a checkpoint of ours "schemes" and all that `provenance_of` tells.

    Raises:
        FP8CheckpointError: there is no such folder, or it holds no safetensors, or damaged ones.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FP8CheckpointError(f"{folder} is not a folder: expected one with a checkpoint")
    config, said = _said(folder)
    _, stored = tensors_in(folder)
    method = said.get("quant_method") if said else None
    found: dict[str, Any] = {
        "folder": os.path.abspath(folder),
        "format": method,
        "architectures": config.get("architectures") or [],
        **_structure(stored, ours=method == QUANT_METHOD),
    }
    if method != QUANT_METHOD:
        return {**found, "quantization_config": said}
    variants = FP8Config.from_dict(said).variants
    schemes = {place or "all modules": str(scheme_for(part)) for place, part in variants.items()}
    return {**found, "schemes": schemes, **provenance_of(folder)}


def _said(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `config.json` says, and the configuration of the quantization; empty where there is none."""
    paths = [os.path.join(folder, name) for name in ("config.json", CONFIG_FILE)]
    config, ours = (read_json(path) if os.path.isfile(path) else {} for path in paths)
    said = ours or config.get("quantization_config") or config.get("compression_config") or {}
    return config, said if isinstance(said, dict) else {}


def _structure(stored: Mapping[str, Stored], *, ours: bool) -> dict[str, Any]:
    groups: dict[tuple[str, str, str], _Group] = {}
    others: dict[str, list[torch.Tensor]] = {}
    size, dtypes, used = {"fp8": 0, "scales": 0, "high_precision": 0}, dict[str, int](), set[str]()
    with reading() as read:
        for key, each in stored.items():
            dtypes[_dtype(each)] = dtypes.get(_dtype(each), 0) + 1
            if each.dtype is None or not is_fp8(each.dtype):
                continue
            scale = next((stored[name] for suffix in _SUFFIXES if (name := f"{key}{suffix}") in stored), None)
            place = key.rpartition(".")[0]
            inputs = next((stored[name] for leaf in _INPUTS if (name := f"{place}.{leaf}") in stored), None)
            shape = each.shape[1:] if ours and key.endswith(".weight") else each.shape
            how = "without a scale" if scale is None else granularity(shape, scale.shape)
            group = groups.setdefault((_dtype(each), how, "static" if inputs is not None else "none"), _Group())
            group.names.append(key)
            group.parameters += _count(each)
            for kept, one in ((group.scales, scale), (group.inputs, inputs)):
                if one is not None:
                    kept.append(_values(read(one)))
                    used.add(one.key)
        for key in (key for key in stored if key not in used and _is_scale(key)):
            others.setdefault(key.rpartition(".")[2], []).append(_values(read(stored[key])))
            used.add(key)
    for key, each in stored.items():
        in_fp8 = each.dtype is not None and is_fp8(each.dtype)
        place = "scales" if key in used else "fp8" if in_fp8 else "high_precision"
        size[place] += _count(each) * (each.dtype.itemsize if each.dtype is not None else 1)
    weights = list(_rows(groups))
    attention = {name: {"count": len(found), "spread": spread(found)} for name, found in sorted(others.items())}
    return {"size": size, "weights": weights, "attention": attention, "tensors": dtypes}


def _rows(groups: Mapping[tuple[str, str, str], _Group]) -> Iterator[dict[str, Any]]:
    for (dtype, how, inputs), group in groups.items():
        yield {
            "dtype": dtype,
            "scaled": how,
            "count": len(group.names),
            "parameters": group.parameters,
            "first": group.names[0],
            "scales": spread(group.scales),
            **({"input_scales": spread(group.inputs)} if inputs == "static" else {}),
        }


def granularity(shape: tuple[int, ...], scale: tuple[int, ...]) -> str:
    """How weights of a shape are scaled, in words, given the shape of their scale."""
    if math.prod(scale) == 1:
        return "per tensor"
    if len(scale) == 1 or all(length == 1 for length in scale[1:]):
        return "per channel" if scale[0] == shape[0] else f"in {scale[0]} parts"
    if len(scale) != len(shape):
        return f"by a scale of shape {tuple(scale)}"
    *_, rows, columns = (-(-length // parts) for length, parts in zip(shape, scale, strict=True))
    lead = "of each matrix " if len(shape) > 2 else ""
    if columns >= shape[-1] and len(shape) > 2:
        return f"{lead}{'per channel' if rows == 1 else 'by halves'}"
    return f"{lead}per group of {columns}" if rows == 1 else f"{lead}per block {rows}×{columns}"


def spread(scales: Iterable[torch.Tensor]) -> list[float]:
    """[smallest, median, largest] of scales; empty where there are none."""
    found = [each for each in scales if each.numel()]
    if not found:
        return []
    values = torch.cat(found)
    return [float(values.min()), float(values.median()), float(values.max())]


def _values(scale: torch.Tensor) -> torch.Tensor:
    """The values of a scale, flat; those in e8m0 bytes are powers of two."""
    flat = scale.reshape(-1)
    return torch.exp2(flat.float() - _E8M0_BIAS) if flat.dtype == torch.uint8 else flat.float()


def _is_scale(key: str) -> bool:
    return f".{CHILD}." in key or key.endswith(_SUFFIXES)


def _count(each: Stored) -> int:
    return math.prod(each.shape)


def _dtype(each: Stored) -> str:
    return "unknown" if each.dtype is None else str(each.dtype).removeprefix("torch.")
