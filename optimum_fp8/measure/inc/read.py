"""`read_inc`: all that Intel Neural Compressor left at a `dump_stats_path`, of all ranks, as one value."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...errors import FP8MeasurementError
from ..observers.maxabs import MaxAbs
from .file import RANGES, SCALES, SHAPES, File, FileName, Node, read_file

Tensors = dict[tuple[str, str], MaxAbs]


@dataclass(frozen=True)
class IncMeasurements:
    """What INC measured of a model, and the scales it made of it, by INC's names of modules.

    Attributes:
        prefix: INC's `dump_stats_path`.
        ranges: what went into and came out of each module, and its weight: maxima of all ranks.
        scales: by scale method, in capitals as in the names of the files.
        shapes: as observed in mode SHAPE.
        modules: the modules that INC selected, measured or not.
        samples: how many batches each rank has seen; 0 if INC did not count.
        ranks: how many ranks measured; 0 for a model that was not distributed.
        mode: "DynamicRange", or the mode of what there is where nothing was measured.
    """

    prefix: str
    ranges: dict[str, Node] = field(default_factory=dict)
    scales: dict[str, dict[str, Node]] = field(default_factory=dict)
    shapes: dict[str, Node] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    samples: int = 0
    ranks: int = 0

    @property
    def mode(self) -> str:
        return RANGES if self.ranges else SCALES if self.scales else SHAPES

    def tensors(self) -> Tensors:
        """The ranges as observers by module name and kind, as `Measurements` has them: nothing is lost.

        Kinds are "input", "input2", …, "output", "output2", … and the names of parameters.
        """
        found: Tensors = {}
        for name, node in self.ranges.items():
            for kind, values in (("input", node.inputs), ("output", node.outputs)):
                for place, value in enumerate(values or (), start=1):
                    found[name, kind_of(kind, place)] = _observed(value, f"{name}, {kind} {place}")
            for kind, value in (node.params or {}).items():
                found[name, kind] = _observed(value, f"{name}, {kind}")
        return found


def kind_of(kind: str, place: int) -> str:
    """The name of a module's first, second, … input or output: "input", "input2", …"""
    return kind if place == 1 else f"{kind}{place}"


def read_inc(path: str | os.PathLike[str], *, only_ranges: bool = False) -> IncMeasurements:
    """Read what INC left.

    Args:
        path: INC's `dump_stats_path`, its folder, or one of the files. Those of the other ranks are read with it.
        only_ranges: leave files of scales alone, whatever is in them.

    Raises:
        FP8MeasurementError: there is nothing of INC's, a rank or a file is missing or damaged, or there are several
            sets; the message names what.
    """
    path = os.fspath(path)
    names = _chosen(path, [name for name in _names_at(path) if not (only_ranges and name.method)])
    first = names[0]
    made: dict[tuple[str, str], tuple[list[File], str]] = {}
    for name in names:
        files, what = made.setdefault((name.observer, name.method), ([], str(name)))
        files.append(read_file(name))
    found = IncMeasurements(first.prefix, ranks=first.world)
    for (observer, method), (files, what) in made.items():
        nodes, mode = _merged(what, files), files[0].mode
        if mode == SCALES:
            found.scales[method] = nodes
        elif mode == SHAPES or observer == "shape":
            found.shapes.update(nodes)
        elif mode == RANGES:
            found.ranges.update(nodes)
            # All ranks of a model see the same batches, or as many of their own.
            found = replace(found, samples=max(each.samples for each in files))
        else:
            raise FP8MeasurementError(f"{what} is of INC's mode {mode!r}, expected {RANGES}, {SCALES} or {SHAPES}")
        found.modules.extend(dict.fromkeys(each for file in files for each in file.modules or ()))
    if only_ranges and not found.ranges:
        raise FP8MeasurementError(
            f"{first} holds no ranges (mode {found.mode!r}): expected INC's measurements, of mode {RANGES!r}; "
            "INC writes them when it ends measuring"
        )
    return replace(found, modules=list(dict.fromkeys(found.modules)))


def has_inc_ranges(path: str | os.PathLike[str]) -> bool:
    """Whether there are files of INC's measurements at a `dump_stats_path`, as its prefix, folder or file."""
    return any(not name.method and name.observer.startswith("maxabs") for name in _names_at(os.fspath(path)))


