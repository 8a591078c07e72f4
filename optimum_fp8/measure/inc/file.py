"""One file of INC's, exactly as it is: a `.json` and a `.npz` of the same content, a list of modules beside them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import FP8MeasurementError
from ..file_format import write_atomically
from .unpickled import read_npz

logger = logging.getLogger(__name__)

RANGES, SCALES, SHAPES = "DynamicRange", "Scale", "Shape"
# <prefix>_hooks_<observer>[_<METHOD>][_<rank>_<world>][_mod_list].<json or npz>
_NAME = re.compile(
    r"(?P<prefix>.*)_hooks_(?P<observer>[a-z]+(?:_[a-z]+)*?)(?P<method>_[A-Z][A-Z0-9_]*?)?"
    r"(?:_(?P<rank>\d+)_(?P<world>\d+))?(?P<list>_mod_list)?(?:\.(?P<ending>json|npz))?"
)
_LIST = "_mod_list.json"
_DEPTH = 4  # of lists around values; INC's have two


@dataclass(frozen=True, order=True)
class FileName:
    """What the name of a file of INC's says.

    Attributes:
        prefix: INC's `dump_stats_path`.
        observer: "maxabs", "maxabs_per_channel", "shape" or another.
        method: the scale method in capitals; empty for measurements.
        world: of how many ranks it is; 0 if the name has none.
        rank: of which.
    """

    prefix: str
    observer: str = "maxabs"
    method: str = ""
    world: int = 0
    rank: int = 0

    @classmethod
    def parse(cls, path: str) -> FileName | None:
        """What a path says, with or without its ending; None if INC names no file so."""
        folder, base = os.path.split(path)
        found = _NAME.fullmatch(base)
        if found is None:
            return None
        method, world, rank = (found["method"] or "")[1:], int(found["world"] or 0), int(found["rank"] or 0)
        return cls(os.path.join(folder, found["prefix"]), found["observer"], method, world, rank)

    def __str__(self) -> str:
        method, ranks = f"_{self.method}" if self.method else "", f"_{self.rank}_{self.world}" if self.world else ""
        return f"{self.prefix}_hooks_{self.observer}{method}{ranks}"


@dataclass(frozen=True)
class Node:
    """What a file says of one module.

    Attributes:
        inputs: one tensor for each input, float32; None where the file says nothing of inputs.
        outputs: likewise.
        params: by parameter; scales of channels are {0: those of the outputs, 1: those of the inputs}.
    """

    inputs: tuple[torch.Tensor, ...] | None = None
    outputs: tuple[torch.Tensor, ...] | None = None
    params: dict[str, Any] | None = None


@dataclass(frozen=True)
class File:
    """The content of one pair of files.

    Attributes:
        mode: `RANGES`, `SCALES` or `SHAPES`.
        nodes: by module name, without what torch.compile adds to it.
        rank: INC's LocalRank.
        samples: INC's NumSamples, 0 if the file has none.
        modules: the list beside it, None if there is none.
    """

    mode: str
    nodes: dict[str, Node]
    rank: int | None = None
    samples: int = 0
    modules: list[str] | None = field(default=None)


def read_file(name: FileName) -> File:
    """Read a pair of files; where they differ, the .npz counts, as for INC, and a warning says so.

    Raises:
        FP8MeasurementError: there is neither, or one is damaged or holds something else.
    """
    found: dict[str, File] = {}
    for ending, load in (("npz", read_npz), ("json", _load_json)):
        path = f"{name}.{ending}"
        if os.path.exists(path):
            found[path] = _parsed(path, load(path))
    if not found:
        raise FP8MeasurementError(f"neither {name}.npz nor {name}.json exists")
    (path, taken), *others = found.items()
    for other, said in others:
        if why := _difference(taken, said):
            logger.warning("%s and %s differ (%s): taking %s, which is what INC reads", path, other, why, path)
    modules = f"{name}{_LIST}"
    if os.path.exists(modules):
        listed = _load_json(modules)
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            raise FP8MeasurementError(f"{modules} is no list of module names: copy it again, or delete it")
        return File(taken.mode, taken.nodes, taken.rank, taken.samples, listed)
    return taken


def write_file(name: FileName, content: File) -> list[str]:
    """Write what INC would write, each file whole or not at all; the paths."""
    head: dict[str, Any] = {"NumSamples": content.samples} if content.samples else {}
    head |= {"GlobalRank": None, "LocalRank": content.rank, "Mode": content.mode}
    nodes = {module: _as_written(node, content.mode) for module, node in content.nodes.items()}
    tree = {**head, "Nodes": nodes}
    writers: dict[str, Callable[[Any], Any]] = {
        f"{name}.json": lambda file: file.write(json.dumps(_as_lists(tree), indent=4).encode()),
        f"{name}.npz": lambda file: np.savez(file, tree),  # type: ignore[arg-type]
    }
    if content.modules is not None:
        writers[f"{name}{_LIST}"] = lambda file: file.write(json.dumps(content.modules, indent=4).encode())
    for path, write in writers.items():
        _write(path, write)
    return list(writers)


def paths_of(name: FileName) -> list[str]:
    """The paths that `write_file` may write to."""
    return [f"{name}.json", f"{name}.npz", f"{name}{_LIST}"]


def _write(path: str, write: Callable[[Any], Any]) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    content = io.BytesIO()
    write(content)
    write_atomically(path, content.getvalue())


def _load_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise FP8MeasurementError(f"{path} cannot be read ({error}): copy it again, or measure again") from None


def _parsed(path: str, tree: Any) -> File:
    try:
        nodes = {
            str(name).replace("_orig_mod.", ""): Node(
                _tensors(node.get("inputs", node.get("input"))),
                _tensors(node.get("outputs", node.get("output"))),
                None if node.get("params") is None else {key: _param(value) for key, value in node["params"].items()},
            )
            for name, node in tree["Nodes"].items()
        }
        rank = tree.get("LocalRank")
        return File(str(tree["Mode"]), nodes, None if rank is None else int(rank), int(tree.get("NumSamples") or 0))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise FP8MeasurementError(
            f"{path} is none of INC's measurements or is damaged ({type(error).__name__}: {error}): expected a 'Mode' "
            "and 'Nodes' of inputs, outputs and params; copy it again, or measure again"
        ) from None


def _tensors(values: Any) -> tuple[torch.Tensor, ...] | None:
    if values is None:
        return None
    if isinstance(values, np.ndarray):  # older files have an array where there is but one output
        return (_tensor(values),)
    return tuple(_tensor(value) for value in values)


def _tensor(value: Any) -> torch.Tensor:
    depth, inner = 0, value
    while isinstance(inner, (list, tuple)) and inner:
        depth, inner = depth + 1, inner[0]
    if depth > _DEPTH:
        raise ValueError(f"values in {depth} lists around each other")
    found = np.array(value, dtype=np.float32)
    if (found < 0).any():
        raise ValueError(f"a negative value, {found.min()}")
    return torch.from_numpy(found)


def _param(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {int(key): _tensor(each) for key, each in value.items()}
    return _tensor(value)


def _as_written(node: Node, mode: str) -> dict[str, Any]:
    """A node as INC has it when it writes, with its keys in its order."""
    written: dict[str, Any] = {}
    if node.inputs is not None:
        written["inputs"] = [value.numpy() for value in node.inputs]
    if node.outputs is not None:
        outputs = [value.numpy() for value in node.outputs]
        written["outputs"] = tuple(outputs) if mode == SCALES else outputs
    if node.params is not None:
        written["params"] = {
            key: {part: each.numpy() for part, each in value.items()} if isinstance(value, dict) else value.numpy()
            for key, value in node.params.items()
        }
    return written


def _as_lists(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _as_lists(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_as_lists(value) for value in tree]
    return tree.tolist() if isinstance(tree, np.ndarray) else tree


def _difference(one: File, other: File) -> str:
    """Where two files differ, empty if they do not."""
    if (one.mode, one.rank, one.samples) != (other.mode, other.rank, other.samples):
        return "Mode, LocalRank or NumSamples"
    if alone := sorted(one.nodes.keys() ^ other.nodes.keys()):
        return f"{alone[0]} is in one of them"
    for name, node in one.nodes.items():
        if _as_lists(_as_written(node, one.mode)) != _as_lists(_as_written(other.nodes[name], one.mode)):
            return name
    return ""
