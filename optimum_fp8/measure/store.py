"""The Measurements store: ranges by module name, independent of device and rank, in one safetensors file.

Tensors are named `<module>/<kind>/<statistic>`; `KINDS` are those of a layer, those of attention, and what attention
modules write to caches. Everything else (format version, fingerprint, what data made it) is JSON in the file's header.
The file is written beside its place and moved there, so it is whole or not there.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FP8Error, FP8MeasurementError
from .statistics import OPTIONAL, REDUCTIONS, TensorStatistics

FORMAT_VERSION = 1
# "q", "k" and "p", "v" are the operands of attention's two products; modules with more products number the others.
_PRODUCTS = re.compile(r"[qkpv]\d*$")
KINDS = ("input", "output", "weight", "q", "k", "v", "p", "k_cache", "v_cache")


@dataclass
class Measurements:
    """Everything calibration learned about a model.

    Attributes:
        fingerprint: of the model that was measured (`fingerprint.model_fingerprint`).
        tensors: statistics by (module name, kind).
        samples: how many samples went through.
        data: fingerprint of the data, where it is known.
    """

    fingerprint: str
    tensors: dict[tuple[str, str], TensorStatistics] = field(default_factory=dict)
    samples: int = 0
    data: str = ""

    def observe(self, module: str, kind: str, statistics: TensorStatistics) -> None:
        """Add what was seen of one tensor."""
        known = self.tensors.get((module, kind))
        self.tensors[module, kind] = statistics if known is None else known.merged(statistics)

    def maxabs(self, module: str, kind: str = "input") -> torch.Tensor | None:
        """max|x| as a float32 scalar, None if the tensor was never seen.

        Raises:
            FP8MeasurementError: NaN or Inf went through the module.
        """
        statistics = self.tensors.get((module, kind))
        if statistics is None:
            return None
        if not bool(torch.isfinite(statistics.maxabs)):
            raise FP8MeasurementError(
                f"{module}: the measured {kind} holds NaN or Inf: expected finite activations; check the calibration "
                "data and the model's dtype"
            )
        return statistics.maxabs

    def maxabs_per_head(self, module: str, kind: str) -> torch.Tensor | None:
        """max|x| of each head, float32 `(heads,)`; None if it is not known.

        Raises:
            FP8MeasurementError: NaN or Inf went through the module.
        """
        if self.maxabs(module, kind) is None:
            return None
        return self.tensors[module, kind].maxabs_per_head

    def merged(self, other: Measurements) -> Measurements:
        """The measurements of two runs, or two ranks, over the same model.

        Raises:
            FP8MeasurementError: they are of different models.
        """
        if self.fingerprint != other.fingerprint:
            raise FP8MeasurementError(
                f"measurements of different models cannot be merged: fingerprints {self.fingerprint} and "
                f"{other.fingerprint}"
            )
        merged = Measurements(self.fingerprint, dict(self.tensors), self.samples + other.samples)
        merged.data = "+".join(sorted({*self.data.split("+"), *other.data.split("+")} - {""}))
        for (module, kind), statistics in other.tensors.items():
            merged.observe(module, kind, statistics)
        return merged

    def save(self, prefix: str | os.PathLike[str]) -> str:
        """Write `<prefix>_measurements.safetensors` (folders are made) and return its path."""
        path = measurements_path(prefix)
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        tensors = {
            f"{module}/{kind}/{name}": value.reshape(-1).clone()
            for (module, kind), statistics in self.tensors.items()
            for name, value in statistics.cpu().known().items()
        }
        header = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "data": self.data,
        }
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".measurements-")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata={"measurements": json.dumps(header)})
            os.chmod(temporary, _ordinary_mode())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path

    @staticmethod
    def exist(prefix: str | os.PathLike[str]) -> bool:
        """Whether `save(prefix)` has left a file."""
        return os.path.exists(measurements_path(prefix))

    @classmethod
    def load(cls, prefix: str | os.PathLike[str]) -> Measurements:
        """Read what `save(prefix)` wrote.

        Raises:
            FP8MeasurementError: no such file, a damaged one, or one of a newer format.
        """
        path = measurements_path(prefix)
        if not os.path.exists(path):
            raise FP8MeasurementError(_not_found(path, os.fspath(prefix)))
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["measurements"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from_file(path, header, tensors)
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, FP8Error):
                raise
            message = f"{path} is not a measurements file or is damaged ({error}): measure again"
            raise FP8MeasurementError(message) from None

    @classmethod
    def _from_file(cls, path: str, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Measurements:
        if header["format_version"] > FORMAT_VERSION:
            raise FP8MeasurementError(f"{path} was written by a newer optimum_fp8: upgrade optimum_fp8")
        grouped: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            module, kind, statistic = name.rsplit("/", 2)
            known = (kind in KINDS or _PRODUCTS.match(kind)) and statistic in REDUCTIONS
            if not known or value.shape != (1,) and statistic not in OPTIONAL:
                raise ValueError(f"tensor {name!r} is not a statistic")
            grouped.setdefault((module, kind), {})[statistic] = value if statistic in OPTIONAL else value[0]
        statistics = {key: TensorStatistics(**values) for key, values in grouped.items()}
        return cls(str(header["fingerprint"]), statistics, int(header["samples"]), str(header["data"]))


def measurements_path(prefix: str | os.PathLike[str]) -> str:
    """The file of a `dump_stats_path`: its folder, and its last part as the prefix of the file name."""
    return f"{os.fspath(prefix)}_measurements.safetensors"


def _ordinary_mode() -> int:
    """The mode a new file would have: temporary ones are private, measurements are for colleagues and other ranks."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _not_found(path: str, prefix: str) -> str:
    from_inc = sorted(glob.glob(f"{glob.escape(prefix)}_hooks_maxabs*"))
    if from_inc:
        return (
            f"{path} does not exist, only INC's own {from_inc[0]}, which optimum_fp8 cannot read yet: measure again "
            "with optimum_fp8"
        )
    return (
        f"no measurements at {path}: give a `dataset`, or prepare the model, run calibration data through it and call "
        "finalize_calibration(model), or point dump_stats_path at where that was done"
    )
