"""How classes of transformers keep the weights of their experts in stacks, and how they are called.

transformers says it of most (`@use_experts_implementation`): whether there is a gate, biases, a norm behind, and how
the weights lie. Of some it says nothing: these are known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_DECLARED = "transformers.integrations.moe"


@dataclass(frozen=True)
class FusedLayout:
    """What is known of a module with stacked experts.

    Attributes:
        upper: the names of the parameters that the input is multiplied with.
        down: the name of the last one.
        has_gate, has_bias, has_post_expert_norm, is_concatenated: as transformers declares them; a gate in a parameter
            of its own is concatenated behind the product.
        transposed: the names of those whose matrices are `[in, out]`.
        count: the attribute that says how many experts have weights, where parameters may be longer; "": all have.
        flat: whether the matrices of all experts lie below each other, `[E · rows, columns]`.
        activation: where the activation function is.
        called: "routed" (with experts and weights of each token), "sorted" (with all tokens once for each expert, zeros
            where they do not go there), or "sized" (with rows sorted by expert, and how many belong to each).
        identity: whether numbers from `count` on stand for experts that give back what they are given.
    """

    upper: tuple[str, ...] = ("gate_up_proj",)
    down: str = "down_proj"
    has_gate: bool = True
    has_bias: bool = False
    has_post_expert_norm: bool = False
    is_concatenated: bool = True
    transposed: tuple[str, ...] = ()
    count: str = ""
    flat: bool = False
    activation: str = "act_fn"
    called: str = "routed"
    identity: bool = False

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of all parameters with weights."""
        return (*self.upper, self.down)

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of those with biases, in the order of `stacks`."""
        return tuple(f"{name}_bias" for name in self.stacks) if self.has_bias else ()

    @property
    def halves(self) -> dict[str, int]:
        """How many weights lie below each other in a matrix of each stack."""
        both = self.has_gate and self.is_concatenated and len(self.upper) == 1
        return {name: 2 if both and name != self.down else 1 for name in self.stacks}

    @property
    def holder(self) -> str:
        """The name of the part of the module that has the parameters; "": it has them itself."""
        return self.down.rpartition(".")[0]


_GATE_UP = FusedLayout()
KNOWN = {
    "Llama4TextExperts": replace(_GATE_UP, transposed=("gate_up_proj", "down_proj"), called="sorted"),
    "LongcatFlashExperts": replace(_GATE_UP, count="num_routed_experts", identity=True),
    "Step3p7Experts": _GATE_UP,
    "DbrxExperts": FusedLayout(
        ("mlp.w1", "mlp.v1"), "mlp.w2", transposed=("mlp.w2",), flat=True, activation="mlp.activation_fn"
    ),
    "JetMoeParallelExperts": FusedLayout((), "weight", has_gate=False, called="sized"),
}


def layout_of(module: Any) -> FusedLayout | None:
    """The layout of a module in high precision or of the FP8 one in its place; None: it is not known."""
    module = getattr(module, "origin", module)
    known = KNOWN.get(type(module).__name__)
    if known is not None:
        return known
    computes: Any = type(module).forward
    declared = getattr(computes, "__globals__", {}).get("__name__") == _DECLARED
    flags = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
    if not declared or not all(hasattr(module, name) for name in flags):
        return None
    found: dict[str, Any] = {name: bool(getattr(module, name)) for name in flags if name != "is_transposed"}
    layout = FusedLayout(("gate_up_proj" if module.has_gate else "up_proj",), **found)
    return replace(layout, transposed=layout.stacks) if module.is_transposed else layout


def known_layout(module: Any) -> FusedLayout:
    """The layout of a module that has one."""
    layout = layout_of(module)
    assert layout is not None
    return layout


def is_fused(module: nn.Module) -> bool:
    """Whether it is known of a module's class how its experts are computed, and that is how they are."""
    layout = layout_of(module)
    return layout is not None and not hasattr(module, "origin") and weight_of(module, layout.down) is not None


def takes_sorted(module: Any) -> bool:
    """Whether experts are called with `[experts · tokens, hidden]`, all tokens once for each expert."""
    return known_layout(module).called == "sorted"


def weight_of(module: Any, name: str) -> nn.Parameter | None:
    """A parameter of a module in high precision, by its name in a layout; None: it has none."""
    for part in name.split(".")[:-1]:
        module = getattr(module, "_modules", {}).get(part)
    found: nn.Parameter | None = getattr(module, "_parameters", {}).get(name.rpartition(".")[2])
    return found


def stack_of(module: Any, name: str) -> nn.Parameter:
    """One that it has."""
    found = weight_of(module, name)
    assert found is not None
    return found


def number_of(module: Any) -> int:
    """How many experts of a module in high precision have weights."""
    layout = known_layout(module)
    if layout.flat:
        return int(module.num_experts)
    return int(to_out_in(module, layout.down, weight_of(module, layout.down)).shape[0])


def to_out_in(module: Any, name: str, stack: Any) -> torch.Tensor:
    """A stack of weights of the experts that are computed, `[E, out, in]`, of a parameter as the module stores it."""
    layout = known_layout(module)
    stack = stack.unflatten(0, (module.num_experts, -1)) if layout.flat else stack
    stack = stack[: getattr(module, layout.count)] if layout.count else stack
    return stack.transpose(1, 2) if name in layout.transposed else stack


def as_stored(module: Any, name: str, stack: torch.Tensor, count: int) -> torch.Tensor:
    """The parameter that `to_out_in` makes a stack of; zeros for experts up to `count` that are not computed."""
    layout = known_layout(module)
    stack = stack.transpose(1, 2) if name in layout.transposed else stack
    if count > len(stack):
        stack = torch.cat([stack, stack.new_zeros((count - len(stack), *stack.shape[1:]))])
    return (stack.flatten(0, 1) if layout.flat else stack).contiguous()


def gated(module: Any, product: torch.Tensor) -> torch.Tensor:
    """What goes into the last product, `[N, inner]`, of what came out of those before it."""
    layout, result = known_layout(module), product
    if layout.upper and layout.has_gate and hasattr(module, "_apply_gate"):
        result = module._apply_gate(product)
    elif layout.upper:
        parts: Sequence[torch.Tensor] = product.chunk(2, dim=-1) if layout.has_gate else (product,)
        act = activation_of(module)
        result = act(parts[0]) * parts[1] if layout.has_gate else act(product)
    return result


def activation_of(module: Any) -> Any:
    """The activation function of a module in high precision or in FP8."""
    path = known_layout(module).activation
    module = module if "." not in path else getattr(module, "origin", module)
    for part in path.split("."):
        module = getattr(module, part)
    return module
