"""Where models written for Gaudi keep the weights of their experts, and how they call for them.

In optimum-habana's a block holds a list of MLPs, whose linear layers are never called, and calls a method of its own.
In vLLM's a module for the operation holds two lists of matrices, and is called by the `FusedMoE` layer around it. That
one registers the weights as two stacks, of which the matrices are parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .experts import FP8Experts, Routed

ENCLOSING_TYPES = ("FusedMoE", "SharedFusedMoE")
MATRIX_TYPES = ("MoeMatmul", "MoeFP8Matmul")
CHILD = "experts"  # where the experts in FP8 are


@dataclass(frozen=True)
class ExpertLayout:
    """What classes of some names have in common.

    Attributes:
        types: the names.
        holders: the lists that the weights are in.
        parts: the names that an expert's weights have in checkpoints: gate and up, or one that is both, then down.
        paths: where the modules are that hold them, given the place in the list.
        called: the method that computes the mixture.
        routed: makes of the arguments of that method what it is called with.
    """

    types: tuple[str, ...]
    holders: tuple[str, ...]
    parts: tuple[str, ...]
    paths: tuple[str, ...]
    called: str
    routed: Callable[..., Routed]

    def has_weights(self, owner: nn.Module) -> bool:
        """Whether a module has the lists."""
        return all(isinstance(owner._modules.get(name), nn.ModuleList) for name in self.holders)

    def places(self, owner: nn.Module) -> list[int]:
        """The places of the experts that are here: those of other processes are None."""
        return [place for place, each in enumerate(owner.get_submodule(self.holders[0])._modules.values()) if each]

    def numbers(self, owner: nn.Module) -> range:
        """The numbers in the whole model of the experts that are here."""
        places = self.places(owner)
        start = int(getattr(owner, "experts_min", 0)) if len(self.holders) > 1 else next(iter(places), 0)
        return range(start, start + len(places))

    def matrices(self, owner: nn.Module) -> list[list[Any]]:
        """The modules that hold the weights of each expert, in the order of `parts`."""
        return [[owner.get_submodule(path.format(place)) for path in self.paths] for place in self.places(owner)]


def _block(
    hidden_states: torch.Tensor,
    expert_routing_table: torch.Tensor,
    router_weights: torch.Tensor,
    experts_min: int | None = None,
    experts_max: int | None = None,
) -> Routed:
    """What `call_dynamic_moe_op` is given; the last of the experts is not asked."""
    asked = None if experts_min is None or experts_max is None else range(experts_min, experts_max)
    return Routed(hidden_states, expert_routing_table, router_weights, experts=asked)


def _operation(
    hidden_states: torch.Tensor,
    expert_routing_table: torch.Tensor,
    router_weights: torch.Tensor,
    permuted_weights: bool = True,
    activation: str = "silu",
    **_: Any,
) -> Routed:
    """What `VllmMixtureOfExpertsOp` is called with; how the weights lay is past."""
    return Routed(hidden_states, expert_routing_table, router_weights, activation)


def _operation_fp8(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    permuted_weights: bool = True,
    activation: str = "silu",
    **_: Any,
) -> Routed:
    """What those are called with whose weights are codes."""
    return Routed(x, topk_ids, topk_weights, activation)


_VLLM = (("w13_list", "w2_list"), ("w13", "w2"), ("w13_list.{}", "w2_list.{}"), "forward")
LAYOUTS = (
    ExpertLayout(
        ("GaudiMixtralSparseMoeBlock",),
        ("experts",),
        ("w1", "w3", "w2"),  # Mixtral's w3 is the up, and its w2 the down projection
        ("experts.{}.w1", "experts.{}.w3", "experts.{}.w2"),
        "call_dynamic_moe_op",
        _block,
    ),
    ExpertLayout(
        ("GaudiDeepseekV3MoE",),
        ("experts",),
        ("gate_proj", "up_proj", "down_proj"),
        ("experts.{}.gate_proj", "experts.{}.up_proj", "experts.{}.down_proj"),
        "call_dynamic_moe_op",
        _block,
    ),
    ExpertLayout(("VllmMixtureOfExpertsOp",), *_VLLM, _operation),
    ExpertLayout(("VllmMixtureOfExpertsOpFP8", "VllmMixtureOfExpertsOpFP8PerChannel"), *_VLLM, _operation_fp8),
)


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """The layout of a module, by the name of its class; None: it is no mixture of experts."""
    return next((layout for layout in LAYOUTS if type(module).__name__ in layout.types), None)


def weight_of(matrix: Any) -> torch.Tensor:
    """The weight `[out, in]` that a module holds, in high precision where it can give that."""
    weight = matrix.get_dequant_weight() if hasattr(matrix, "get_dequant_weight") else matrix.weight
    return weight.detach().squeeze()


@dataclass
class Replaced:
    """What stood in the place of a module's experts in FP8.

    Attributes:
        holders: the lists by name.
        enclosing: vLLM's layer around it, whose stacks of weights were the same.
        stacks: those by name.
    """

    holders: dict[str, nn.Module]
    enclosing: nn.Module | None = None
    stacks: dict[str, nn.Parameter] = field(default_factory=dict)

    def emptied(self) -> Replaced:
        """The same without the values of weights."""
        holders = {name: _emptied(holder) for name, holder in self.holders.items()}
        stacks = {name: _on_meta(stack) for name, stack in self.stacks.items()}
        return Replaced(holders, self.enclosing, stacks)

    def put_back(self, owner: nn.Module) -> None:
        """Give a module what it had."""
        owner._modules.pop(CHILD, None)
        owner._modules.update(self.holders)
        if self.enclosing is not None:
            self.enclosing._parameters.update(self.stacks)


def replace_experts(owner: nn.Module, layout: ExpertLayout, experts: FP8Experts, around: nn.Module | None) -> Replaced:
    """Put experts in FP8 in the place of a module's own; `around` is the module that it is in."""
    replaced = Replaced({name: owner._modules[name] for name in layout.holders})  # type: ignore[misc]
    if len(layout.holders) > 1 and around is not None and type(around).__name__ in ENCLOSING_TYPES:
        names = [f"{name.removesuffix('_list')}_weight" for name in layout.holders]
        replaced.enclosing = around
        replaced.stacks = {name: around._parameters[name] for name in names if around._parameters.get(name) is not None}  # type: ignore[misc]
        around._parameters.update(dict.fromkeys(replaced.stacks))
    for name in layout.holders:
        if name != CHILD:
            del owner._modules[name]
    owner._modules[CHILD] = experts
    return replaced


