"""FP8Experts: the weights of several experts in FP8, in two stacks, with the scales of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..errors import FP8CheckpointError, FP8StateError
from ..formats import is_fp8, not_finite
from ..scales import WEIGHT_ONLY, Scheme, scale_shape
from .autocast import autocast
from .expert_tensors import as_bytes, misfit, stacked
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
        halves: the names of the stacks, and how many weights with scales of their own lie below each other in a matrix
            of each, that of the down projections last; None: two stacks, as `parts` say.

    Attributes:
        gate_up_proj: `[E, 2 · inner, hidden]`, FP8, frozen: of each expert the gate above the up projection; `halves`
            says the names of the stacks.
        gate_up_proj_scale: float32, `(E, 1, 1)`, `(E, 2, 1)`, `(E, 2 · inner, 1)`, or by blocks of each matrix.
        down_proj: `[E, hidden, inner]`, FP8, frozen.
        down_proj_scale: float32, `(E, 1, 1)`, `(E, hidden, 1)`, or by blocks of each matrix.
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
        halves: Mapping[str, int] | None = None,
    ):
        super().__init__()
        self.parts, self.numbers, self.scheme, self.high_precision = tuple(parts), numbers, scheme, high_precision
        self.halves = dict(halves or {"gate_up_proj": len(parts) - 1, "down_proj": 1})
        self.record, self.name = ops.CallRecord(), ""
        for name in SCALES:
            self.register_parameter(name, None)

    @property
    def static_shapes(self) -> dict[str, tuple[int, ...]]:
        """The static scales that there may be, and their shapes."""
        return dict(zip(SCALES, ((1,), (len(self.numbers), 1, 1)), strict=True))

    @property
    def stack_names(self) -> tuple[str, ...]:
        """The names of the parameters that hold codes, that of the down projections last."""
        return tuple(self.halves)

    @property
    def is_stacked(self) -> bool:
        """Whether the codes are here as they are computed with, and not still to come from a checkpoint."""
        down = self._parameters.get(self.stack_names[-1])
        return down is not None and down.ndim == 3 and is_fp8(down.dtype)

    def set_weights(self, *tensors: torch.Tensor) -> None:
        """Take codes and float32 scale of each stack."""
        for name, codes, scale in zip(self.stack_names, tensors[::2], tensors[1::2], strict=True):
            self._parameters[name], self._parameters[f"{name}_scale"] = frozen(codes), frozen(scale)
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
            shapes: `(out, in)` of each of the parts; of the matrices in each stack, where there are no parts.
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
            for name, shape in self.static_shapes.items():
                self.register_parameter(name, frozen(torch.full(shape, torch.nan, dtype=torch.float32, device="meta")))

    def expect_stacks(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, *, stored: bool = False) -> None:
        """Make room for the stacks, in `dtype`, and their scales; `stored`: as they are on disk."""
        for (name, pieces), shape in zip(self.halves.items(), shapes, strict=True):
            stack = torch.empty((len(self.numbers), *shape), dtype=dtype, device="meta")
            rows, *columns = scale_shape((shape[0] // pieces, shape[1]), self.scheme.weight)
            size = len(self.numbers), rows * pieces, *(columns or [1])
            scale = torch.full(size, torch.nan, dtype=torch.float32, device="meta")
            self._parameters[name] = frozen(stored_weight(stack) if stored else stack)
            self._parameters[f"{name}_scale"] = frozen(scale)

    def stack(self) -> None:
        """Take the codes that a checkpoint has brought into the form that is computed with.

        Raises:
            FP8CheckpointError: stacks that are no FP8 codes, or that hold NaN or Inf.
        """
        if self.is_stacked:
            return
        if not self.parts:
            pairs = zip(map(self._brought, self.stack_names), self.stack_scales(), strict=True)
            self.set_weights(*(tensor for pair in pairs for tensor in pair))
            return
        layers = [[self.get_submodule(f"{number}.{part}") for part in self.parts] for number in self.numbers]
        for number in self.numbers:
            del self._modules[str(number)]
        self.set_pieces([[(layer.codes, layer.weight_scale) for layer in expert] for expert in layers])  # type: ignore[misc]

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
        weights, scales = self.stacks(), self.stack_scales()
        middle_scale: torch.Tensor | None = self.intermediate_scale
        experts_min = self.numbers.start
        if call.experts is not None and call.experts != self.numbers:
            start, stop = (number - self.numbers.start for number in (call.experts.start, call.experts.stop))
            self._check_part(call.experts)
            weights, experts_min = tuple(stack[start:stop] for stack in weights), call.experts.start
            scales = tuple(ops.part_of(scale, start, stop) for scale in scales)
            middle_scale = None if middle_scale is None else ops.part_of(middle_scale, start, stop)
        return ops.experts(
            x,
            call.table,
            call.weights,
            weights[0],
            weights[1],
            scales[0],
            scales[1],
            scheme.dynamic() or self.input_scale,
            middle_scale,
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
        packing = ops.packing_for(self.stacks()[-1].device)
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

    def stacks(self) -> tuple[torch.Tensor, ...]:
        """The stacks of codes, `[E, out, in]`, that of the down projections last."""
        return tuple(self._parameters[name] for name in self.stack_names)  # type: ignore[misc]

    def stack_scales(self) -> tuple[torch.Tensor, ...]:
        """Their scales."""
        return tuple(self._parameters[f"{name}_scale"] for name in self.stack_names)  # type: ignore[misc]

    def pieces(self) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Of each expert the weights that have scales of their own, the last of them its down projection: codes
        `[out, in]` and scale, `(1,)`, `(out, 1)` or by blocks, as parts of the stacks."""
        yield from map(self.pieces_of, range(len(self.numbers)))

    def pieces_of(self, place: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Those of one expert."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for stack, scales, count in zip(self.stacks(), self.stack_scales(), self.halves.values(), strict=True):
            pairs += zip(stack[place].chunk(count), scales[place].chunk(count), strict=True)
        return [(codes, scale.reshape(scale_shape(codes.shape, self.scheme.weight))) for codes, scale in pairs]

    def set_pieces(self, experts: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """Take what `pieces` gives of all experts."""
        tensors: list[torch.Tensor] = []
        first = 0
        for count in self.halves.values():
            tensors += stacked([pieces[first : first + count] for pieces in experts])
            first += count
        self.set_weights(*tensors)

    def weights(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """The name of each weight, as `3.w1`, its codes `[out, in]`, and its scale."""
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
        wrong = [text for name, tensor in taken.items() if (text := misfit(name, tensor, own[name], self.scheme.fmt))]
        error_msgs += wrong
        with torch.no_grad():
            for name, tensor in {} if wrong else taken.items():  # type: ignore[attr-defined]
                as_bytes(own[name]).copy_(as_bytes(tensor).reshape(own[name].shape))
        self.pack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.is_stacked:
            self._watch()  # a copy counts its own calls
            self.pack()

    def extra_repr(self) -> str:
        fmt = self.scheme.fmt
        return f"{len(self.numbers)} experts, {fmt.name} on {fmt.target}, activations {self.scheme.activations}"
