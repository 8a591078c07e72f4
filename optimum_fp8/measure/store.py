"""The Measurements store: ranges by module name, independent of device and rank, in one safetensors file.

Tensors are named `<module>/<kind>/<statistic>`: a kind is one of the module's tensors ("input", "output", "weight",
"q", "k_cache" and whatever else is observed), and the statistics are those that the observer declares. Everything else
(format version, observer, what tells the model, what data made it) is JSON in the file's header. The file is written
beside its place and moved there, so it is whole or not there. It replaces one of the same model; any other file that
stands there is kept under a name of its own.

Merging is exact: measurements of parts of the data, merged in any order, are to the byte those of all of it.
The kind "experts" holds no ranges: tokens are counted there, for each expert of a module.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import FP8ConfigError, FP8MeasurementError
from .experts import EXPERTS, ExpertTokens
from .file_format import as_observed, as_stored, decode, encode, write_atomically
from .fingerprint import added_data, difference
from .foreign import not_found, not_readable
from .inc import has_inc_ranges, read_inc
from .observer import Context, Observer, Purpose, observer_class
from .paths import file_digest, kept_prefix, measurements_path

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DEFAULT_OBSERVER = "maxabs"  # also of files that name none
_KIND = re.compile(r"\w+", re.ASCII)
_ONCE = ("weight", "unseen")  # kinds that are of the model: more data add nothing to them


@dataclass(repr=False)
class Measurements:
    """Everything calibration learned about a model.

    Attributes:
        fingerprint: of the model that was measured (`fingerprint.model_fingerprint`).
        tensors: one observer by (module name, kind).
        samples: how many samples went through.
        data: fingerprint of the data, where it is known: the sum of those of its batches, so that no order shows.
        observer: name of the observers' class.
        architecture: classes of the model's modules that a fingerprint does not tell (`fingerprint.architecture`).
        experts: tokens that went to each expert, by the module that holds their weights.
        context: what all observers are told; each learns its module and kind besides. It is not in the file.
    """

    fingerprint: str
    tensors: dict[tuple[str, str], Observer] = field(default_factory=dict)
    samples: int = 0
    data: str = ""
    observer: str = DEFAULT_OBSERVER
    architecture: dict[str, str] = field(default_factory=dict)
    experts: dict[str, ExpertTokens] = field(default_factory=dict)
    context: Context = Context()

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

    def observe(self, module: str, kind: str, x: torch.Tensor, *, per_head: bool = False) -> Observer:
        """Update the statistics of one tensor.

        Args:
            module: name of the module.
            kind: which of its tensors, a name of letters, digits and underscores.
            x: non-empty, any floating-point dtype; `[tokens, heads, size]` where `per_head` is set.

        Returns:
            an observer that has seen `x` alone, for others who are given the same tensor; where two observers cannot
            be merged, the one that has seen all.
        """
        known = self._observer(module, kind)
        seen = known if known.not_mergeable else self._new_observer(module, kind)
        (seen.update_per_head if per_head else seen.update)(x.detach())
        if seen is not known:
            known.merge(seen)
        self.tensors[module, kind] = known
        return seen

    def add(self, module: str, kind: str, observer: Observer) -> None:
        """Merge what another observer has seen of one tensor."""
        known = self._observer(module, kind)
        known.merge(observer)
        self.tensors[module, kind] = known

    def range(self, module: str, kind: str = "input", purpose: Purpose | None = None) -> torch.Tensor | None:
        """The range that a scale is taken from, a float32 scalar; None if the tensor was never seen.

        Args:
            module: name of the module.
            kind: which of its tensors.
            purpose: what the range is for, where observers choose by that; None: they do not.

        Raises:
            FP8MeasurementError: NaN or Inf went through the module.
        """
        observer = self.tensors.get((module, kind))
        if observer is None:
            return None
        found = observer.range() if purpose is None else observer.range_for(purpose)
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

    def add_experts(self, module: str, tokens: ExpertTokens) -> None:
        """Add tokens that went to the experts of one module."""
        self.experts.setdefault(module, ExpertTokens()).merge(tokens)

    def tokens_of_experts(self) -> dict[str, torch.Tensor]:
        """How many tokens went to each expert, int64 `(experts,)`, by the module that holds their weights."""
        return {module: seen.tokens() for module, seen in sorted(self.experts.items())}

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
        return self._new_observer(module, kind)

    def _new_observer(self, module: str, kind: str) -> Observer:
        return observer_class(self.observer).made_for(replace(self.context, module=module, kind=kind))

    def merged(self, other: Measurements) -> Measurements:
        """The measurements of two runs, or two ranks, over the same model.

        Raises:
            FP8MeasurementError: they are of different models, or made by different observers.
        """
        merged = self.without_data()
        merged.include(self)
        merged.include(other)
        return merged

    def without_data(self) -> Measurements:
        """Measurements of the same model, by the same observer, that hold nothing yet."""
        return replace(self, tensors={}, experts={}, samples=0, data="", architecture=dict(self.architecture))

    def include(self, other: Measurements, *, parts: bool = False) -> None:
        """Merge other measurements into these.

        Args:
            other: of the same model.
            parts: whether they are of other parts of its weights, which processes hold that split its layers.

        Raises:
            FP8MeasurementError: as `merged`; these are as they were, then.
        """
        once = () if parts else _ONCE
        self._refuse(other, once)
        for (module, kind), observer in other.tensors.items():
            if kind not in once or (module, kind) not in self.tensors:
                self.add(module, kind, observer)
        for module, tokens in other.experts.items():
            self.add_experts(module, tokens)
        self.samples += other.samples
        self.data = added_data(self.data, other.data)
        self.architecture = {**other.architecture, **self.architecture}

    def _refuse(self, other: Measurements, once: Iterable[str] = _ONCE) -> None:
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
        for module, kind in self.tensors.keys() & other.tensors.keys():
            if kind in once and not self.tensors[module, kind].agrees(other.tensors[module, kind]):
                raise FP8MeasurementError(
                    f"measurements of different weights cannot be merged: {module} has other statistics of its {kind} "
                    "in each; expected the same model in the same dtype: measure both alike"
                )

    def save(self, prefix: str | os.PathLike[str]) -> str:
        """Write `<prefix>_measurements.safetensors` (folders are made) and return its path.

        A file of the same model is replaced. Any other that stands there is kept, under a name that a warning tells.
        """
        path = measurements_path(prefix)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_atomically(path, self.encoded(), before=lambda: self._keep_other(prefix))
        return path

    def encoded(self, notes: Mapping[str, Any] | None = None) -> bytes:
        """The bytes of the file: the same for the same content.

        Args:
            notes: more for the header, as JSON.
        """
        tensors = {
            f"{module}/{kind}/{name}": as_stored(value)
            for (module, kind), observer in (*self.tensors.items(), *_under(EXPERTS, self.experts))
            for name, value in observer.statistics().items()
        }
        header: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "observer": self.observer,
            "fingerprint": self.fingerprint,
            "samples": self.samples,
            "data": self.data,
        }
        if self.architecture:
            header["architecture"] = self.architecture
        if notes is not None:
            header["notes"] = notes
        return encode(tensors, header)

    @classmethod
    def decoded(cls, data: bytes, path: str) -> tuple[Measurements, dict[str, Any]]:
        """The measurements in the bytes of the file at `path`, and the notes in its header.

        Raises:
            FP8MeasurementError: as `load`.
        """
        try:
            tensors, header = decode(data)
            return cls._from_file(path, header, tensors), dict(header.get("notes", {}))
        except (SafetensorError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise FP8MeasurementError(not_readable(path, data[:4096], error)) from None

    def _keep_other(self, prefix: str | os.PathLike[str]) -> None:
        """Move a file that stands at our place and is not of our model out of the way."""
        path = measurements_path(prefix)
        if not os.path.isfile(path):
            return
        try:
            other = Measurements.load(prefix)
        except FP8MeasurementError as error:
            what, kept = f"no measurements that can be read ({error})", kept_prefix(prefix, file_digest(path))
        else:
            if other.unlike(self) is None:
                return
            what, kept = "of another model", kept_prefix(prefix, other.fingerprint)
            if Measurements.exist(kept) and not other._stands_at(kept):
                kept = kept_prefix(prefix, file_digest(path))
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
        """Read what `save(prefix)` wrote, or what INC left there: the latter without a fingerprint, in INC's names.

        Raises:
            FP8MeasurementError: no such file, a damaged one, one of a newer format, or by an observer that is not
                known here.
        """
        path = measurements_path(prefix)
        if not os.path.exists(path):
            if has_inc_ranges(prefix):
                found = read_inc(prefix, only_ranges=True)
                return cls("", dict(found.tensors()), found.samples)
            raise FP8MeasurementError(not_found(path, os.fspath(prefix)))
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise FP8MeasurementError(not_readable(path, b"", error)) from None
        return cls.decoded(data, path)[0]

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
            if kind != EXPERTS:
                value = as_observed(value, made_by.STATISTICS.get(statistic))
            grouped.setdefault((module, kind), {})[statistic] = value
        for (module, kind), statistics in grouped.items():
            try:
                if kind == EXPERTS:
                    measurements.add_experts(module, ExpertTokens(**statistics))
                else:
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
        elsewhere: kinds whose ranges are those of another module's tensor: its name, and the kind there.
    """

    measurements: Measurements
    module: str
    kinds: frozenset[str]
    elsewhere: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def _place(self, kind: str) -> tuple[str, str]:
        return self.elsewhere.get(kind, (self.module, kind))

    def of(self, kind: str, purpose: Purpose | None = None) -> torch.Tensor:
        """The range of a tensor, a float32 scalar; `purpose` is what for, where observers choose by that.

        Raises:
            FP8MeasurementError: it was never seen, or NaN or Inf went through.
        """
        found = self.measurements.range(*self._place(kind), purpose)
        if found is None:
            seen = ", ".join(sorted(self.kinds)) or "nothing"
            raise FP8MeasurementError(f"{self.module}: no range of {kind!r} was measured (found {seen}): measure again")
        return found

    def largest(self, kind: str) -> torch.Tensor:
        """The largest magnitude of a tensor, a float32 scalar, also where its range is smaller."""
        self.of(kind)
        return self.measurements.tensors[self._place(kind)].largest()

    def per_head(self, kind: str) -> torch.Tensor | None:
        """The range of each head, float32 `(heads,)`; None if it is not known."""
        return self.measurements.range_per_head(*self._place(kind))


def _under(kind: str, observers: Mapping[str, Observer]) -> list[tuple[tuple[str, str], Observer]]:
    return [((module, kind), observer) for module, observer in observers.items()]