def fill(owner: nn.Module, layout: ExpertLayout, replaced: Replaced, weights: Sequence[Sequence[torch.Tensor]]) -> None:
    """Give the matrices of a module, whose lists are back, their weights: `[out, in]` of each part of each expert."""
    for index, holder in enumerate(layout.holders):
        name = f"{holder.removesuffix('_list')}_weight"
        if name in replaced.stacks and replaced.enclosing is not None:
            stack = nn.Parameter(torch.stack([expert[index] for expert in weights]), requires_grad=False)
            replaced.enclosing._parameters[name] = stack
            weights = [[*each[:index], stack.data[i], *each[index + 1 :]] for i, each in enumerate(weights)]
    for matrices, values in zip(layout.matrices(owner), weights, strict=True):
        for matrix, value in zip(matrices, values, strict=True):
            is_parameter = "weight" in matrix._parameters
            matrix.weight = nn.Parameter(value, requires_grad=matrix.weight.requires_grad) if is_parameter else value
            if (scale := getattr(matrix, "scale_inv_fp8", None)) is not None:  # of codes that are no more
                matrix.scale_inv_fp8 = torch.ones_like(scale)


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _emptied(module: nn.Module) -> nn.Module:
    """A copy of a module, and of those inside, without the values of parameters and of `weight`."""
    shell = copy.copy(module)
    parameters: Mapping[str, nn.Parameter | None] = module._parameters
    shell._parameters = {name: None if each is None else _on_meta(each) for name, each in parameters.items()}
    shell._modules = {name: None if each is None else _emptied(each) for name, each in module._modules.items()}
    if isinstance(weight := vars(shell).get("weight"), torch.Tensor):  # no parameter, as of vLLM's matrices
        shell.__dict__["weight"] = weight.to("meta")
    return shell
