"""FakeQuant: what the fake quantization of one module does while it is trained, and remembers from step to step.

Values are rounded to FP8 and back, and gradients pass straight through the rounding: unchanged where a value is within
the range of its scale, zero where it saturates. What is remembered lies in buffers, so that a checkpoint of the
training holds it: the ranges of inputs in the last steps, how many steps there were, and scales that are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..errors import FP8ScaleError
from ..ops.operands import broadcast_scale
from ..scales import PerTensor, Scheme, inf_as_nan, scale_shape
from .quantized_once import codes_and_scale

_UNSEEN = -1.0  # in the place of a range of a step in which nothing was seen


class _StraightThrough(torch.autograd.Function):
    """codes · scale in the dtype of `x`; the gradient is that of the identity, and zero where `x` saturates."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, full_scale: float) -> torch.Tensor:
        inverse = broadcast_scale(scale, x).float().reciprocal()
        ctx.save_for_backward((x.float() * inverse).abs() <= full_scale)
        return ops.cast_from_fp8(codes, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (within,) = ctx.saved_tensors
        return gradient * within, None, None, None


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, full_scale: float) -> torch.Tensor:
    """`x` rounded to FP8 and back, with a straight-through gradient.

    Args:
        x: any shape, in high precision.
        scale: float32, of a shape that operators take for `x`.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        full_scale: the value at which `x / scale` saturates.

    Returns:
        codes · scale, of the shape and dtype of `x`. Its gradient goes to `x` where |x / scale| <= `full_scale`.
    """
    codes = ops.cast_to_fp8(x.detach(), scale, dtype, full_scale)
    return _StraightThrough.apply(x, codes, scale, full_scale)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Delay:
    """From when on, and until when, scales follow from what is seen.

    Attributes:
        history: over how many steps the range of an input is taken; 1: that of the very tensor.
        freeze_at: after how many steps scales stay as they are; None: never.
    """

    history: int = 1
    freeze_at: int | None = None


