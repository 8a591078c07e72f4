"""The files of a checkpoint, as far as they can be read: names, dtypes and shapes, without their data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint.digests import RECORD
from ..checkpoint.folder import absent_index
from ..checkpoint.intact import read_record
from ..checkpoint.safetensors_writer import DTYPES
from ..errors import FP8CheckpointError
from .finding import Finding, error, warning

COPY = "copy the checkpoint again from where it was saved"
_NONE = f"give the folder that holds the weights, or, where they were lost, {COPY}"
_CONFIG, _PLAIN, _MODELOPT = "config.json", "quantization.json", "hf_quant_config.json"
_INDEX, _WEIGHTS = ".safetensors.index.json", ".safetensors"
_ADAPTER = "adapter_model"


@dataclass(frozen=True)
class Header:
    """What the header of a file says of a tensor."""

    path: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize if self.dtype is not None else 0
        for size in self.shape:
            count *= size
        return count


@dataclass
class Opened:
    """A folder with a checkpoint.

    Attributes:
        folder: where it is.
        config: what `config.json` says.
        quantization: how it says that the model is quantized; empty where it does not.
        files: paths of the files with weights that can be read.
        tensors: what is in them, by name.
        records: what each file says of the save, of those that optimum_fp8 wrote.
        findings: what is wrong with the files themselves.
    """

    folder: str
    config: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    tensors: dict[str, Header] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The quantization method that it says it has; "" where it says none."""
        return str(self.quantization.get("quant_method", ""))


def open_folder(folder: str | os.PathLike[str]) -> Opened:
    """Read what can be read of a folder.

    Raises:
        FP8CheckpointError: it is no folder.
    """
    opened = Opened(os.path.abspath(folder))
    if not os.path.isdir(opened.folder):
        raise FP8CheckpointError(f"{opened.folder} is not a folder: expected one with an FP8 checkpoint")
    _read_configs(opened)
    indexes = sorted(name for name in os.listdir(folder) if name.endswith(_INDEX))
    there = sorted(
        name for name in os.listdir(folder) if name.endswith(_WEIGHTS) and not name.startswith((_ADAPTER, "."))
    )
    index = _read_index(opened, indexes[0]) if indexes else None
    if (absent := absent_index(opened.folder)) is not None:
        opened.findings.append(error(absent, "no such file, though weights are in several", "an index of them", COPY))
    weight_map = {} if index is None else index["weight_map"]
    names = sorted(set(weight_map.values())) if weight_map else there
    for name in names:
        if name in there:
            _read_headers(opened, os.path.join(opened.folder, name))
        else:
            opened.findings.append(error(name, "no such file, though the index names it", "all files", COPY))
    if not names:
        found = "no checkpoint: there are no files of weights (*.safetensors)"
        opened.findings.append(error(opened.folder, found, "a folder with an FP8 checkpoint", _NONE))
    for name in sorted(set(there) - set(names)):
        opened.findings.append(warning(name, "a file that the index does not name", "no others", "remove it"))
    if index is not None:
        _check_index(opened, indexes[0], index)
    return opened


@contextmanager
def reading(opened: Opened) -> Iterator[Any]:
    """A function that reads tensors by name; files are mapped, and opened once."""
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def read(name: str) -> torch.Tensor:
            path = opened.tensors[name].path
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, framework="pt"))
            tensor: torch.Tensor = files[path].get_tensor(name)
            return tensor

        yield read


def _read_configs(opened: Opened) -> None:
    for name in (_CONFIG, _PLAIN, _MODELOPT):
        path = os.path.join(opened.folder, name)
        said = _json(opened, path) if os.path.isfile(path) else {}
        if name == _CONFIG:
            opened.config = said
            found = said.get("quantization_config") or said.get("compression_config")
            if found is not None and not isinstance(found, dict):
                opened.findings.append(error(f"{_CONFIG}: quantization_config", repr(found), "an object", COPY))
            opened.quantization = dict(found) if isinstance(found, dict) else {}
        elif name == _PLAIN and said:
            opened.quantization = said
        elif said and not opened.quantization:
            opened.quantization = {"quant_method": "modelopt", **said.get("quantization", {})}
    if not opened.config and not opened.quantization:
        opened.findings.append(error(_CONFIG, "nothing that can be read", "the configuration of the model", COPY))
    elif not opened.method:
        expected = '"quant_method" in quantization_config'
        opened.findings.append(error(f"{_CONFIG}: quantization_config.quant_method", "nothing", expected, COPY))


def _json(opened: Opened, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as failure:
        opened.findings.append(error(os.path.basename(path), f"no JSON of an object ({failure})", "one", COPY))
        return {}


def _read_index(opened: Opened, name: str) -> dict[str, Any] | None:
    said = _json(opened, os.path.join(opened.folder, name))
    weight_map = said.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        opened.findings.append(error(f"{name}: weight_map", repr(weight_map)[:80], "the file of each tensor", COPY))
        return None
    return said


def _read_headers(opened: Opened, path: str) -> None:
    name = os.path.basename(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                if key in opened.tensors:
                    where = f"the same in {os.path.basename(opened.tensors[key].path)} and {name}"
                    opened.findings.append(error(key, where, "each tensor once", COPY))
                view = file.get_slice(key)
                opened.tensors[key] = Header(path, DTYPES.get(view.get_dtype()), tuple(view.get_shape()))
    except (OSError, SafetensorError) as failure:
        opened.findings.append(error(name, f"a damaged file ({failure})", "safetensors", COPY))
        return
    opened.files.append(path)
    if RECORD in metadata:
        try:
            opened.records[path] = read_record(path, metadata)
        except FP8CheckpointError as failure:
            opened.findings.append(error(f"{name}: metadata {RECORD!r}", str(failure), "what was written", COPY))


def _check_index(opened: Opened, name: str, index: dict[str, Any]) -> None:
    """The index and the headers of the files must name the same tensors in the same files."""
    for key, file in index["weight_map"].items():
        found = opened.tensors.get(key)
        if found is None:
            opened.findings.append(error(key, f"nothing, though the index names it in {file}", "a tensor", COPY))
        elif (there := os.path.basename(found.path)) != file:
            opened.findings.append(error(f"{name}: {key}", repr(file), repr(there), "put the file that holds it"))
    for key in sorted(opened.tensors.keys() - index["weight_map"].keys()):
        there = os.path.basename(opened.tensors[key].path)
        opened.findings.append(error(f"{name}: {key}", f"no entry, though {there} holds it", repr(there), "add it"))
    size = (index.get("metadata") or {}).get("total_size")
    total = sum(header.nbytes for header in opened.tensors.values())
    if size is not None and size != total and not any(each.severity == "error" for each in opened.findings):
        action = "correct it: engines plan their memory by it"
        opened.findings.append(error(f"{name}: metadata.total_size", str(size), str(total), action))
