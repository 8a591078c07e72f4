"""nn.Linear and transformers' Conv1D in FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..errors import FP8StateError
from .base import FP8Module
from .recipe import Recipe
from .shared_input import SharedInput


class FP8Linear(FP8Module):
    """y = x Wᵀ + b with an FP8 weight `[out, in]`.

    Conv1D (GPT-2) stores `[in, out]`; here the weight always is `[out, in]`, and `transposed` remembers the origin.
    """

    def __init__(self, origin: Any, recipe: Recipe):
        transposed = isinstance(origin, Conv1D)
        out_features, in_features = origin.weight.shape[::-1] if transposed else origin.weight.shape
        super().__init__(torch.Size((out_features, in_features)), origin, recipe)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.shared_input: SharedInput | None = None

    def canonical(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.transposed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or self.shared_input is None or not _can_share(x):
            return self._alone(x)  # in a graph, products of one input are found by who compiles it (ops/inductor.py)
        y = self.shared_input.take(self, x)
        if y is not None:
            return y
        group = self.shared_input.group(self, x)
        return self._alone(x) if len(group) == 1 else self._together(x, group, self.shared_input)

    def _alone(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return ops.linear(
                x,
                self.weight,
                self.weight_scale,
                self.activation_scale(x),
                self.bias,
                full_scale=self.recipe.fmt.full_scale,
                arithmetic=self.recipe.arithmetic,
                owner=self.owner,
            )
        except (RuntimeError, IndexError):
            self._check_fit(x)
            raise

    def _together(self, x: torch.Tensor, group: list[FP8Linear], shared: SharedInput) -> torch.Tensor:
        """Compute the outputs of all modules of `group`, return the first's, and keep the others for their calls."""
        outputs = self._outputs(x, group)
        for module, y in zip(group[1:], outputs[1:], strict=True):
            shared.keep(module, x, y)
        return outputs[0]

    def _outputs(self, x: torch.Tensor, group: list[FP8Linear]) -> list[torch.Tensor]:
        try:
            scale = self.activation_scale(x)
            parameters: list[dict[str, Any]] = [module._parameters for module in group]  # attributes take longer
            if self.recipe.dynamic is None:
                scales = [each["input_scale"] for each in parameters]
            else:
                scales = [scale] * len(group)  # it is the input's own
            for module in group[1:]:
                module.check_codes()
            return ops.linears(
                x,
                [each["weight"] for each in parameters],
                [each["weight_scale"] for each in parameters],
                scales,
                [each["bias"] for each in parameters],
                full_scale=self.recipe.fmt.full_scale,
                arithmetic=self.recipe.arithmetic,
                owners=[module.owner for module in group],
            )
        except (RuntimeError, IndexError):
            for module in group:
                module._check_fit(x)
            raise

    def _check_fit(self, x: torch.Tensor) -> None:
        """After an error: say so if it is the input or the bias that does not fit."""
        self.check_bias()
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise FP8StateError(
                f"{self.name}: an FP8Linear of {self.in_features} input features was given {tuple(x.shape)}, expected "
                f"(…, {self.in_features}): look at what the model hands to this module"
            )

    def goes_with(self, leader: FP8Linear) -> bool:
        """Whether this module can be computed in one go with `leader`."""
        same = self.recipe is leader.recipe or self.recipe == leader.recipe
        return same and self.weight.device == leader.weight.device

    def start(self, recipe: Recipe, input_scale: torch.Tensor | None) -> None:
        super().start(recipe, input_scale)
        self._has_changed()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Module:
        self._has_changed()
        return super()._apply(fn, recurse)

    def _has_changed(self) -> None:
        if self.shared_input is not None:
            self.shared_input.forget()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {super().extra_repr()}"


def _can_share(x: torch.Tensor) -> bool:
    """Whether a tensor can be told to be the same, and unchanged, at a later call (inference tensors cannot)."""
    if type(x) is not torch.Tensor or x.is_inference():
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


def share_inputs(parent: nn.Module) -> None:
    """Let the FP8Linear modules right inside `parent` watch for inputs that they have in common."""
    linears = [child for child in parent.children() if isinstance(child, FP8Linear)]
    shared = SharedInput() if len(linears) > 1 else None
    for linear in linears:
        linear.shared_input = shared
