"""Where INC's names and ours differ: the operations of attention, and the layers that vLLM fuses.

INC measures modules. Attention is measured where a model is written around a module for each operation: beside the
projections in optimum-habana (`self_attn.matmul_qk`), in a module of its own in vLLM (`self_attn.attn.impl.matmul_qk`).
We measure the operands of attention of the module that computes it: `self_attn`, "q". A model of transformers has
`q_proj`, `k_proj` and `v_proj` where vLLM's has `qkv_proj`. Only the model tells which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..observer import Observer
from ..observers.maxabs import MaxAbs

Tensors = Mapping[tuple[str, str], Observer]

FUSED_SDPA, QK, AV = "fused_scaled_dot_product_attention", "matmul_qk", "matmul_av"
SOFTMAX, K_CACHE, V_CACHE = "softmax", "k_cache", "v_cache"
OPERATIONS = (FUSED_SDPA, QK, AV, SOFTMAX, K_CACHE, V_CACHE)
INTERMEDIATE = "intermediate"  # with the number of its expert: the kind of what goes into its down projection
VLLM = ".attn.impl"  # where vLLM keeps them
# Layers that vLLM makes one of: they have one input, and the weights below each other.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# The projection behind attention: its input is attention's output.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")

# The kinds that the modules of operations have here, by class and by INC's kind.
_KINDS: dict[str, dict[str, str | None]] = {
    "Matmul": {"input": "q", "input2": "k"},
    # Of its second operand INC has measured blocks as well that belong to no sequence; its output has none.
    "B2BMatmul": {"input": "q", "input2": None, "output": "k"},
    "Softmax": {"output": "p"},
    "BlockSoftmaxConstMax": {"output": "p"},
    "ModuleFusedSDPA": {"input": "q", "input2": "k", "input3": "v", "output2": "p"},
}
# Mixtures of experts: their further outputs are what goes into the down projection of each expert. vLLM's module has
# those of its own process, optimum-habana's blocks all of the model, with zeros for those of others.
_EXPERTS, _OWN_EXPERTS = ("GaudiMixtralSparseMoeBlock", "GaudiDeepseekV3MoE"), "VllmMixtureOfExpertsOp"
_FURTHER = re.compile(r"output(\d+)")


@dataclass
class Renamed:
    """Tensors by the names of a model.

    Attributes:
        tensors: those of its modules, and as they were called those that are of none.
        foreign: the names of modules that the model does not have.
    """

    tensors: dict[tuple[str, str], Observer] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)

    def add(self, name: str, kind: str, observer: Observer | None) -> None:
        """Take a tensor as that of a module, besides what is known of it."""
        if observer is None:
            return
        known = self.tensors.setdefault((name, kind), type(observer)())
        known.merge(observer)


def in_names_of(model: nn.Module, tensors: Tensors) -> Renamed:
    """The tensors that INC measured of a model, as we call them.

    Args:
        model: what they are for; in high precision or not.
        tensors: by INC's names and kinds, as `IncMeasurements.tensors` gives them.
    """
    modules, found = dict(model.named_modules()), Renamed()
    attention: dict[tuple[str, bool], dict[str, dict[str, Observer]]] = {}
    for name, node in by_module(tensors).items():
        parent, _, last = name.rpartition(".")
        around = next((each for each in (parent, parent.removesuffix(VLLM)) if each in modules), None)
        parts = [f"{name.removesuffix(last)}{part}" for part in FUSED.get(last, ())]
        if name in modules:
            for kind, observer in node.items():
                if (renamed := _our_kind(modules[name], kind)) is not None:
                    found.add(name, renamed, observer)
        elif last in OPERATIONS and around:
            attention.setdefault((around, parent.endswith(VLLM)), {})[last] = node
        elif parts and all(part in modules for part in parts):
            for part in parts:
                for kind, observer in node.items():
                    found.add(part, kind, observer)
        else:
            found.foreign.append(name)
            for kind, observer in node.items():
                found.add(name, kind, observer)
    for (name, in_vllm), operations in attention.items():
        _take_attention(found, name, operations, _scaling(modules[name]) if in_vllm else 1.0)
    return found


def _our_kind(module: nn.Module, kind: str) -> str | None:
    """What we call one of INC's kinds of tensors of a module."""
    cls = type(module).__name__
    own = cls.startswith(_OWN_EXPERTS)
    if (own or cls in _EXPERTS) and (further := _FURTHER.fullmatch(kind)):
        first = int(getattr(module, "experts_min", 0)) if own else 0
        return f"{INTERMEDIATE}{first + int(further[1]) - 2}"
    return _KINDS.get(cls, {}).get(kind, kind)


