"""What the safetensors files of a folder hold: names, dtypes and shapes of their tensors, without the data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from ...errors import FP8CheckpointError
from ..folder import read_json, refuse_without_index
from ..native import refuse_damaged

INDEX = "model.safetensors.index.json"
FP8_DTYPES = {"F8_E4M3": "E4M3", "F8_E5M2": "E5M2"}


@dataclass(frozen=True)
class Header:
    """One tensor in a file.

    Attributes:
        dtype: as safetensors call it: "F8_E4M3", "BF16".
        shape: as it is stored.
        path: of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    path: str

    @property
    def is_fp8(self) -> bool:
        return self.dtype in FP8_DTYPES

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Files:
    """The files of weights in a folder.

    Attributes:
        folder: where they are.
        headers: of all tensors, by their names there.
        metadata: what the files say beside their tensors.
    """

    folder: str
    headers: Mapping[str, Header]
    metadata: Mapping[str, str]

    def read(self, key: str) -> torch.Tensor:
        """The data of one tensor."""
        path = self.headers[key].path
        with refuse_damaged(path), safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def json_in_metadata(self, key: str) -> Any:
        """What the metadata says under a name, read as JSON; None where it says nothing, or no JSON."""
        try:
            return json.loads(self.metadata.get(key, "null"))
        except ValueError:
            return None


def read_files(folder: str) -> Files:
    """The headers of the files that transformers would load from a folder.

    Raises:
        FP8CheckpointError: there are none, one of them is missing, or one is damaged.
    """
    headers: dict[str, Header] = {}
    metadata: dict[str, str] = {}
    for path in _paths(folder):
        with refuse_damaged(path), safe_open(path, framework="pt") as file:
            metadata |= file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                headers[key] = Header(part.get_dtype(), tuple(part.get_shape()), path)
    return Files(folder, headers, metadata)


def _paths(folder: str) -> Sequence[str]:
    index, whole = os.path.join(folder, INDEX), os.path.join(folder, "model.safetensors")
    if os.path.isfile(whole):
        return [whole]
    if not os.path.isfile(index):
        refuse_without_index(folder)
        raise FP8CheckpointError(
            f"{folder} has neither model.safetensors nor {INDEX}: expected the folder of a checkpoint in safetensors"
        )
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise FP8CheckpointError(f"{index} has no 'weight_map': it is damaged, copy it again")
    paths = [os.path.join(folder, name) for name in sorted(set(named.values()))]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise FP8CheckpointError(f"{missing[0]} does not exist, but {INDEX} names it: copy the checkpoint again")
    return paths
