"""FP8FusedExperts: the experts of transformers' models, whose weights are stacks of three dimensions, in FP8.

transformers says of the class how they are computed (`@use_experts_implementation`): whether they have a gate, biases
and a norm behind, and how the weights lie. Only Llama 4's, which it says nothing of, are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError, FP8StateError
from ..ops.reference_experts import ACTIVATIONS
from ..scales import Scheme, inf_as_nan, quantize_weight
from .autocast import autocast
from .base import of_original_class, own_attributes, shell_of
from .experts import FP8Experts, Routed

_DECLARED = "transformers.integrations.moe"
# Called with all tokens once for each expert, zeros where they do not go there; and what a declaration would say.
_SORTED = ("Llama4TextExperts",)
_OF_SORTED = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": True,
    "is_concatenated": True,
}


def is_fused(module: nn.Module) -> bool:
    """Whether it is known of a module's class how its experts are computed, and that is how they are."""
    computes: Any = type(module).forward
    declared = getattr(computes, "__globals__", {}).get("__name__") == _DECLARED
    known = takes_sorted(module) or (declared and all(hasattr(module, name) for name in _OF_SORTED))
    return known and "down_proj" in module._parameters


def takes_sorted(module: Any) -> bool:
    """Whether experts are called with `[experts · tokens, hidden]`, all tokens once for each expert."""
    return type(getattr(module, "origin", module)).__name__ in _SORTED


def flag(module: Any, name: str) -> bool:
    """What is declared of the experts of a module."""
    return bool(getattr(module, name, _OF_SORTED[name]))


def upper_name(module: Any) -> str:
    """The name of the parameter with the weights that the input is multiplied with."""
    return "gate_up_proj" if flag(module, "has_gate") else "up_proj"


def to_out_in(module: Any, stack: torch.Tensor) -> torch.Tensor:
    """A stack of weights as `[E, out, in]`, and the other way round."""
    return stack.transpose(1, 2) if flag(module, "is_transposed") else stack


def gated(module: Any, product: torch.Tensor) -> torch.Tensor:
    """What goes into the last product, `[N, inner]`, of what came out of the first."""
    result: torch.Tensor
    if takes_sorted(module):
        gate, up = product.chunk(2, dim=-1)
        result = up * module.act_fn(gate)
    else:
        result = module._apply_gate(product) if flag(module, "has_gate") else module.act_fn(product)
    return result


