"""FP8Experts: the weights of several experts in FP8, in two stacks, with the scales of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..errors import FP8StateError
from ..formats import is_fp8, not_finite
from ..scales import Scheme, inf_as_nan, unsound
from .autocast import autocast
from .weight import frozen, stored_weight

SCALES = ("input_scale", "intermediate_scale")


class Routed(NamedTuple):
    """What a mixture of experts is called with.

    Attributes:
        hidden: `[tokens, hidden]`.
        table: `[tokens, k]`, the experts of each token, by their numbers in the whole model.
        weights: `[tokens, k]`, of the router.
        activation: as of `ops.experts`.
        experts: the numbers of the experts that are asked; None: all that are here.
    """

    hidden: torch.Tensor
    table: torch.Tensor
    weights: torch.Tensor
    activation: str = "silu"
    experts: range | None = None


class FP8Experts(nn.Module):
    """The experts of one mixture, in FP8.

    Its state dict has the weights one by one, as `3.w1.weight` with `3.w1.weight_scale`, as FP8 layers have theirs.

    Args:
        parts: the names of an expert's weights there: gate and up, or one that is both, then down.
        numbers: those of the experts in the whole model.
        scheme: how they are scaled and computed.
        high_precision: the dtype the weights had.

    Attributes:
        gate_up_proj: `[E, 2 · inner, hidden]`, FP8, frozen: of each expert the gate above the up projection.
        gate_up_proj_scale: float32, `(E, 1, 1)`, `(E, 2, 1)` or `(E, 2 · inner, 1)`.
        down_proj: `[E, hidden, inner]`, FP8, frozen.
        down_proj_scale: float32, `(E, 1, 1)` or `(E, hidden, 1)`.
        input_scale: float32 `(1,)`, or None where activations are not static.
        intermediate_scale: float32 `(E, 1, 1)`, or None where activations are not static.
        record: the calls of its operators.
        name: of the module around it, for messages.
    """

    gate_up_proj: nn.Parameter
    gate_up_proj_scale: nn.Parameter
    down_proj: nn.Parameter
    down_proj_scale: nn.Parameter
    input_scale: nn.Parameter | None
    intermediate_scale: nn.Parameter | None

    def __init__(self, parts: Sequence[str], numbers: range, scheme: Scheme, high_precision: torch.dtype):
        super().__init__()
        self.parts, self.numbers, self.scheme, self.high_precision = tuple(parts), numbers, scheme, high_precision
        self.record, self.name = ops.CallRecord(), ""
        for name in SCALES:
            self.register_parameter(name, None)

    @property
    def is_stacked(self) -> bool:
        """Whether the weights are here, and not one by one in layers that a checkpoint is about to fill."""
        return "down_proj" in self._parameters

    def set_weights(
        self, gate_up: torch.Tensor, gate_up_scale: torch.Tensor, down: torch.Tensor, down_scale: torch.Tensor
    ) -> None:
        """Take stacked codes and their float32 scales."""
        self.gate_up_proj, self.gate_up_proj_scale = frozen(gate_up), frozen(gate_up_scale)
        self.down_proj, self.down_proj_scale = frozen(down), frozen(down_scale)
        self.record.watch(self.gate_up_proj)

    def set_activation_scales(self, scales: dict[str, torch.Tensor]) -> None:
        """Take the static scales of `SCALES`; none: activations are scaled by their own range, or not rounded."""
        device = next(self.parameters()).device
        for name in SCALES:
            self.register_parameter(name, frozen(scales[name].to(device)) if name in scales else None)

    def stack(self) -> None:
        """Take the weights out of the layers that a checkpoint has filled."""
        if self.is_stacked:
            return
        layers = [[self.get_submodule(f"{number}.{part}") for part in self.parts] for number in self.numbers]
        self._modules.clear()
        stacks = [
            stacked([[(layer.codes, layer.weight_scale) for layer in expert] for expert in experts])  # type: ignore[misc]
            for experts in ([expert[:-1] for expert in layers], [expert[-1:] for expert in layers])
        ]
        self.set_weights(*stacks[0], *stacks[1])

    # --- computing ------------------------------------------------------------------------------------------------

    def forward(self, call: Routed) -> torch.Tensor:
        """The sum over the experts of each token, `[tokens, hidden]` in the dtype of what comes in."""
        scheme, x = self.scheme, autocast(call.hidden)
        weights = (self.gate_up_proj, self.down_proj)
        scales = (self.gate_up_proj_scale, self.down_proj_scale, self.intermediate_scale)
        experts_min = self.numbers.start
        if call.experts is not None and call.experts != self.numbers:
            start, stop = (number - self.numbers.start for number in (call.experts.start, call.experts.stop))
            self._check_part(call.experts)
            weights, experts_min = (weights[0][start:stop], weights[1][start:stop]), call.experts.start  # type: ignore[assignment]
            scales = tuple(None if scale is None else ops.part_of(scale, start, stop) for scale in scales)  # type: ignore[assignment]
        return ops.experts(
            inf_as_nan(x) if scheme.is_dynamic else x,
            call.table,
            call.weights,
            *weights,
            *scales[:2],
            scheme.dynamic_scale(x) if scheme.is_dynamic else self.input_scale,
            scales[2],
            activation=call.activation,
            experts_min=experts_min,
            full_scale=scheme.fmt.full_scale,
            arithmetic=scheme.arithmetic,
            record=self.record,
        )

    def _check_part(self, experts: range) -> None:
        if not (self.numbers.start <= experts.start < experts.stop <= self.numbers.stop):
            raise FP8StateError(
                f"{self.name}: experts {experts.start} to {experts.stop - 1} were asked, and those here are "
                f"{self.numbers.start} to {self.numbers.stop - 1}"
            )

    def pack(self) -> None:
        """Have the backend in use know the scales that are constants, as numbers."""
        packing = ops.packing_for(self.down_proj.device)
        if packing is not None and packing.constants and self.scheme.constant_scales:
            for scale in self.scales().values():
                ops.mark_constants(scale, self.scheme.fmt.hardware_scales)

    # --- state ----------------------------------------------------------------------------------------------------

    def scales(self) -> dict[str, torch.Tensor]:
        """The scales that are there, by name."""
        return {name: scale for name, scale in self.held().items() if name.endswith("_scale")}

    def held(self) -> dict[str, torch.Tensor]:
        """The stacks and scales, by name."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes `[out, in]` and scales by their names in a state dict, as parts of the stacks."""
        found: dict[str, torch.Tensor] = {}
        for name, codes, scale in self.weights():
            found |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        return found | {name: scale for name, scale in self.held().items() if name in SCALES}

    def weights(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The name of each weight, as `3.w1`, its codes `[out, in]`, and its scale, `(1,)` or `(out, 1)`."""
        for place, number in enumerate(self.numbers):
            if not self.is_stacked:
                for part in self.parts:
                    layer: Any = self.get_submodule(f"{number}.{part}")
                    yield f"{number}.{part}", layer.codes, layer.weight_scale
                continue
            above = self.parts[:-1]
            codes = (*self.gate_up_proj[place].chunk(len(above)), self.down_proj[place])
            scales = (*self.gate_up_proj_scale[place].chunk(len(above)), self.down_proj_scale[place])
            for part, each, scale in zip(self.parts, codes, scales, strict=True):
                yield f"{number}.{part}", each, scale.reshape(1) if scale.numel() == 1 else scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Experts:
        """Moves go through; casts do not, as of FP8 layers."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            if is_fp8(tensor.dtype) and applied.dtype != tensor.dtype:
                self.high_precision = applied.dtype
            return tensor.to(applied.device) if applied.dtype != tensor.dtype else applied

        super()._apply(keep_dtype, recurse)
        if self.is_stacked:
            self.record.watch(self.gate_up_proj)
            self.pack()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_stacked:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in self.tensors().items():
            kept = tensor if keep_vars else tensor.detach()
            destination[f"{prefix}{name}"] = stored_weight(kept) if name.endswith(".weight") else kept

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Only FP8 codes with sound scales are taken, into the stacks."""
        if not self.is_stacked:
            arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            return
        own = {f"{prefix}{name}": tensor for name, tensor in self.tensors().items()}
        given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        missing_keys += [name for name in own if name not in given]
        unexpected_keys += [name for name in given if name not in own] if strict else []
        taken = {name: tensor for name, tensor in given.items() if name in own}
        wrong = [text for name, tensor in taken.items() if (text := _misfit(name, tensor, own[name]))]
        error_msgs += wrong
        with torch.no_grad():
            for name, tensor in {} if wrong else taken.items():  # type: ignore[attr-defined]
                _bytes(own[name]).copy_(_bytes(tensor).reshape(own[name].shape))
        self.pack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_stacked:
            self.record.watch(self.gate_up_proj)  # a copy counts its own calls

    def extra_repr(self) -> str:
        fmt = self.scheme.fmt
        return f"{len(self.numbers)} experts, {fmt.name} on {fmt.target}, activations {self.scheme.activations}"


def stacked(experts: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One stack of what several experts have: of each one or two weights, which come below each other.

    Args:
        experts: codes `[out, in]` and scale, `(1,)` or `(out, 1)`, of each weight of each expert.

    Returns:
        codes `[E, outs, in]`, and their scale `(E, 1, 1)`, `(E, 2, 1)` or `(E, outs, 1)`.
    """
    codes = torch.stack([torch.cat([_bytes(each) for each, _ in expert]) for expert in experts])
    scales = torch.stack([torch.cat([scale.reshape(-1, 1) for _, scale in expert]) for expert in experts])
    return codes.view(experts[0][0][0].dtype), scales


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 codes as bytes, as not every device has every operator for FP8; others as they are."""
    return tensor.view(torch.uint8) if is_fp8(tensor.dtype) else tensor


def _misfit(name: str, tensor: torch.Tensor, own: torch.Tensor) -> str | None:
    """Why a tensor of a state dict cannot be taken, or None."""
    stored = stored_weight(own) if name.endswith(".weight") else own
    if tensor.dtype != own.dtype or tensor.shape not in (stored.shape, own.shape):
        expected, found = (f"{tuple(each.shape)} in {each.dtype}" for each in (stored, tensor))
        return f"{name} is {found}, expected {expected}"
    if is_fp8(own.dtype):
        return f"{name} holds codes that are NaN or Inf: it is damaged" if not_finite(tensor) else None
    wrong = unsound(tensor)
    return f"{name} {wrong}" if wrong else None
