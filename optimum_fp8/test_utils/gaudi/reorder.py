"""Moves along the batch of key-value caches, in place: `kv_reorder_` and `in_place_interleave_`."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Arguments
from .device import Device
from .refuse import require

BEAMS = 4


def _bytes(x: Tensor) -> Tensor:
    """FP8 as bytes: torch lacks some kernels for FP8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def check_reorder(a: Arguments, device: Device) -> Tensor:
    require(a.self.dim() >= 4, "kv_reorder: self is [batch, beams, ..., length, head size]")
    require(a.self.shape[1] == BEAMS, f"kv_reorder: two bits name one of {BEAMS} beams, but got {a.self.shape[1]}")
    batch = a.self.shape[0]
    fits = all(tuple(each.shape) == (batch,) for each in (a.start, a.end, a.beam_idx))
    require(fits, f"kv_reorder: start, end and beam_idx have one element for each of {batch} samples")
    require(a.beam_idx.dtype == torch.uint8, f"kv_reorder: beam_idx is of uint8, but got {a.beam_idx.dtype}")
    return a.self


def check_reordered(a: Arguments, device: Device) -> Tensor:
    return check_reorder(a, device).new_empty(a.self.shape)


def reorder_(a: Arguments, device: Device) -> Tensor:
    """Of every sample, in the positions from start to end: beam i becomes the beam that its two bits name.

    `beam_idx` packs the four beams of a sample into a byte, the first into the highest bits.
    """
    cache = _bytes(a.self)
    for sample, start, end, packed in zip(cache, a.start.tolist(), a.end.tolist(), a.beam_idx.tolist(), strict=True):
        beams = torch.tensor([packed >> shift & 3 for shift in (6, 4, 2, 0)])
        positions = sample.narrow(-2, start, end - start)
        positions.copy_(positions.index_select(0, beams))
    return a.self


def reordered(a: Arguments, device: Device) -> Tensor:
    a.self = a.self.clone()
    return reorder_(a, device)


def check_interleave(a: Arguments, device: Device) -> Tensor:
    require(a.self.dim() == 4, "Input has to be a 4D tensor.")
    require(a.self.shape[0] % BEAMS == 0, "Batch size has to be a multiple of 4.")
    return a.self


def check_interleaved(a: Arguments, device: Device) -> Tensor:
    return check_interleave(a, device).new_empty(a.self.shape)


def interleaved(a: Arguments, device: Device) -> Tensor:
    """Each of the first samples four times in a row: what prompts become when a beam search starts."""
    index = torch.arange(a.self.shape[0] // BEAMS).repeat_interleave(BEAMS)
    return _bytes(a.self).index_select(0, index).view(a.self.dtype)


def interleave_(a: Arguments, device: Device) -> Tensor:
    return a.self.copy_(interleaved(a, device))
