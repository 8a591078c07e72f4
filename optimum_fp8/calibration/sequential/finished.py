"""FinishedParts: which parts of a model are calibrated, on disk with their ranges, so that one can go on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...config import FP8Config
from ...errors import FP8MeasurementError
from ...measure import Measurements
from ...measure.file_format import write_atomically

logger = logging.getLogger(__name__)

_MANIFEST = "finished.json"
_RANGES = "finished"
_FORMAT_VERSION = 1
_PLACES = ("calibration_inputs", "calibration_log", "dump_stats_path")


def work_folder(config: FP8Config) -> str:
    """Where a calibration keeps what it has done, and whatever else is too large for memory."""
    return f"{config.dump_stats_path}_blocks"


class FinishedParts:
    """The parts of one model that are calibrated with one configuration and one set of data, in a folder of their own.

    Args:
        config: of the calibration.
        measurements: of the model, which tell it from others; ranges of finished parts are put into them.
        dtype: of the model.
        data: digest of the data.

    Attributes:
        names: of the parts, in the order in which they were finished.
    """

    def __init__(self, config: FP8Config, measurements: Measurements, dtype: str, data: str):
        # What does not change the result: where things are kept; and the data, which its digest tells.
        other = {*_PLACES, *config.LIVE}
        keys = {key: value for key, value in config.to_dict().items() if key not in other}
        self._told = {
            "format_version": _FORMAT_VERSION,
            "model": measurements.fingerprint,
            "config": {**keys, "target": config.resolved_target},
            "dtype": dtype,
            "data": data,
        }
        digest = hashlib.sha256(json.dumps(self._told, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = os.path.join(work_folder(config), digest)
        self._measurements = measurements
        self.names = self._found()

    def add(self, name: str) -> None:
        """Write down that a part is finished, with all ranges that are known by now."""
        os.makedirs(self.folder, exist_ok=True)
        self._measurements.save(os.path.join(self.folder, _RANGES))
        self.names.append(name)
        manifest = json.dumps({**self._told, "finished": self.names}, indent=2)
        write_atomically(os.path.join(self.folder, _MANIFEST), manifest.encode())

    def remove(self) -> None:
        """Remove the folder: the model is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others are in it
            os.rmdir(os.path.dirname(self.folder))

    def _found(self) -> list[str]:
        """What an earlier run has finished; its ranges become ours."""
        path = os.path.join(self.folder, _MANIFEST)
        if not os.path.exists(path):
            self._tell_of_others()
            return []
        try:
            with open(path, encoding="utf-8") as file:
                said: Mapping[str, Any] = json.load(file)
            names = [str(name) for name in said["finished"]]
            stored = Measurements.load(os.path.join(self.folder, _RANGES))
            fits = {**said, "finished": None} == {**self._told, "finished": None}
        except (OSError, ValueError, KeyError, TypeError, FP8MeasurementError) as error:
            logger.warning("what an earlier run has finished, in %s, cannot be read (%s): starting anew", path, error)
            return []
        if not fits or stored.unlike(self._measurements) is not None:
            logger.warning("what is finished in %s is of another model or configuration: starting anew", path)
            return []
        for (module, kind), observer in stored.tensors.items():
            if any(f"{module}.".startswith(f"{name}.") for name in names):  # not of one that was broken off
                self._measurements.tensors[module, kind] = observer
        for module, tokens in stored.experts.items():
            if any(f"{module}.".startswith(f"{name}.") for name in names):
                self._measurements.add_experts(module, tokens)
        logger.warning("going on after %s: %d blocks are calibrated already (%s)", names[-1], len(names), self.folder)
        return names

    def _tell_of_others(self) -> None:
        base = os.path.dirname(self.folder)
        others = [name for name in _listed(base) if os.path.exists(os.path.join(base, name, _MANIFEST))]
        if others:
            logger.warning(
                "%s holds what was finished of another model, or with another configuration or other data (%s): it is "
                "not used, and stays there; remove it if it is no longer needed",
                base,
                ", ".join(sorted(others)),
            )


def _listed(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []
