"""The bytes of a measurements file: named tensors and a JSON header; the same content is always the same bytes.

The header has a checksum of all the rest, so that what was edited or damaged shows. Files of older versions have none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from .observer import Statistic

_HEADER, _CHECKSUM = "measurements", "checksum"


def encode(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> bytes:
    """A safetensors file of contiguous CPU tensors, with the header in its metadata."""
    ordered = {name: tensors[name] for name in sorted(tensors)}
    signed = {**header, _CHECKSUM: _checksum(ordered, header)}
    encoded: bytes = save(ordered, metadata={_HEADER: json.dumps(signed, sort_keys=True)})
    return encoded


def decode(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header of what `encode` made.

    Raises:
        ValueError: the content is not what the checksum was made of.
        SafetensorError, KeyError, TypeError, AttributeError: `data` is something else.
    """
    tensors: dict[str, torch.Tensor] = load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if _HEADER not in metadata:
        raise ValueError("a safetensors file of something else: its metadata has no 'measurements'")
    header: dict[str, Any] = dict(json.loads(metadata[_HEADER]))
    found = header.pop(_CHECKSUM, None)
    if found is not None and found != _checksum(tensors, header):
        raise ValueError("its content has been changed since it was written: the checksum does not fit")
    return tensors, header


def write_atomically(path: str, data: bytes, before: Callable[[], None] = lambda: None) -> None:
    """Write a file beside its place and move it there: it is whole or not there, also after the power has failed.

    Args:
        path: its place, in a folder that is there.
        data: what it holds.
        before: called before it is moved.
    """
    folder = os.path.dirname(path) or "."
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".measurements-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _ordinary_mode())
        before()
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _ordinary_mode() -> int:
    """The mode a new file would have: temporary ones are private, measurements are for colleagues and other ranks."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def as_stored(value: torch.Tensor) -> torch.Tensor:
    """A statistic as the file keeps it: scalars are `(1,)`."""
    return (value if value.ndim else value.reshape(1)).cpu().clone(memory_format=torch.contiguous_format)


def as_observed(value: torch.Tensor, declared: Statistic | None) -> torch.Tensor:
    """A statistic as its observer keeps it."""
    return value[0] if value.shape == (1,) and declared is not None and declared.fits(value[0]) else value
