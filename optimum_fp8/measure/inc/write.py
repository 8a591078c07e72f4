"""Measurements as files of INC's: the only place of the package that writes a pickle, and only INC reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..observer import Observer
from .file import RANGES, File, FileName, Node, paths_of, write_file
from .names import (
    AV,
    FUSED,
    FUSED_SDPA,
    INTERMEDIATE,
    K_CACHE,
    OPERATIONS,
    QK,
    SOFTMAX,
    V_CACHE,
    VLLM,
    Tensors,
    by_module,
)

_OWN = re.compile(r"(input|output)\d*|weight|bias")  # kinds that INC has itself
_OPERANDS = frozenset(["q", "k", "v", "p", "output", "k_cache", "v_cache"])
_NOTHING = ("unseen",)  # says that a module ran, and nothing of a tensor
_MAPPINGS = ("batch2block_matmul", "block2batch_matmul")
_ROW_PARALLEL = ("o_proj", "down_proj")


@dataclass
class Nodes:
    """What is said of each module in INC's names.

    Attributes:
        nodes: by module.
        left_out: measured tensors that INC has no place for.
        without_outputs: layers that vLLM splits by rows, and whose outputs it therefore needs, without a range of them.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    without_outputs: list[str] = field(default_factory=list)


def nodes_of(tensors: Tensors, *, vllm: bool = False, scaling: Mapping[str, float] | None = None) -> Nodes:
    """What INC would have measured.

    Args:
        tensors: observers by module name and kind.
        vllm: by the names that vLLM's modules have, rather than optimum-habana's.
        scaling: by attention module, what vLLM multiplies the query by before the product that measures it. Where it is
            not given, the range is that of the query as it comes.
    """
    made = Nodes()
    for name, node in by_module(tensors).items():
        values = {kind: _value(observer) for kind, observer in node.items() if kind not in _NOTHING}
        last = name.rpartition(".")[2]
        if all(_OWN.fullmatch(kind) for kind in values):
            if values:
                made.nodes[name] = _plain(values)
        elif last == FUSED_SDPA and values.keys() >= {"q", "k", "v", "output"}:
            made.nodes[name] = _operations(values, 1.0)[FUSED_SDPA]
        elif values.keys() == {"q", "k"}:  # a product that is a module
            outputs = (values["k"],) if last in _MAPPINGS else None  # where INC looks for the range of the second
            made.nodes[name] = Node((values["q"], values["k"]), outputs)
        elif values.keys() == {"p"}:
            made.nodes[name] = Node((), (values["p"],))
        elif "input" in values and any(kind.startswith(INTERMEDIATE) for kind in values):
            made.nodes[name] = _mixture(values)
        else:
            made.left_out += [f"{name}/{kind}" for kind in values if kind not in _OPERANDS]
            factor = (scaling or {}).get(name, 1.0) if vllm else 1.0
            made.nodes |= {f"{name}.{each}": said for each, said in _operations(values, factor).items()}
    if vllm:
        made.nodes = _fused({_in_vllm(name): node for name, node in made.nodes.items()})
        layers = [name for name in made.nodes if name.endswith(_ROW_PARALLEL)]
        made.without_outputs = [name for name in layers if made.nodes[name].outputs is None]
    return made


def write_inc(
    prefix: str | os.PathLike[str], nodes: Mapping[str, Node], *, samples: int = 0, ranks: int = 0
) -> list[str]:
    """Write measurements as INC does, and return the paths.

    Args:
        prefix: INC's `dump_stats_path`.
        nodes: of `nodes_of`.
        samples: INC's NumSamples; 0 for none.
        ranks: how many ranks to write the same files for; 0 for a model that is not distributed.
    """
    paths: list[str] = []
    for name in names_of(prefix, ranks=ranks):
        rank = name.rank if name.world else None
        paths += write_file(name, File(RANGES, dict(nodes), rank, samples, list(nodes)))
    return paths


def names_of(prefix: str | os.PathLike[str], *, method: str = "", ranks: int = 0) -> list[FileName]:
    """The names of the files for each rank."""
    return [FileName(os.fspath(prefix), method=method, world=ranks, rank=rank) for rank in range(max(ranks, 1))]


