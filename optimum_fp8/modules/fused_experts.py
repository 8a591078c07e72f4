"""FP8FusedExperts: the experts of transformers' models, whose weights are stacks of three dimensions, in FP8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError, FP8StateError
from ..ops.reference_experts import ACTIVATIONS
from ..scales import PerBlock, PerChannel, PerTensor, Scheme, inf_as_nan
from .autocast import autocast
from .base import StandsForOriginal, own_attributes, shell_of
from .expert_tensors import quantized_stack
from .experts import FP8Experts, Routed
from .fused_layout import FusedLayout, activation_of, as_stored, gated, known_layout, number_of, stack_of, to_out_in
from .weight import asked_by_mover

_DECLARED = "transformers.integrations.moe"


def intermediate(module: Any, rows: torch.Tensor, expert: int) -> torch.Tensor:
    """What goes into the last product of one expert, for rows `[N, hidden]` and a module in high precision."""
    layout, products = known_layout(module), []
    for name in layout.upper:
        weight = to_out_in(module, name, stack_of(module, name))[expert]
        bias = module._parameters[f"{name}_bias"][expert] if layout.has_bias else None
        products.append(F.linear(rows.to(weight.dtype), weight, bias))
    return gated(module, torch.cat(products, dim=-1))


class FP8FusedExperts(StandsForOriginal, FP8Experts):
    """Experts in FP8 in the place of a module of transformers, with its attributes, methods, norm and biases.

    The rows of `gate_up_proj` keep the order that the module's own gate expects, and so do its biases.

    Args:
        origin: the module in high precision, or on meta.
        parts: the names of an expert's weights in checkpoints; none: those have stacks.
        scheme: how they are scaled and computed.

    Attributes:
        origin: the module this one stands for, without its parameters.
        layout: how it keeps its stacks, and how it is called.
        activation: of the operator that computes them, see `ops.experts`; None: they are computed in steps.
    """

    origin: Any
    layout: FusedLayout
    activation: str | None

    def __init__(self, origin: Any, parts: Sequence[str], scheme: Scheme):
        layout = known_layout(origin)
        dtype: torch.dtype = stack_of(origin, layout.down).dtype
        super().__init__(parts, range(number_of(origin)), scheme, dtype, halves=layout.halves)
        self.__dict__.update({name: value for name, value in own_attributes(origin).items() if name not in vars(self)})
        self._buffers, self._modules = dict(origin._buffers), dict(origin._modules)
        self._non_persistent_buffers_set = set(origin._non_persistent_buffers_set)
        self.__dict__ |= {"origin": shell_of(origin), "layout": layout}  # not a submodule
        if layout.holder:
            del self._modules[layout.holder]
            holder = shell_of(origin._modules[layout.holder])
            self.origin._modules = {**origin._modules, layout.holder: holder}
        # Parameters are longer where some experts compute nothing.
        self.__dict__["stored_counts"] = {name: len(stack_of(origin, name)) for name in layout.upper if layout.count}
        self.__dict__["activation"] = _activation_of(origin)
        for name in layout.biases:
            self.register_parameter(name, origin._parameters[name])

    def __getattr__(self, name: str) -> Any:
        layout = self.__dict__.get("layout")
        if layout is not None and layout.holder and name == layout.holder:
            return PartOfExperts(self, name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take a parameter, also one in the part that held it, whose name torch would refuse for its dot."""
        if "." in name and name in self._parameters:
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.stack_names and not asked_by_mover():
            raise FP8NotAvailableError(
                f"{self.name}.{name}: a stack of weights in FP8 cannot be pruned or reparametrized, nor changed by an "
                "adapter (target_parameters of peft): put adapters on the linear layers around the experts, or call "
                "optimum_fp8.dequantize(model) first"
            )
        super().__delattr__(name)

    def quantized(self, name: str, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[E, out, in]` and scales of one of the stacks, given as the module stores it; one expert at a time.

        Raises:
            FP8ScaleError: a weight that has no sound scale.
        """
        return quantized_stack(to_out_in(self, name, stack.detach()), self.halves[name], self.scheme)

    def restored(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module, with the dequantized weights in `dtype` (by default `high_precision`)."""
        self.stack()
        module, dtype = shell_of(self.origin), dtype or self.high_precision
        module.__dict__.update({name: vars(self)[name] for name in own_attributes(module) if name in vars(self)})
        module._buffers, module._modules = self._buffers, self._modules
        holder = module
        if self.layout.holder:
            holder = shell_of(self.origin._modules[self.layout.holder])
            module._modules = {**self._modules, self.layout.holder: holder}
        for name in self.stack_names:
            values = torch.stack([self._dequantized(name, expert, dtype) for expert in self.numbers])
            stored = as_stored(self, name, values, self.stored_counts.get(name, 0))
            holder._parameters[name.rpartition(".")[2]] = nn.Parameter(stored)
        for name in self.layout.biases:
            module._parameters[name] = self._parameters[name]
        return module

    def _dequantized(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One weight of an expert in high precision, `[out, in]`."""
        place = self.stack_names.index(name)
        first = sum(list(self.halves.values())[:place])
        pieces = self.pieces_of(expert)[first : first + self.halves[name]]
        return torch.cat([ops.cast_from_fp8(codes, scale, dtype) for codes, scale in pieces])

    # --- computing ------------------------------------------------------------------------------------------------

    def intermediate(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """What goes into the last product of one expert, unrounded, for rows `[N, hidden]` that are not rounded."""
        products = []
        for name in self.layout.upper:
            bias = self._parameters[f"{name}_bias"][expert] if self.layout.has_bias else None  # type: ignore[index]
            products.append(F.linear(rows, self._dequantized(name, expert, rows.dtype), bias))
        return gated(self, torch.cat(products, dim=-1))

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum over the experts of each token.

        Args:
            hidden_states: `[…, hidden]`.
            top_k_index: `[tokens, k]`, integers: the experts of each token; others than there are contribute nothing,
                or what they are given, where the class says so.
            top_k_weights: `[tokens, k]`, of the router.

        Returns:
            the shape and dtype of what comes in.
        """
        self._check_there(hidden_states)
        x = autocast(hidden_states).reshape(-1, hidden_states.shape[-1])
        if self.is_one_operator:
            result = super().forward(Routed(x, top_k_index, top_k_weights, self.activation or ""))
        else:
            result = self._in_steps(x, top_k_index, top_k_weights)
        if self.layout.identity:
            kept = torch.where(top_k_index >= len(self.numbers), top_k_weights, 0)
            result = result + (x * kept.sum(dim=-1, keepdim=True)).to(result.dtype)
        return result.to(hidden_states.dtype).view(hidden_states.shape)

    @property
    def is_one_operator(self) -> bool:
        """Whether one operator computes all of it, which takes scales by tensors, channels and tokens."""
        plain = isinstance(self.scheme.weight.granularity, (PerTensor, PerChannel))
        return self.activation is not None and plain and self.scheme.input.granularity.group <= 0

    def _check_there(self, x: torch.Tensor) -> None:
        if not self.is_stacked or (self.stacks()[-1].is_meta and not x.is_meta):
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
        products = [self._product(name, rows, experts, scale) for name in self.layout.upper]
        middle = gated(self, torch.cat(products, dim=-1) if len(products) > 1 else products[0])
        middle_scale = self.scheme.dynamic_scale(middle) if self.scheme.is_dynamic else self.intermediate_scale
        output = self._product(self.layout.down, middle, experts, middle_scale)
        return self.post_expert_norm(output) if self.layout.has_post_expert_norm else output

    def _product(
        self, name: str, rows: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        parameters: dict[str, Any] = self._parameters
        try:
            return ops.grouped_linear(
                inf_as_nan(rows) if self.scheme.is_dynamic else rows,
                experts,
                parameters[name],
                self._scale_for_operator(name),
                scale,
                parameters[f"{name}_bias"] if self.layout.has_bias else None,
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

    def _scale_for_operator(self, name: str) -> torch.Tensor:
        """The scale of a stack. Two blocks below each other, which the operator would read as halves, go by outputs."""
        scale, granularity = self._parameters[f"{name}_scale"], self.scheme.weight.granularity
        assert scale is not None
        if isinstance(granularity, PerBlock) and scale.shape[1:] == (2, 1):
            out = self._parameters[name].shape[1]  # type: ignore[union-attr]
            return scale.repeat_interleave(granularity.rows, dim=1)[:, :out]
        return scale

    def extra_repr(self) -> str:
        way = f"one operator, {self.activation}" if self.is_one_operator else "in steps"
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


class FP8SizedExperts(FP8FusedExperts):
    """One product with the weights of experts, called with rows that are sorted by expert."""

    @property
    def static_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"input_scale": (1,)}

    def forward(self, inputs: torch.Tensor, expert_size: Sequence[int]) -> torch.Tensor:  # type: ignore[override]
        """What each expert makes of its rows.

        Args:
            inputs: `[rows, in]`, those of the first expert first.
            expert_size: how many rows belong to each.

        Returns:
            `[rows, out]`, in the dtype of what comes in.
        """
        self._check_there(inputs)
        x = autocast(inputs)
        sizes = torch.as_tensor(expert_size, device=x.device)
        experts = torch.arange(len(self.numbers), device=x.device).repeat_interleave(sizes)
        scale = self.scheme.dynamic_scale(x) if self.scheme.is_dynamic else self.input_scale
        return self._product(self.layout.down, x, experts, scale).to(inputs.dtype)


class PartOfExperts(nn.Module):
    """What stands for the part of a module that held its stacks, for code that brings parameters by their names."""

    experts: FP8FusedExperts
    prefix: str

    def __init__(self, experts: FP8FusedExperts, name: str):
        super().__init__()
        self.__dict__ |= {"experts": experts, "prefix": f"{name}."}
        mine = experts._parameters.items()
        self.__dict__["_parameters"] = {
            key[len(self.prefix) :]: each for key, each in mine if key.startswith(self.prefix)
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if f"{self.prefix}{name}" in self.experts._parameters:
            self.experts._parameters[f"{self.prefix}{name}"] = value
        super().__setattr__(name, value)


_CALLED = {"routed": FP8FusedExperts, "sorted": FP8SortedExperts, "sized": FP8SizedExperts}


def fp8_experts(origin: Any, parts: Sequence[str], scheme: Scheme) -> FP8FusedExperts:
    """The FP8 module for the place of one in high precision."""
    return _CALLED[known_layout(origin).called](origin, parts, scheme)


def _activation_of(origin: Any) -> str | None:
    """The activation with which one operator computes what a module does; None: there is none that does."""
    layout = known_layout(origin)
    if layout.called != "routed" or layout.upper != ("gate_up_proj",) or not layout.is_concatenated:
        return None
    gate: Callable[..., Any] | None = getattr(type(origin), "_apply_gate", None)
    own_gate = gate is not None and gate.__globals__.get("__name__") != _DECLARED  # type: ignore[attr-defined]
    if own_gate or layout.has_bias or layout.has_post_expert_norm:
        return None
    act = activation_of(origin)
    if list(getattr(act, "parameters", list)()):
        return None
    values = torch.linspace(-8, 8, 257, device="cpu")
    with torch.no_grad():
        found = act(values)
        return next((name for name, known in ACTIVATIONS.items() if torch.equal(known(values), found)), None)
