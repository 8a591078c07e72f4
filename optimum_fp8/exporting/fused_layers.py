"""Layers that engines fuse into one product: what must be the same for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint, Record
from ..checkpoint.engine_schemes import granularity_of
from ..errors import FP8CheckpointError
from ..files.shared_scales import siblings_of
from ..scales import PerTensor

_TIED = ("weight_scale", "input_scale")


def tie_fused(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with one scale per tensor, the largest, for the layers that engines fuse: weights and inputs.

    Scales by channels, blocks and groups need not be the same. Codes are to be rounded again where the scale changes.

    Raises:
        FP8CheckpointError: some of the layers that are fused are in FP8 and others are not, or are scaled otherwise.
    """
    records = {record.name: record for record in checkpoint.records}
    for group in _groups(checkpoint):
        members = [records[name] for name in group if name in records]
        if len(members) < len(group):
            absent = ", ".join(name for name in group if name not in records)
            raise FP8CheckpointError(
                f"{', '.join(each.name for each in members)} are in FP8 and {absent} is not, but engines fuse them "
                "into one layer: quantize all of them, or list all in modules_to_not_convert"
            )
        if len({str(each.scheme) for each in members}) > 1:
            raise FP8CheckpointError(
                f"{', '.join(group)} are fused by engines, but scaled differently "
                f"({'; '.join(str(each.scheme) for each in members)}): give them the same overrides"
            )
        for name, tied in zip(group, _tied(members), strict=True):
            records[name] = tied
    return replace(checkpoint, records=list(records.values()))


def _groups(checkpoint: Checkpoint) -> list[list[str]]:
    """The names of layers that are fused, at least one of them in FP8."""
    known = {record.name for record in checkpoint.records} | set(checkpoint.left_out)
    found = {tuple(each for each in siblings_of(record.name) if each in known) for record in checkpoint.records}
    return [list(group) for group in sorted(found) if len(group) > 1]


def _tied(members: Sequence[Record]) -> list[Record]:
    scales = {}
    by_tensor = all(isinstance(granularity_of(member), PerTensor) for member in members)
    for part in _TIED if by_tensor else _TIED[1:]:
        found = [member.tensors[part] for member in members if part in member.tensors]
        if len(found) == len(members) and all(scale.numel() == 1 for scale in found):
            scales[part] = torch.stack([scale.reshape(1) for scale in found]).amax(dim=0)
    return [replace(member, tensors={**member.tensors, **scales}) for member in members]