def inc_paths(prefix: str | os.PathLike[str], *, method: str = "", ranks: int = 0) -> list[str]:
    """All paths that may be written to."""
    return [path for name in names_of(prefix, method=method, ranks=ranks) for path in paths_of(name)]


def scaling_of(model: nn.Module) -> dict[str, float]:
    """What each attention module of a model multiplies its scores by."""
    named = ((name, getattr(module, "scaling", None)) for name, module in model.named_modules())
    return {name: float(scaling) for name, scaling in named if isinstance(scaling, (int, float))}


def _value(observer: Observer) -> torch.Tensor:
    return observer.range().detach().float().cpu().reshape(1, 1)


def _plain(values: Mapping[str, torch.Tensor]) -> Node:
    """A node of kinds that are INC's own."""

    def numbered(kind: str) -> tuple[torch.Tensor, ...] | None:
        places = sorted((int(key.removeprefix(kind) or 1), key) for key in values if key.startswith(kind))
        return tuple(values[key] for _, key in places) or None

    params = {key: value for key, value in values.items() if not key.startswith(("input", "output"))}
    return Node(numbered("input"), numbered("output"), params or None)


def _mixture(values: Mapping[str, torch.Tensor]) -> Node:
    """A mixture of experts: INC has its output and then a range for each expert, 0 of one that was not reached."""
    places = {int(kind.removeprefix(INTERMEDIATE)): kind for kind in values if kind.startswith(INTERMEDIATE)}
    zero = torch.zeros(1, 1)
    reached = [values[places[place]] if place in places else zero for place in range(max(places) + 1)]
    return Node((values["input"],), (values.get("output", zero), *reached))


def _operations(values: Mapping[str, torch.Tensor], scaling: float) -> dict[str, Node]:
    """The operations of an attention module, as far as the ranges of their operands are known."""
    p = values.get("p", torch.ones(1, 1))  # a softmax's output is never larger
    q, k, v, output = (values.get(kind) for kind in ("q", "k", "v", "output"))
    found: dict[str, Node] = {}
    if q is not None and k is not None and v is not None:
        found[QK], found[SOFTMAX], found[AV] = Node((q * scaling, k)), Node((), (p,)), Node((p, v))
        if output is not None:
            found[FUSED_SDPA] = Node((q, k, v), (output, p))
    for operation, cached, kept in ((K_CACHE, values.get("k_cache"), k), (V_CACHE, values.get("v_cache"), v)):
        if (written := kept if cached is None else cached) is not None:
            found[operation] = Node((written,))
    return found


def _in_vllm(name: str) -> str:
    parent, _, last = name.rpartition(".")
    return f"{parent}{VLLM}.{last}" if last in OPERATIONS and not parent.endswith(VLLM) else name


def _fused(nodes: dict[str, Node]) -> dict[str, Node]:
    """The nodes with one for the layers that vLLM makes one of, in the place of the first."""
    place: dict[str, str] = {}
    for whole, parts in FUSED.items():
        for name in nodes:
            parent, dot, last = name.rpartition(".")
            group = [f"{parent}{dot}{part}" for part in parts]
            if last == parts[0] and all(part in nodes for part in group):
                place |= dict.fromkeys(group, f"{parent}{dot}{whole}")
    merged: dict[str, Node] = {}
    for name, node in nodes.items():
        target = place.get(name, name)
        merged[target] = _larger(merged[target], node) if target in merged else node
    return merged


def _larger(one: Node, other: Node) -> Node:
    """The larger of each range of two layers; what one of them lacks the whole lacks."""

    def each(
        ones: tuple[torch.Tensor, ...] | None, others: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, ...] | None:
        return None if ones is None or others is None else tuple(map(torch.maximum, ones, others))

    weights = [(node.params or {}).get("weight") for node in (one, other)]
    params = None if any(weight is None for weight in weights) else {"weight": torch.maximum(*weights)}  # type: ignore[arg-type]
    return Node(each(one.inputs, other.inputs), each(one.outputs, other.outputs), params)
