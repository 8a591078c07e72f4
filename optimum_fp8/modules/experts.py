"""FP8Experts: the weights of several experts in FP8, in two stacks, with the scales of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..errors import FP8CheckpointError, FP8StateError
from ..formats import NumberFormat, codes_beyond, is_fp8, not_finite
from ..scales import WEIGHT_ONLY, Scheme, inf_as_nan, scale_shape, unsound
from .autocast import autocast
from .linear import FP8Linear
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

    Its state dict has the weights one by one, as `3.w1.weight` with `3.w1.weight_scale`, as FP8 layers have theirs; or
    the stacks, as `gate_up_proj` `[1, E, out, in]` with `gate_up_proj_scale`.

    Args:
        parts: the names of an expert's weights there: gate and up, or one that is both, then down; none: the stacks.
        numbers: those of the experts in the whole model.
        scheme: how they are scaled and computed.
        high_precision: the dtype the weights had.
        upper: the name of the stack that comes first.
        halves: how many weights with scales of their own lie below each other in it; None: as `parts` say.

    Attributes:
        gate_up_proj: `[E, 2 · inner, hidden]`, FP8, frozen: of each expert the gate above the up projection; `upper`
            says its name.
        gate_up_proj_scale: float32, `(E, 1, 1)`, `(E, 2, 1)` or `(E, 2 · inner, 1)`.
        down_proj: `[E, hidden, inner]`, FP8, frozen.
        down_proj_scale: float32, `(E, 1, 1)` or `(E, hidden, 1)`.
        input_scale: float32 `(1,)`, or None where activations are not static.
        intermediate_scale: float32 `(E, 1, 1)`, or None where activations are not static.
        record: the calls of its operators.
        name: of the module around it, for messages.
    """

    down_proj: nn.Parameter
    down_proj_scale: nn.Parameter
    input_scale: nn.Parameter | None
    intermediate_scale: nn.Parameter | None

    def __init__(
        self,
        parts: Sequence[str],
        numbers: range,
        scheme: Scheme,
        high_precision: torch.dtype,
        *,
        upper: str = "gate_up_proj",
        halves: int | None = None,
    ):
        super().__init__()
        self.parts, self.numbers, self.scheme, self.high_precision = tuple(parts), numbers, scheme, high_precision
        self.upper, self.halves = upper, len(parts) - 1 if halves is None else halves
        self.record, self.name = ops.CallRecord(), ""
        for name in SCALES:
            self.register_parameter(name, None)

    @property
    def stack_names(self) -> tuple[str, str]:
        """The names of the parameters that hold codes."""
        return self.upper, "down_proj"

    @property
    def is_stacked(self) -> bool:
        """Whether the codes are here as they are computed with, and not still to come from a checkpoint."""
        down = self._parameters.get("down_proj")
        return down is not None and down.ndim == 3 and is_fp8(down.dtype)

    def set_weights(
        self, upper: torch.Tensor, upper_scale: torch.Tensor, down: torch.Tensor, down_scale: torch.Tensor
    ) -> None:
        """Take stacked codes and their float32 scales."""
        for name, codes, scale in zip(self.stack_names, (upper, down), (upper_scale, down_scale), strict=True):
            self.register_parameter(name, frozen(codes))
            self.register_parameter(f"{name}_scale", frozen(scale))
        self._watch()

    def set_scheme(self, scheme: Scheme, scales: Mapping[str, torch.Tensor]) -> None:
        """Compute by `scheme` from now on, with the static scales of `SCALES` or none, and count calls anew."""
        self.scheme, self.record = scheme, ops.CallRecord()
        self.set_activation_scales(scales)
        self._watch()

    def set_activation_scales(self, scales: Mapping[str, torch.Tensor]) -> None:
        """Take the static scales of `SCALES`; none: activations are scaled by their own range, or not rounded."""
        device = next(self.parameters()).device
        for name in SCALES:
            self.register_parameter(name, frozen(scales[name].to(device)) if name in scales else None)

    def _watch(self) -> None:
        self.record.watch(self.stacks()[0])

    # --- coming from a checkpoint -----------------------------------------------------------------------------------

    def expect(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Make room for codes that a checkpoint is about to bring: layers, or the stacks as they are stored.

        Args:
            shapes: `(out, in)` of each of the parts; of the two matrices in the stacks, where there are no parts.
        """
        scheme = replace(self.scheme, activations=WEIGHT_ONLY)
        for number in self.numbers if self.parts else ():
            layers = {}
            for part, (out, size) in zip(self.parts, shapes, strict=True):
                origin = nn.Linear(size, out, bias=False, device="meta", dtype=self.high_precision)
                layers[part] = FP8Linear(origin, scheme)
                layers[part].name = f"{self.name}.{number}.{part}"
            self.add_module(str(number), nn.ModuleDict(layers))
        if not self.parts:
            self.expect_stacks(shapes, scheme.fmt.dtype, stored=True)
        if self.scheme.is_static:
            for name, shape in zip(SCALES, ((1,), (len(self.numbers), 1, 1)), strict=True):
                self.register_parameter(name, frozen(torch.full(shape, torch.nan, dtype=torch.float32, device="meta")))

    def expect_stacks(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, *, stored: bool = False) -> None:
        """Make room for both stacks, in `dtype`, and their scales; `stored`: as they are on disk."""
        for name, shape, pieces in zip(self.stack_names, shapes, (self.halves, 1), strict=True):
            stack = torch.empty((len(self.numbers), *shape), dtype=dtype, device="meta")
            rows = sum(scale_shape((shape[0] // pieces, shape[1]), self.scheme.weight)[0] for _ in range(pieces))
            scale = torch.full((len(self.numbers), rows, 1), torch.nan, dtype=torch.float32, device="meta")
            self.register_parameter(name, frozen(stored_weight(stack) if stored else stack))
            self.register_parameter(f"{name}_scale", frozen(scale))

    def stack(self) -> None:
        """Take the codes that a checkpoint has brought into the form that is computed with.

        Raises:
            FP8CheckpointError: stacks that are no FP8 codes, or that hold NaN or Inf.
        """
        if self.is_stacked:
            return
        if not self.parts:
            codes = [self._brought(name) for name in self.stack_names]
            scales = [self._parameters[f"{name}_scale"] for name in self.stack_names]
            self.set_weights(codes[0], scales[0], codes[1], scales[1])  # type: ignore[arg-type]
            return
        layers = [[self.get_submodule(f"{number}.{part}") for part in self.parts] for number in self.numbers]
        for number in self.numbers:
            del self._modules[str(number)]
        stacks = [
            stacked([[(layer.codes, layer.weight_scale) for layer in expert] for expert in experts])  # type: ignore[misc]
            for experts in ([expert[:-1] for expert in layers], [expert[-1:] for expert in layers])
        ]
        self.set_weights(*stacks[0], *stacks[1])

    def _brought(self, name: str) -> torch.Tensor:
        codes: Any = self._parameters[name]
        if codes.dtype != self.scheme.fmt.dtype or codes.ndim != 4 or not_finite(codes):
            found = f"{codes.dtype}, {tuple(codes.shape)}"
            wrong = "codes that are NaN or Inf" if codes.dtype == self.scheme.fmt.dtype and codes.ndim == 4 else found
            raise FP8CheckpointError(
                f"{self.name}.{name}: found {wrong}, expected codes [1, experts, out, in] in {self.scheme.fmt.dtype}: "
                "the checkpoint is damaged, copy it again"
            )
        return codes.squeeze(0)

    # --- computing ------------------------------------------------------------------------------------------------

    def forward(self, call: Routed) -> torch.Tensor:
        """The sum over the experts of each token, `[tokens, hidden]` in the dtype of what comes in."""
        scheme, x = self.scheme, autocast(call.hidden)
        weights, scales = self.stacks(), (*self.stack_scales(), self.intermediate_scale)
        experts_min = self.numbers.start
        if call.experts is not None and call.experts != self.numbers:
            start, stop = (number - self.numbers.start for number in (call.experts.start, call.experts.stop))
            self._check_part(call.experts)
            weights, experts_min = (weights[0][start:stop], weights[1][start:stop]), call.experts.start
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
        """Have the backend in use know the scales that are constants."""
        packing = ops.packing_for(self.down_proj.device)
        if packing is not None and packing.constants:
            if self.input_scale is not None:
                ops.keep_inverse(self.input_scale)
            for scale in self.scales().values() if self.scheme.constant_scales else ():
                ops.mark_constants(scale, self.scheme.fmt.hardware_scales)

    # --- state ----------------------------------------------------------------------------------------------------

    def scales(self) -> dict[str, torch.Tensor]:
        """The scales that are there, by name."""
        return {name: scale for name, scale in self.held().items() if name.endswith("_scale")}

    def held(self) -> dict[str, torch.Tensor]:
        """The stacks and scales, by name."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is held, by the names in a state dict: codes and scales one by one, as parts of the stacks."""
        if not self.parts:
            return self.held()
        found: dict[str, torch.Tensor] = {}
        for name, codes, scale in self.weights():
            found |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        stacked = {*self.stack_names, *(f"{name}_scale" for name in self.stack_names)}
        return found | {name: tensor for name, tensor in self.held().items() if name not in stacked}

    def reported(self) -> dict[str, torch.Tensor]:
        """The scales by name, and those of all weights together as `weight_scale`."""
        return self.scales() | {"weight_scale": torch.cat([scale.flatten() for scale in self.stack_scales()])}

    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both stacks of codes, `[E, out, in]`."""
        return self._parameters[self.upper], self.down_proj  # type: ignore[return-value]

    def stack_scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Their scales."""
        return self._parameters[f"{self.upper}_scale"], self.down_proj_scale  # type: ignore[return-value]

    def pieces(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Of each expert the weights that have scales of their own, the last of them its down projection: codes
        `[out, in]` and scale, `(1,)` or `(out, 1)`, as parts of the stacks."""
        (upper, down), (upper_scale, down_scale) = self.stacks(), self.stack_scales()
        for place in range(len(self.numbers)):
            above = zip(upper[place].chunk(self.halves), upper_scale[place].chunk(self.halves), strict=True)
            pairs = [*above, (down[place], down_scale[place])]
            yield [(codes, scale.reshape(1) if scale.numel() == 1 else scale) for codes, scale in pairs]

    def set_pieces(self, experts: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """Take what `pieces` gives of all experts."""
        above, below = stacked([pieces[:-1] for pieces in experts]), stacked([pieces[-1:] for pieces in experts])
        self.set_weights(*above, *below)

    def weights(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The name of each weight, as `3.w1`, its codes `[out, in]`, and its scale, `(1,)` or `(out, 1)`."""
        if not self.is_stacked:
            for number in self.numbers:
                for part in self.parts:
                    layer: Any = self.get_submodule(f"{number}.{part}")
                    yield f"{number}.{part}", layer.codes, layer.weight_scale
            return
        for number, pieces in zip(self.numbers, self.pieces(), strict=True):
            for part, (codes, scale) in zip(self.parts, pieces, strict=True):
                yield f"{number}.{part}", codes, scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Experts:
        """Moves go through; casts do not, as of FP8 layers."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            keep = is_fp8(tensor.dtype) or any(tensor is scale for scale in self.scales().values())
            if is_fp8(tensor.dtype) and applied.dtype != tensor.dtype:
                self.high_precision = applied.dtype
            return tensor.to(applied.device) if keep and applied.dtype != tensor.dtype else applied

        super()._apply(keep_dtype, recurse)
        if self.is_stacked:
            self._watch()
            self.pack()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.is_stacked:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in self.tensors().items():
            kept = tensor if keep_vars else tensor.detach()
            destination[f"{prefix}{name}"] = stored_weight(kept) if is_fp8(kept.dtype) else kept

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
        others = tuple(f"{prefix}{name}." for name in self._modules)
        mine = [name for name in state_dict if name.startswith(prefix) and not (others and name.startswith(others))]
        given = {name: state_dict[name] for name in mine}
        missing_keys += [name for name in own if name not in given]
        unexpected_keys += [name for name in given if name not in own] if strict else []
        taken = {name: tensor for name, tensor in given.items() if name in own}
        wrong = [text for name, tensor in taken.items() if (text := _misfit(name, tensor, own[name], self.scheme.fmt))]
        error_msgs += wrong
        with torch.no_grad():
            for name, tensor in {} if wrong else taken.items():  # type: ignore[attr-defined]
                _bytes(own[name]).copy_(_bytes(tensor).reshape(own[name].shape))
        self.pack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_stacked:
            self._watch()  # a copy counts its own calls
            self.pack()

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


def _misfit(name: str, tensor: torch.Tensor, own: torch.Tensor, fmt: NumberFormat) -> str | None:
    """Why a tensor of a state dict cannot be taken, or None."""
    stored = stored_weight(own) if is_fp8(own.dtype) else own
    exact = is_fp8(own.dtype) or name.endswith("_scale")
    if (exact and tensor.dtype != own.dtype) or tensor.shape not in (stored.shape, own.shape):
        expected, found = (f"{tuple(each.shape)} in {each.dtype}" for each in (stored, tensor))
        return f"{name} is {found}, expected {expected}"
    if is_fp8(own.dtype):
        if not_finite(tensor):
            return f"{name} holds codes that are NaN or Inf: it is damaged"
        wrong = codes_beyond(tensor, fmt)
        return f"{name} {wrong}: it was made for another target" if wrong else None
    wrong = unsound(tensor) if name.endswith("_scale") else None
    return f"{name} {wrong}" if wrong else None


def refuse_codes_beyond(name: str, experts: FP8Experts, fmt: NumberFormat) -> None:
    """Refuse codes that a number format reads as Inf.

    Raises:
        FP8CheckpointError: names the module and the largest code.
    """
    for codes in experts.stacks():
        if wrong := codes_beyond(codes, fmt):
            raise FP8CheckpointError(
                f"{name} {wrong}: the checkpoint was not made for it; pass the target when loading instead of changing "
                "the checkpoint's configuration"
            )