def by_module(tensors: Tensors) -> dict[str, dict[str, Observer]]:
    """The tensors of each module by kind, in the order they are in."""
    nodes: dict[str, dict[str, Observer]] = {}
    for (name, kind), observer in tensors.items():
        nodes.setdefault(name, {})[kind] = observer
    return nodes


def _take_attention(
    found: Renamed, name: str, operations: Mapping[str, Mapping[str, Observer]], scaling: float | None
) -> None:
    """Take what was measured of the operations of one attention module.

    Args:
        found: where to.
        name: the attention module.
        operations: by operation and INC's kind.
        scaling: what the query was multiplied by before the product that measured it; None: not known.
    """

    def of(operation: str, kind: str = "input") -> Observer | None:
        return operations.get(operation, {}).get(kind)

    found.add(name, "q", of(FUSED_SDPA))
    query = of(QK)
    if query is not None and scaling is not None:
        found.add(name, "q", MaxAbs(maxabs=query.range() / scaling, count=torch.zeros((), dtype=torch.int64)))
    elif of(FUSED_SDPA) is None:
        found.add(name, "q", query)
    for kind, place, product, cache in (("k", "input2", QK, K_CACHE), ("v", "input3", AV, V_CACHE)):
        # What a product finds in blocks of a cache that hold nothing yet is not data: the cache has what is written.
        sources = [of(FUSED_SDPA, place), of(cache) or of(product, "input2")]
        for source in sources:
            found.add(name, kind, source)
        if of(cache) is not None:
            for source in sources:
                found.add(name, f"{kind}_cache", source)
    for operation, kind in ((SOFTMAX, "output"), (AV, "input"), (FUSED_SDPA, "output2")):
        found.add(name, "p", of(operation, kind))
    projected = (found.tensors.get((f"{name}.{each}", "input")) for each in OUTPUT_PROJECTIONS)
    # Attention's output is a mean of values: where it was not measured it is not larger than the largest of them.
    found.add(name, "output", of(FUSED_SDPA, "output") or next(filter(None, projected), found.tensors.get((name, "v"))))


def _scaling(module: nn.Module) -> float | None:
    scaling = getattr(module, "scaling", None)
    return float(scaling) if isinstance(scaling, (int, float)) and scaling > 0 else None


def weights_that_differ(
    tensors: Tensors, weight: Callable[[str], torch.Tensor | None]
) -> dict[str, tuple[float, float]]:
    """The modules whose measured weight is not the one at hand: the largest magnitude measured, and the one there is.

    Args:
        tensors: by our names.
        weight: max|w| of a module, float32 `(1,)` or scalar; None where it is not known.
    """
    said = {name: observer.range() for (name, kind), observer in tensors.items() if kind == "weight"}
    there = {name: found for name in said if (found := weight(name)) is not None}
    wrong = {name: (said[name].item(), there[name].item()) for name in there if not _same(said[name], there[name])}
    for parts in FUSED.values():
        for name in [name for name in wrong if name.endswith(parts)]:
            before = name.removesuffix(name.rpartition(".")[2])
            group = [f"{before}{part}" for part in parts]
            together = all(part in there and said[part] == said[name] for part in group)
            if together and _same(said[name], torch.stack([there[part].reshape(()) for part in group]).amax()):
                del wrong[name]
    return wrong


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two ranges are the same in bfloat16, which INC keeps them in."""
    return bool((one.cpu().reshape(()).to(torch.bfloat16) == other.cpu().reshape(()).to(torch.bfloat16)).item())