def files_of_inc(path: str) -> list[str]:
    """Measurement files of INC's that a `dump_stats_path` means: as its prefix, folder or file."""
    start = glob.escape(path)
    patterns = [f"{start}_hooks_*"]  # <prefix>_hooks_maxabs_0_8.npz
    if os.path.isdir(path):
        patterns.append(os.path.join(start, "*_hooks_*"))
    elif "_hooks_" in os.path.basename(path):
        patterns.append(f"{start}*")
    found = {each for pattern in patterns for each in glob.glob(pattern)}
    return sorted(each for each in found if each.endswith((".json", ".npz")))


def _names_at(path: str) -> Iterator[FileName]:
    """The names of the files that `path` means, each once, without lists of modules."""
    seen = {FileName.parse(each) for each in files_of_inc(path) if not each.endswith("_mod_list.json")}
    yield from sorted(name for name in seen if name is not None)


def _chosen(path: str, names: list[FileName]) -> list[FileName]:
    """The names of one set: of one prefix and one number of ranks, the ranks complete.

    Raises:
        FP8MeasurementError: there is none, or more than one; or a rank is missing.
    """
    said = FileName.parse(path)
    if said is not None and os.path.basename(path) != os.path.basename(said.prefix) and not os.path.isdir(path):
        names = [name for name in _names_at(said.prefix) if name.prefix == said.prefix and name.world == said.world]
    if not names:
        raise FP8MeasurementError(f"there are no measurements of INC at {path}: expected {path}_hooks_maxabs.npz")
    sets = sorted({(name.prefix, name.world) for name in names})
    if len(sets) > 1:
        listed = ", ".join(f"{prefix}_hooks_…{f'_{world}' if world else ''}" for prefix, world in sets[:4])
        example = str(next(name for name in names if (name.prefix, name.world) == sets[-1]))
        raise FP8MeasurementError(
            f"{path} means more than one set of INC's measurements ({listed}): name a file of the one that is meant, "
            f"such as {example}"
        )
    for observer, method in dict.fromkeys((name.observer, name.method) for name in names):
        there = {name.rank for name in names if (name.observer, name.method) == (observer, method)}
        if missing := sorted(set(range(names[0].world)) - there):
            lacking = FileName(names[0].prefix, observer, method, names[0].world, missing[0])
            raise FP8MeasurementError(
                f"of {names[0].world} ranks, the files of {', '.join(map(str, missing))} are missing: there is no "
                f"{lacking}.npz; copy the files of all ranks"
            )
    return names


def _merged(what: str, files: Iterable[File]) -> dict[str, Node]:
    """The nodes of all ranks: where several have one, the larger value of each."""
    merged: dict[str, Node] = {}
    for file in files:
        for name, node in file.nodes.items():
            try:
                merged[name] = _larger(merged[name], node) if name in merged else node
            except ValueError as error:
                raise FP8MeasurementError(f"the ranks of {what} disagree about {name}: {error}") from None
    return merged


def _larger(one: Node, other: Node) -> Node:
    if (one.params or {}).keys() != (other.params or {}).keys():
        raise ValueError(f"params {sorted(one.params or {})} and {sorted(other.params or {})}")
    params = {key: _larger_param(value, (other.params or {})[key]) for key, value in (one.params or {}).items()}
    return Node(
        _larger_each(one.inputs, other.inputs),
        _larger_each(one.outputs, other.outputs),
        None if one.params is None else params,
    )


def _larger_each(
    one: tuple[torch.Tensor, ...] | None, other: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...] | None:
    if one is None or other is None:
        return one if other is None else other
    longest = one if len(one) > len(other) else other  # ranks of a mixture of experts have their own
    return (*map(_larger_of, one, other), *longest[min(len(one), len(other)) :])


def _larger_of(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    # Ranks hold parts of a tensor: values of channels have no common place, their largest has.
    return torch.maximum(one, other) if one.shape == other.shape else torch.maximum(one.amax(), other.amax())


def _larger_param(one: Any, other: Any) -> Any:
    if isinstance(one, dict) or isinstance(other, dict):
        return {part: _larger_of(one[part], other[part]) for part in one}
    return _larger_of(one, other)


def _observed(value: torch.Tensor, what: str) -> MaxAbs:
    """A range as our observer has it, of channels the largest; INC does not count values."""
    if value.numel() == 0:
        raise FP8MeasurementError(f"{what}: INC's file has no value where a range is expected: copy it again")
    return MaxAbs(maxabs=value.amax(), count=torch.zeros((), dtype=torch.int64))