class FakeQuant(nn.Module):
    """The fake quantization of one module.

    Args:
        name: of the module in its model, for messages.
        scheme: how it is scaled.
        delay: from when on, and until when, scales follow from what is seen.
        inputs: kinds of tensors that are rounded with static scales, as measurements call them.
        weights: the shapes of the weights, `[out, in, …]`, by parameter name.
        rows_are_tokens: whether the last dimension of an input is its features.

    Attributes:
        step: int64 scalar, how many steps there were; none where nothing depends on it.
        amax_history: float32 `(history + 1, inputs)`: max|x| of the current step, then of those before, the last
            first; -1 where there is none. None where activations have no static scales that follow from ranges.
    """

    step: torch.Tensor | None
    amax_history: torch.Tensor | None

    def __init__(
        self,
        name: str,
        scheme: Scheme,
        delay: Delay,
        inputs: Iterable[str],
        weights: Mapping[str, torch.Size],
        device: torch.device,
        rows_are_tokens: bool = True,
    ):
        super().__init__()
        self.name, self.scheme, self.delay = name, scheme, delay
        self.inputs = {kind: column for column, kind in enumerate(inputs)} if scheme.needs_ranges else {}
        self.input_rule = scheme.input if rows_are_tokens else replace(scheme.input, granularity=PerTensor())
        self.used, self._steps = False, 0
        frozen = weights if delay.freeze_at is not None else {}
        history = torch.full((delay.history + 1, len(self.inputs)), _UNSEEN, device=device, dtype=torch.float32)
        remembers = bool(self.inputs or frozen)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device) if remembers else None)
        self.register_buffer("amax_history", history if self.inputs else None)
        for weight, shape in frozen.items():
            unset = torch.full(scale_shape(shape, scheme.weight), torch.nan, device=device, dtype=torch.float32)
            self.register_buffer(_buffer_of(weight), unset)

    # --- in training ----------------------------------------------------------------------------------------------

    def trained(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a module, of weights and inputs that are rounded."""
        raise NotImplementedError

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight `[out, in, …]`, rounded with the scale that follows from it, or with the frozen one."""
        codes, scale = codes_and_scale(weight.detach(), self.scheme, self.frozen_scale(name))
        if self.is_frozen and self.training and self.frozen_scale(name) is None:
            self._buffers[_buffer_of(name)].copy_(scale)  # type: ignore[union-attr]
        return _StraightThrough.apply(  # type: ignore[no-any-return, no-untyped-call]
            weight, codes, scale, self.scheme.fmt.full_scale
        )

    def input(self, x: torch.Tensor, kind: str = "input") -> torch.Tensor:
        """What goes into a product, `[…, features]`, rounded as the scheme says."""
        scheme = self.scheme
        if scheme.is_dynamic:
            x = inf_as_nan(x)
            scale = scheme.dynamic_scale(x.detach(), self.input_rule)
        elif scheme.is_static:
            scale = self._static_scale(x.detach(), kind)
        else:
            return x
        return fake_quantize(x, scale, scheme.fmt.dtype, scheme.fmt.full_scale)

    def _static_scale(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        if self.amax_history is None:
            return self.scheme.static_scale(0.0).to(x.device)
        found, past = ops.maxabs(x), self._past(kind)
        try:
            scale = self.scheme.static_scale(torch.where(past < 0, found, past))
        except FP8ScaleError as error:
            raise FP8ScaleError(f"{self.name}: {error}") from None
        if self.training and not (self.is_frozen and bool(past >= 0)):
            column = self.amax_history[:1, self.inputs[kind]]
            column.copy_(torch.maximum(column, found))
        return scale

    def _past(self, kind: str) -> torch.Tensor:
        """The range `(1,)` that an input is scaled by in the current step; below 0: by its own."""
        assert self.amax_history is not None
        column = self.amax_history[:, self.inputs[kind]]
        if self.is_frozen:
            return column.amax().reshape(1)
        return column[1:].amax().reshape(1) if self.delay.history > 1 else torch.full_like(column[:1], _UNSEEN)

    # --- from step to step ----------------------------------------------------------------------------------------

    @property
    def is_frozen(self) -> bool:
        """Whether scales stay as they are."""
        return self.delay.freeze_at is not None and self._steps >= self.delay.freeze_at

    def current(self) -> torch.Tensor | None:
        """The ranges of the current step, `(inputs,)`, to be changed in place; None where there are none."""
        return None if self.amax_history is None else self.amax_history[0]

    @torch.no_grad()
    def finish_step(self) -> None:
        """Count a step. Ranges of inputs that were not seen in it, as of experts without tokens, stay."""
        if self.amax_history is not None and not self.is_frozen:
            history = self.amax_history
            moved = torch.cat([torch.full_like(history[:1], _UNSEEN), history[:-1]])
            history.copy_(torch.where(history[0] >= 0, moved, history))
        if self.step is not None:
            self._steps += 1
            self.step.fill_(self._steps)
        self.used = False

    # --- what a conversion takes ----------------------------------------------------------------------------------

    def ranges(self) -> dict[str, torch.Tensor]:
        """The ranges that static scales follow from now, float32 scalars by kind, as far as any was seen."""
        if self.amax_history is None:
            return {}
        history = self.amax_history
        recent = history if self.is_frozen else torch.where(history[0] >= 0, history[:-1], history[1:])
        found = recent.amax(0).cpu()
        return {kind: found[column] for kind, column in self.inputs.items() if found[column] >= 0}

    @property
    def lacks_ranges(self) -> bool:
        """Whether some input that needs a range was never seen."""
        return "input" in self.inputs and "input" not in self.ranges()

    def frozen_scale(self, name: str) -> torch.Tensor | None:
        """The scale that a weight keeps; None: it follows from the weight."""
        scale = self._buffers.get(_buffer_of(name)) if self.is_frozen else None
        return None if scale is None or bool(scale.isnan().any()) else scale

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.step is not None and not self.step.is_meta:
            self._steps = int(self.step)

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuant:
        """Moves go through; casts do not: ranges and scales are float32."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied: torch.Tensor = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        super()._apply(keep_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.scheme}, {self.delay}"


def _buffer_of(weight: str) -> str:
    """The buffer of a weight's frozen scale; it must not look like that of a weight in FP8 beside it."""
    return f"frozen_scale_of_{weight.replace('.', '_')}"
