"""Writing a safetensors file tensor by tensor: `save_file` wants all tensors of a file in memory at once.

The format: the length of the header in 8 bytes, little-endian; the header, JSON with dtype, shape and place of each
tensor; the data. Dtypes and shapes are known before the data, so the header is written first and tensors go to their
places in any order.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

import torch

from ..errors import FP8CheckpointError
from .digests import DIGESTS, RECORD, UNKNOWN, digest

# What safetensors calls the dtypes.
DTYPES: dict[str, torch.dtype] = {
    **{
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "C64": torch.complex64,
    },
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


class TensorSpec(NamedTuple):
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A safetensors file that stands under its name once the block ends and all tensors are written; else nothing does.

    Args:
        path: of the file; one that is there is replaced.
        tensors: dtype and shape of each tensor, by name.
        metadata: texts, by name. To the record, if there is one, the digests of the tensors are added.
    """

    def __init__(self, path: str | os.PathLike[str], tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]):
        self.path, self.tensors = os.fspath(path), dict(tensors)
        self._temporary = f"{self.path}.{os.getpid()}.tmp"
        self._missing = set(self.tensors)
        # Wide dtypes first, as safetensors has them: every tensor is aligned to its own size.
        order = sorted(self.tensors, key=lambda name: (-self.tensors[name].dtype.itemsize, name))
        self._metadata, self._digests = dict(metadata), dict.fromkeys(order, UNKNOWN)
        self._header: dict[str, object] = {}
        offsets, end = dict[str, int](), 0
        for name in order:
            dtype, shape = self.tensors[name]
            if dtype not in _NAMES:
                raise FP8CheckpointError(f"{name} is {dtype}, which safetensors files cannot hold")
            offsets[name], end = end, end + self.tensors[name].nbytes
            self._header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
        length = len(self._head())
        self._places = {name: length + offset for name, offset in offsets.items()}
        self._size = length + end

    def _head(self) -> bytes:
        """What stands before the data; always of the same length, because digests are."""
        said = dict(self._metadata)
        if RECORD in said:
            said[RECORD] = json.dumps({**json.loads(said[RECORD]), DIGESTS: self._digests})
        header = {"__metadata__": said, **self._header} if said else self._header
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    def __enter__(self) -> SafetensorsWriter:
        self._file = open(self._temporary, "wb")
        try:
            self._file.write(self._head())
            self._file.truncate(self._size)
        except OSError:
            self._file.close()
            os.remove(self._temporary)
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the data of a tensor, which may be anywhere on the CPU and in any layout.

        Raises:
            FP8CheckpointError: there is no such tensor, or it is not of the dtype and shape that the header says.
        """
        expected, found = self.tensors.get(name), TensorSpec(tensor.dtype, tuple(tensor.shape))
        if found != expected:
            raise FP8CheckpointError(f"{name} is {tuple(found)}, but the header of {self.path} says {expected}")
        self._file.seek(self._places[name])
        tensor = tensor.detach().contiguous()
        if tensor.numel():
            self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if RECORD in self._metadata:
            self._digests[name] = digest(tensor)
        self._missing.discard(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and RECORD in self._metadata:
                self._file.seek(0)
                self._file.write(self._head())
            self._file.close()  # writes what is left, for which there may be no space
            if kind is None and self._missing:
                raise FP8CheckpointError(f"{self.path}: nothing was written for {', '.join(sorted(self._missing)[:4])}")
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._file.close()
            if os.path.exists(self._temporary):
                os.remove(self._temporary)
