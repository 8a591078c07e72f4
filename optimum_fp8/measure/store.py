"""The Measurements store: ranges by module name, independent of device and rank, in one safetensors file.

Tensors are named `<module>/<kind>/<statistic>`: a kind is one of the module's tensors ("input", "output", "weight",
"q", "k_cache" and whatever else is observed), and the statistics are those that the observer declares. Everything else
(format version, observer, what tells the model, what data made it) is JSON in the file's header. The file is written
beside its place and moved there, so it is whole or not there. It replaces one of the same model; any other file that
stands there is kept under a name of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FP8ConfigError, FP8MeasurementError
from .fingerprint import difference
from .foreign import not_found, not_readable
from .observer import Observer, Statistic, observer_class

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DEFAULT_OBSERVER = "maxabs"  # also of files that name none
_KIND = re.compile(r"\w+", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(repr=False)
class Measurements:
    """Everything calibration learned about a model.

    Attributes:
        fingerprint: of the model that was measured (`fingerprint.model_fingerprint`).
        tensors: one observer by (module name, kind).
        samples: how many samples went through.
        data: fingerprint of the data, where it is known.
        observer: name of the observers' class.
        architecture: classes of the model's modules that a fingerprint does not tell (`fingerprint.architecture`).
    """

    fingerprint: str
    tensors: dict[tuple[str, str], Observer] = field(default_factory=dict)
    samples: int = 0
    data: str = ""
    observer: str = DEFAULT_OBSERVER
    architecture: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        modules = len({module for module, _ in self.tensors})
        return (
            f"Measurements({len(self.tensors)} tensors of {modules} modules, {self.samples} samples, "
            f"observer {self.observer!r}, model {self.fingerprint[:12]!r})"
        )

    def unlike(self, model: Measurements) -> str | None:
        """How the model that was measured differs from that of other measurements; None if it is the same."""
        if self.fingerprint != model.fingerprint:
            return f"fingerprint {self.fingerprint}, not {model.fingerprint}"
        return difference(self.architecture, model.architecture)

    def observe(self, module: str, kind: str, x: torch.Tensor, *, per_head: bool = False) -> None:
        """Update the statistics of one tensor.

        Args:
            module: name of the module.
            kind: which of its tensors, a name of letters, digits and underscores.
            x: non-empty, any floating-point dtype; `[tokens, heads, size]` where `per_head` is set.
        """
        observer = self._observer(module, kind)
        (observer.update_per_head if per_head else observer.update)(x.detach())
        self.tensors[module, kind] = observer

    def add(self, module: str, kind: str, observer: Observer) -> None:
        """Merge what another observer has seen of one tensor."""
        known = self._observer(module, kind)
        known.merge(observer)
        self.tensors[module, kind] = known

    def range(self, module: str, kind: str = "input") -> torch.Tensor | None:
        """The range that a scale is taken from, a float32 scalar; None if the tensor was never seen.

        Raises:
            FP8MeasurementError: NaN or Inf went through the module.
        """
        observer = self.tensors.get((module, kind))
        if observer is None:
            return None
        found = observer.range()
        if not bool(torch.isfinite(found)):
            raise FP8MeasurementError(
                f"{module}: the measured {kind} holds NaN or Inf: expected finite activations; check the calibration "
                "data and the model's dtype"
            )
        return found

    def range_per_head(self, module: str, kind: str) -> torch.Tensor | None:
        """The range of each head, float32 `(heads,)`; None if it is not known.

        Raises:
            FP8MeasurementError: NaN or Inf went through the module.
        """
        return None if self.range(module, kind) is None else self.tensors[module, kind].range_per_head()

    def at(self, module: str) -> Ranges:
        """The ranges of one module's tensors, as far as they are known now."""
        return Ranges(self, module, frozenset(kind for name, kind in self.tensors if name == module))

    def by_module(self, modules: Iterable[str]) -> dict[str, Ranges]:
        """`at` for many modules, in one pass."""
        kinds: dict[str, set[str]] = {name: set() for name in modules}
        for name, kind in self.tensors:
            if name in kinds:
                kinds[name].add(kind)
        return {name: Ranges(self, name, frozenset(seen)) for name, seen in kinds.items()}

    def _observer(self, module: str, kind: str) -> Observer:
        """The observer of one tensor, a new one if it was never seen."""
        if (module, kind) in self.tensors:
            return self.tensors[module, kind]
        if not _KIND.fullmatch(kind):
            raise FP8MeasurementError(f"{module}: {kind!r} names no tensor: expected letters, digits and underscores")
        return observer_class(self.observer)()

    def merged(self, other: Measurements) -> Measurements:
        """The measurements of two runs, or two ranks, over the same model.

        Raises:
            FP8MeasurementError: they are of different models, or made by different observers.
        """
        if self.fingerprint != other.fingerprint:
            raise FP8MeasurementError(
                f"measurements of different models cannot be merged: fingerprints {self.fingerprint} and "
                f"{other.fingerprint}"
            )
        if unlike := self.unlike(other):
            raise FP8MeasurementError(f"measurements of different models cannot be merged: {unlike}")
        if self.observer != other.observer:
            raise FP8MeasurementError(
                f"measurements by different observers cannot be merged: {self.observer!r} and {other.observer!r}; "
                "measure both with one"
            )
        data = "+".join(sorted({*self.data.split("+"), *other.data.split("+")} - {""}))
        known = {**other.architecture, **self.architecture}
        merged = Measurements(self.fingerprint, {}, self.samples + other.samples, data, self.observer, known)
        for measurements in (self, other):
            for (module, kind), observer in measurements.tensors.items():
                merged.add(module, kind, observer)
        return merged

    def save(self, prefix: str | os.PathLike[str]) -> str:
        """Write `<prefix>_measurements.safetensors` (folders are made) and return its path.

        A file of the same model is replaced. Any other that stands there is kept, under a name that a warning tells.
        """
        path = measurements_path(prefix)
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        tensors = {
            f"{module}/{kind}/{name}": _as_stored(value)
            for (module, kind), observer in self.tensors.items()
            for name, value in observer.statistics().items()
        }
        header = {
            "format_version": FORMAT_VERSION,
            "observer": self.observer,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "data": self.data,
        }
        if self.architecture:
            header["architecture"] = self.architecture
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".measurements-")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata={"measurements": json.dumps(header)})
            os.chmod(temporary, _ordinary_mode())
            self._keep_other(prefix)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path

    def _keep_other(self, prefix: str | os.PathLike[str]) -> None:
        """Move a file that stands at our place and is not of our model out of the way."""
        path = measurements_path(prefix)
        if not os.path.isfile(path):
            return
        try:
            other = Measurements.load(prefix)
        except FP8MeasurementError as error:
            what, kept = f"no measurements that can be read ({error})", kept_prefix(prefix, _digest(path))
        else:
            if other.unlike(self) is None:
                return
            what, kept = "of another model", kept_prefix(prefix, other.fingerprint)
            if Measurements.exist(kept) and not other._stands_at(kept):
                kept = kept_prefix(prefix, _digest(path))
        os.replace(path, measurements_path(kept))
        logger.warning(
            "%s was there and is %s: it is now %s (dump_stats_path=%r), and the measurements of this model take its "
            "place",
            path,
            what,
            measurements_path(kept),
            kept,
        )

    def _stands_at(self, prefix: str) -> bool:
        """Whether measurements of the same model are at `prefix`."""
        try:
            return Measurements.load(prefix).unlike(self) is None
        except FP8MeasurementError:
            return False

    @staticmethod
    def exist(prefix: str | os.PathLike[str]) -> bool:
        """Whether `save(prefix)` has left a file."""
        return os.path.exists(measurements_path(prefix))

    @classmethod
    def load(cls, prefix: str | os.PathLike[str]) -> Measurements:
        """Read what `save(prefix)` wrote.

        Raises:
            FP8MeasurementError: no such file, a damaged one, one of a newer format, or by an observer that is not
                known here.
        """
        path = measurements_path(prefix)
        if not os.path.exists(path):
            raise FP8MeasurementError(not_found(path, os.fspath(prefix)))
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["measurements"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from_file(path, header, tensors)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise FP8MeasurementError(not_readable(path, error)) from None

    @classmethod
    def _from_file(cls, path: str, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Measurements:
        if header["format_version"] > FORMAT_VERSION:
            raise FP8MeasurementError(f"{path} was written by a newer optimum_fp8: upgrade optimum_fp8")
        try:
            made_by = observer_class(header.get("observer", DEFAULT_OBSERVER))
        except FP8ConfigError as error:
            message = f"{path}: {error}; import the module that registers it before loading"
            raise FP8MeasurementError(message) from None
        said = {str(name): str(kind) for name, kind in header.get("architecture", {}).items()}
        measurements = cls(
            str(header["fingerprint"]), {}, int(header["samples"]), str(header["data"]), made_by.name, said
        )
        grouped: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            module, kind, statistic = name.rsplit("/", 2)
            value = _as_observed(value, made_by.STATISTICS.get(statistic))
            grouped.setdefault((module, kind), {})[statistic] = value
        for (module, kind), statistics in grouped.items():
            try:
                measurements.add(module, kind, made_by(**statistics))
            except FP8MeasurementError as error:
                raise ValueError(f"{module}/{kind}: {error}") from None
        return measurements


@dataclass(frozen=True)
class Ranges:
    """The ranges of one module's tensors, as a view on measurements.

    Attributes:
        measurements: where they are.
        module: the module's name.
        kinds: which of its tensors were seen.
    """

    measurements: Measurements
    module: str
    kinds: frozenset[str]

    def of(self, kind: str) -> torch.Tensor:
        """The range of a tensor, a float32 scalar.

        Raises:
            FP8MeasurementError: it was never seen, or NaN or Inf went through.
        """
        found = self.measurements.range(self.module, kind)
        if found is None:
            seen = ", ".join(sorted(self.kinds)) or "nothing"
            raise FP8MeasurementError(f"{self.module}: no range of {kind!r} was measured (found {seen}): measure again")
        return found

    def per_head(self, kind: str) -> torch.Tensor | None:
        """The range of each head, float32 `(heads,)`; None if it is not known."""
        return self.measurements.range_per_head(self.module, kind)


def measurements_path(prefix: str | os.PathLike[str]) -> str:
    """The file of a `dump_stats_path`: its folder, and its last part as the prefix of the file name."""
    return f"{os.fspath(prefix)}_measurements.safetensors"


def why_unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Why nothing can be written into a folder, which need not be there yet; None if it can. Nothing is left there."""
    existing = os.path.abspath(folder)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return f"{existing!r} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"nothing can be written to {existing!r} ({error.strerror or error})"


def check_dump_path(prefix: str | os.PathLike[str]) -> None:
    """Refuse a `dump_stats_path` that measurements cannot be written to, before there are any.

    Raises:
        FP8ConfigError: the message says why.
    """
    path = measurements_path(prefix)
    reason = f"{path!r} is a folder" if os.path.isdir(path) else why_unwritable(os.path.dirname(path) or ".")
    if reason is not None:
        raise FP8ConfigError(
            f"dump_stats_path={os.fspath(prefix)!r} cannot take the measurements: {reason}; expected a folder that can "
            "be written to, and the beginning of a file name in it"
        )


def kept_prefix(prefix: str | os.PathLike[str], fingerprint: str) -> str:
    """The prefix under which the file of the model with `fingerprint` is kept when another takes its place."""
    known = fingerprint if _FINGERPRINT.fullmatch(fingerprint) else hashlib.sha256(fingerprint.encode()).hexdigest()
    return f"{os.fspath(prefix)}-{known[:12]}"


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _as_stored(value: torch.Tensor) -> torch.Tensor:
    """A statistic as the file keeps it: scalars are `(1,)`."""
    return (value if value.ndim else value.reshape(1)).cpu().clone(memory_format=torch.contiguous_format)


def _as_observed(value: torch.Tensor, declared: Statistic | None) -> torch.Tensor:
    """A statistic as its observer keeps it."""
    return value[0] if value.shape == (1,) and declared is not None and declared.fits(value[0]) else value


def _ordinary_mode() -> int:
    """The mode a new file would have: temporary ones are private, measurements are for colleagues and other ranks."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