def intermediate(module: Any, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """What goes into the last product of one expert, for rows `[N, hidden]` and a module in high precision."""
    upper = upper_name(module)
    weight = to_out_in(module, module._parameters[upper])[expert]
    bias = module._parameters[f"{upper}_bias"][expert] if flag(module, "has_bias") else None
    return gated(module, F.linear(rows.to(weight.dtype), weight, bias))


class FP8FusedExperts(FP8Experts):
    """Experts in FP8 in the place of a module of transformers, with its attributes, methods, norm and biases.

    The rows of `gate_up_proj` keep the order that the module's own gate expects, and so do its biases.

    Args:
        origin: the module in high precision, or on meta.
        parts: the names of an expert's weights in checkpoints; none: those have stacks.
        scheme: how they are scaled and computed.

    Attributes:
        origin: the module this one stands for, without its parameters.
        activation: of the operator that computes them, see `ops.experts`; None: they are computed in steps.
    """

    origin: Any
    activation: str | None

    def __init__(self, origin: Any, parts: Sequence[str], scheme: Scheme):
        weight, upper = origin.down_proj, upper_name(origin)
        halves = 2 if flag(origin, "has_gate") and flag(origin, "is_concatenated") else 1
        numbers = range(weight.shape[0])
        super().__init__(parts, numbers, scheme, weight.dtype, upper=upper, halves=halves)
        self.__dict__.update({name: value for name, value in own_attributes(origin).items() if name not in vars(self)})
        self._buffers, self._modules = dict(origin._buffers), dict(origin._modules)
        self._non_persistent_buffers_set = set(origin._non_persistent_buffers_set)
        self.__dict__["origin"] = shell_of(origin)  # not a submodule
        self.__dict__["activation"] = _activation_of(origin)
        for name in biases_of(origin):
            self.register_parameter(name, origin._parameters[name])

    def __getattr__(self, name: str) -> Any:
        """What the original's class has: its methods and properties, of this module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            for found in of_original_class(self, name):
                return found
            raise

    def quantized(self, name: str, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[E, out, in]` and scales of one of the stacks, given as the module stores it; one expert at a time.

        Raises:
            FP8ScaleError: a weight that has no sound scale.
        """
        scheme, halves = self.scheme, self.halves if name == self.upper else 1
        stack = to_out_in(self, stack.detach())
        codes = torch.empty(stack.shape, dtype=scheme.fmt.dtype, device=stack.device)
        scales = []
        for expert, out in zip(stack, codes, strict=True):
            rows = []
            for weight, place in zip(expert.chunk(halves), out.chunk(halves), strict=True):
                made, scale, _ = quantize_weight(weight.contiguous(), scheme.weight, scheme.fmt, scheme.hp_dtype)
                place.view(torch.uint8).copy_(made.view(torch.uint8))
                rows.append(scale.reshape(-1, 1))
            scales.append(torch.cat(rows))
        return codes, torch.stack(scales)

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module, with the dequantized weights in `dtype` (by default `high_precision`)."""
        self.stack()
        module, dtype = shell_of(self.origin), dtype or self.high_precision
        module.__dict__.update({name: vars(self)[name] for name in own_attributes(module) if name in vars(self)})
        module._buffers, module._modules = self._buffers, self._modules
        for index, name in enumerate(self.stack_names):
            values = torch.stack([self._dequantized(expert, dtype)[index] for expert in self.numbers])
            module._parameters[name] = nn.Parameter(to_out_in(module, values).contiguous())
        for name in biases_of(module):
            module._parameters[name] = self._parameters[name]
        return module

    def _dequantized(self, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Both weights of an expert in high precision, `[out, in]`."""
        values = []
        for stack, scales, halves in zip(self.stacks(), self.stack_scales(), (self.halves, 1), strict=True):
            halved = zip(stack[expert].chunk(halves), scales[expert].chunk(halves), strict=True)
            pieces = [(codes, scale.reshape(1) if scale.numel() == 1 else scale) for codes, scale in halved]
            values.append(torch.cat([ops.cast_from_fp8(codes, scale, dtype) for codes, scale in pieces]))
        return values[0], values[1]

    # --- computing ------------------------------------------------------------------------------------------------

    def intermediate(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """What goes into the last product of one expert, unrounded, for rows `[N, hidden]` that are not rounded."""
        bias = self._parameters[f"{self.upper}_bias"][expert] if flag(self, "has_bias") else None  # type: ignore[index]
        return gated(self, F.linear(rows, self._dequantized(expert, rows.dtype)[0], bias))

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum over the experts of each token.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: `[tokens, k]`, integers: the experts of each token; others than there are contribute nothing.
            top_k_weights: `[tokens, k]`, of the router.

        Returns:
            `[tokens, hidden]`, in the dtype of what comes in.
        """
        self._check_there(hidden_states)
        x = autocast(hidden_states)
        if self.activation is not None:
            result = super().forward(Routed(x, top_k_index, top_k_weights, self.activation))
        else:
            result = self._in_steps(x, top_k_index, top_k_weights)
        return result.to(hidden_states.dtype)

    def _check_there(self, x: torch.Tensor) -> None:
        if not self.is_stacked or (self.down_proj.is_meta and not x.is_meta):
            raise FP8StateError(
                f"{self.name}: the weights of FP8 experts are offloaded, were never loaded, or are no FP8 codes any "
                "more: load the model without offloading"
            )

    def _in_steps(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The two products, and the module's own operations between and behind them."""
        scheme, count = self.scheme, index.shape[-1]
        experts, rows = index.reshape(-1), x.repeat_interleave(count, dim=0)
        scale = scheme.dynamic_scale(x) if scheme.is_dynamic else self.input_scale
        if scale is not None and scale.ndim > 1:  # one of each token
            scale = scale.repeat_interleave(count, dim=0)
        weighted = self._rows(rows, experts, scale) * weights.reshape(-1, 1)
        return weighted.view(*index.shape, -1).sum(dim=1)

    def _rows(self, rows: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """What the experts of the rows `[N, hidden]` make of them; `scale` is that of the rows."""
        middle = gated(self, self._product(self.upper, rows, experts, scale))
        middle_scale = self.scheme.dynamic_scale(middle) if self.scheme.is_dynamic else self.intermediate_scale
        output = self._product("down_proj", middle, experts, middle_scale)
        return self.post_expert_norm(output) if flag(self, "has_post_expert_norm") else output

    def _product(
        self, name: str, rows: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        parameters: dict[str, Any] = self._parameters
        try:
            return ops.grouped_linear(
                inf_as_nan(rows) if self.scheme.is_dynamic else rows,
                experts,
                parameters[name],
                parameters[f"{name}_scale"],
                scale,
                parameters[f"{name}_bias"] if flag(self, "has_bias") else None,
                full_scale=self.scheme.fmt.full_scale,
                arithmetic=self.scheme.arithmetic,
                record=self.record,
            )
        except FP8NotAvailableError as error:
            kind = type(self.origin).__name__
            raise FP8NotAvailableError(
                f"{self.name}: {error}. The experts of {kind} are computed in two products, because they have a gate, "
                "biases or a norm of their own, which no single operator for experts has: put them on the blocklist"
            ) from None

    def extra_repr(self) -> str:
        way = f"one operator, {self.activation}" if self.activation is not None else "in steps"
        return f"{super().extra_repr()}, {way}"


class FP8SortedExperts(FP8FusedExperts):
    """Experts that are called with all tokens once for each expert, zeros where they do not go there."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """What each expert makes of its rows.

        Args:
            hidden_states: `[experts · tokens, hidden]`.

        Returns:
            the same shape, in the dtype of what comes in.
        """
        self._check_there(hidden_states)
        x = autocast(hidden_states).reshape(-1, hidden_states.shape[-1])
        experts = torch.arange(len(self.numbers), device=x.device).repeat_interleave(x.shape[0] // len(self.numbers))
        return self._rows(x, experts, self.scheme.dynamic_scale(x) if self.scheme.is_dynamic else self.input_scale)


def fp8_experts(origin: Any, parts: Sequence[str], scheme: Scheme) -> FP8FusedExperts:
    """The FP8 module for the place of one in high precision."""
    return (FP8SortedExperts if takes_sorted(origin) else FP8FusedExperts)(origin, parts, scheme)


def biases_of(origin: Any) -> list[str]:
    """The names of the biases of a module's stacks."""
    return [f"{upper_name(origin)}_bias", "down_proj_bias"] if flag(origin, "has_bias") else []


def _activation_of(origin: Any) -> str | None:
    """The activation with which one operator computes what a module does; None: there is none that does."""
    if takes_sorted(origin):
        return None
    gate: Callable[..., Any] = type(origin)._apply_gate
    own_gate = gate.__globals__.get("__name__") != _DECLARED  # type: ignore[attr-defined]
    rest = flag(origin, "has_bias") or flag(origin, "has_post_expert_norm") or not flag(origin, "is_concatenated")
    if not flag(origin, "has_gate") or own_gate or rest or list(getattr(origin.act_fn, "parameters", list)()):
        return None
    values = torch.linspace(-8, 8, 257, device="cpu")
    with torch.no_grad():
        found = origin.act_fn(values)
        return next((name for name, known in ACTIVATIONS.items() if torch.equal(known(values), found)), None)
