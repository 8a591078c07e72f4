"""OntoDisk: loading a model that is larger than memory, for calibration block by block."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..calibration import FileMemory, parts_of, work_folder
from ..checkpoint.names import names_in_model
from ..checkpoint.native import refuse_damaged
from ..config import FP8Config
from ..errors import FP8CalibrationError
from ..measure import check_dump_path
from ..modules import fp8_modules
from ..selection import Decision

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class OntoDisk:
    """What becomes of tensors while they are loaded: those that are in the files as they are needed are mapped by
    transformers; all others are made one at a time, and put into files.

    Args:
        config: says where.

    Attributes:
        memory: the files.
        dtype: that the model was asked for in.
    """

    dtype: torch.dtype

    def __init__(self, config: FP8Config):
        check_dump_path(config.dump_stats_path)
        folder = work_folder(config)
        self.memory = FileMemory(folder)
        self._new_folders = _missing(folder)
        self._in_files: dict[str, torch.dtype | None] = {}

    def look_at(self, model: nn.Module, files: Sequence[str] | None) -> None:
        """Find out which tensors are in safetensors files, and in which dtype."""
        dtypes: dict[str, torch.dtype | None] = {}
        for path in files or ():
            if str(path).endswith(".safetensors"):
                with refuse_damaged(path), safe_open(path, framework="pt") as file:
                    dtypes |= {key: _DTYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        self._in_files = {name: dtypes[key] for key, name in names_in_model(model, dtypes).items()}

    def look_first(self, model: nn.Module, decisions: Sequence[Decision], batches: Iterator[Any] | None) -> None:
        """Refuse what cannot be calibrated block by block, before the weights are read.

        Raises:
            FP8CalibrationError: the data call the model by themselves, or the model has no blocks.
        """
        if batches is None:
            raise FP8CalibrationError(
                "calibration='sequential' takes batches through one block after the other, and this dataset calls the "
                "model by itself: pass batches, or use calibration='whole'"
            )
        parts_of(model, [each.name for each in decisions if each.selected])

    def takes(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter in high precision is none that can be mapped from the model's own files."""
        owner, _, parameter = name.rpartition(".")
        expected = model.get_submodule(owner)._parameters.get(parameter)
        # transformers gives what it hands over the model's dtype, and a parameter of another one keeps that.
        return expected is not None and expected.dtype == self.dtype != self._in_files.get(name)

    def finish(self, model: nn.Module, loaded: Mapping[str, nn.Module]) -> None:
        """Put codes that were made since the model was `loaded` into files as well, and leave no empty folders."""
        for name, module in fp8_modules(model).items():
            if name not in loaded:
                module.set_weight(self.memory.keep(module.codes), module.weight_scale)
        for folder in self._new_folders:
            with suppress(OSError):  # something is in it, or it was not made
                os.rmdir(folder)


def _missing(folder: str) -> list[str]:
    """The folders that are not there yet of a path, the innermost first."""
    folder, missing = os.path.abspath(folder), []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def without_disk(device_map: Mapping[str, Any]) -> dict[str, Any]:
    """A device map with the CPU in the place of the disk: there, too, the tensors are in files."""
    return {name: "cpu" if device == "disk" else device for name, device in device_map.items()}
