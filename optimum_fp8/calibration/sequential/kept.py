"""Where tensors wait between two uses, in memory or on disk: what goes into a block, and the calibration data."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file


class Kept(Protocol):
    """Lists of tensors by a key; what is got may be written to."""

    def put(self, key: Hashable, tensors: list[torch.Tensor]) -> None: ...

    def get(self, key: Hashable) -> list[torch.Tensor]: ...

    def drop(self, key: Hashable) -> None: ...


class InMemory:
    """On the devices where they are."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, list[torch.Tensor]] = {}

    def put(self, key: Hashable, tensors: list[torch.Tensor]) -> None:
        self._tensors[key] = [tensor.detach().clone() for tensor in tensors]

    def get(self, key: Hashable) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self._tensors[key]]

    def drop(self, key: Hashable) -> None:
        self._tensors.pop(key, None)


class OnDisk:
    """In a file each.

    Args:
        folder: for the files; it has to be there, and whoever made it removes it.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._files: dict[Hashable, tuple[str, list[torch.device]]] = {}
        self._count = 0

    def put(self, key: Hashable, tensors: list[torch.Tensor]) -> None:
        self.drop(key)
        self._count += 1
        path = os.path.join(self._folder, f"{self._count}.safetensors")
        # Copies, because some may be parts of others.
        copies = (tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for tensor in tensors)
        save_file({str(place): tensor for place, tensor in enumerate(copies)}, path)
        self._files[key] = (path, [tensor.device for tensor in tensors])

    def get(self, key: Hashable) -> list[torch.Tensor]:
        path, devices = self._files[key]
        tensors = load_file(path)  # mapped, and copied where it is written to
        return [tensors[str(place)].to(device) for place, device in enumerate(devices)]

    def drop(self, key: Hashable) -> None:
        if key in self._files:
            os.unlink(self._files.pop(key)[0])
