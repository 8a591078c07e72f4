"""The folder of safetensors that is to be quantized: which files, which tensors, and what tells it from others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ..checkpoint.folder import read_json
from ..checkpoint.inc import refuse_incs
from ..checkpoint.native import refuse_damaged
from ..checkpoint.safetensors_writer import DTYPES
from ..commands.companions import companions_of
from ..errors import FP8CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_ON_THE_HUB = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, known without its data; `dtype` is None where torch has none of the kind."""

    path: str
    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.key} in {os.path.basename(self.path)}"


@dataclass(frozen=True)
class Source:
    """A folder of safetensors.

    Attributes:
        folder: where it is.
        files: paths of the files with weights.
        tensors: what is in them, by name.
        config: what `config.json` says; empty where there is none.
    """

    folder: str
    files: list[str]
    tensors: dict[str, Stored]
    config: dict[str, Any]

    def identity(self) -> list[list[Any]]:
        """What changes if any of the files does: name, size, time of the last change and a digest of its header."""
        said = []
        for path in self.files:
            stat = os.stat(path)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest = hashlib.sha256(file.read(length)).hexdigest()
            said.append([os.path.basename(path), stat.st_size, stat.st_mtime_ns, digest])
        return said


def open_source(name: str) -> Source:
    """The folder `name`, or a repository of that name on the hub, from the cache or fetched.

    Raises:
        FP8CheckpointError: there are no safetensors, some are missing or damaged, or INC saved the folder.
    """
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise FP8CheckpointError(f"{name!r} is not a folder: expected one with safetensors, or a name on the hub")
    if os.path.isdir(name):
        folder = name
    else:
        folder = companions_of(name)
        if not any(each.endswith(".safetensors") for each in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=_ON_THE_HUB)
    refuse_incs(folder)
    config = _json(os.path.join(folder, "config.json"))
    if method := config.get("quantization_config") or config.get("compression_config"):
        raise FP8CheckpointError(
            f"config.json of {folder} says that it is quantized already ({str(method)[:80]}): quantize the original "
            "model"
        )
    files, tensors = tensors_in(folder)
    return Source(folder, files, tensors, config)


def tensors_in(folder: str) -> tuple[list[str], dict[str, Stored]]:
    """The paths of a folder's files with weights, and what is in them, by name.

    Raises:
        FP8CheckpointError: there are no safetensors, or some are missing, damaged or of two checkpoints.
    """
    files, tensors = _files(folder), dict[str, Stored]()
    for path in files:
        for stored in headers_of(path):
            if stored.key in tensors:
                raise FP8CheckpointError(f"{stored.key} is in two files of {folder}: keep those of one checkpoint only")
            tensors[stored.key] = stored
    return files, tensors


@contextmanager
def reading() -> Iterator[Any]:
    """A function that reads tensors; each file is opened once, and mapped rather than read into memory."""
    with ExitStack() as stack:
        opened: dict[str, Any] = {}

        def read(stored: Stored) -> torch.Tensor:
            if stored.path not in opened:
                opened[stored.path] = stack.enter_context(safe_open(stored.path, framework="pt"))
            return opened[stored.path].get_tensor(stored.key)

        yield read


def _files(folder: str) -> list[str]:
    """As transformers looks for them; where it finds none, all safetensors of the folder."""
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        names = [WEIGHTS]
    elif os.path.isfile(os.path.join(folder, INDEX)):
        names = sorted(set(_json(os.path.join(folder, INDEX)).get("weight_map", {}).values()))
    else:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not names:
        others = sorted(name for name in os.listdir(folder) if name.endswith(_OTHERS))
        found = f"only {', '.join(others[:3])}, which is not read here (unpickling a file runs what is in it)"
        raise FP8CheckpointError(
            f"{folder} holds no safetensors but {found if others else 'no weights at all'}: have transformers write "
            "them, by from_pretrained and save_pretrained, or quantize while loading with from_pretrained"
        )
    paths = [os.path.join(folder, name) for name in names]
    if absent := [path for path in paths if not os.path.isfile(path)]:
        raise FP8CheckpointError(f"{', '.join(absent)} does not exist: the folder is not whole, copy it again")
    return paths


def headers_of(path: str) -> Iterator[Stored]:
    """The tensors of a file, known by its header."""
    with refuse_damaged(path), safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            view = file.get_slice(key)
            yield Stored(path, key, DTYPES.get(view.get_dtype()), tuple(view.get_shape()))


def _json(path: str) -> dict[str, Any]:
    return read_json(path) if os.path.isfile(path) else {}
