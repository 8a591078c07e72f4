"""Observers: hooks that record what goes into and out of modules, and that leave no trace when they are taken off."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .statistics import TensorStatistics
from .store import Measurements

logger = logging.getLogger(__name__)


class Observers:
    """Records the inputs and outputs of modules into `measurements` until `remove()`."""

    def __init__(self, measurements: Measurements):
        self.measurements = measurements
        self._handles: list[Any] = []
        self._inputs: list[tuple[str, nn.Module, int]] = []
        self._valid: torch.Tensor | None = None

    def attach(self, modules: Mapping[str, nn.Module], kinds: Iterable[str]) -> None:
        """Watch the named modules' "input" and/or "output"."""
        kinds = set(kinds)
        for name, module in modules.items():
            if "input" in kinds:
                hook = partial(self._see_input, name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                self._inputs.append((name, module, self._handles[-1].id))
            if "output" in kinds:
                self._handles.append(module.register_forward_hook(partial(self._see_output, name)))

    def add(self, handle: Any) -> None:
        """Let `remove()` take off something else that observes for these measurements, by its own `remove()`."""
        self._handles.append(handle)

    def see_heads(self, name: str, kind: str, x: torch.Tensor) -> None:
        """Record what goes into or comes out of attention.

        Args:
            name: the attention module.
            kind: "q", "k", "v", "output", "k_cache" or "v_cache".
            x: `[batch, heads, length, size]`. Positions of padding are left out where `length` is that of the mask,
                or keys and values go beyond it; other tensors are taken whole, and those of another shape as one head.
        """
        if x.ndim != 4:
            self.see_whole(name, kind, x)
            return
        tokens, valid = x.transpose(1, 2), self._valid
        if valid is not None and kind in ("k", "v") and x.shape[0] == len(valid) and x.shape[2] > valid.shape[1]:
            generated = valid.new_ones(len(valid), x.shape[2] - valid.shape[1])
            valid = torch.cat([valid, generated], dim=1)  # what follows the prompt is never padding
        if valid is not None and tokens.shape[:2] == valid.shape:
            tokens = tokens[valid.to(x.device)]
        if tokens.numel():
            self.measurements.observe(name, kind, TensorStatistics.of_heads(tokens.reshape(-1, *x.shape[1::2])))

    def see_whole(self, name: str, kind: str, x: torch.Tensor) -> None:
        """Record a tensor of any shape, an operand of a product; rows of padding are left out where they show."""
        self._observe(name, kind, x)

    def remove(self) -> None:
        """Take all hooks off; warns of others that may have changed an input after it was measured."""
        late = [name for name, module, hook in self._inputs if next(reversed(module._forward_pre_hooks), hook) != hook]
        if late and self._handles:
            logger.warning("forward pre-hooks registered after measuring began are not in the ranges of: %s", late[:8])
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def only_where(self, mask: torch.Tensor | None) -> Iterator[None]:
        """Leave out padding while inside: `mask` is `[batch, length]`, 0 at padded positions."""
        self._valid = mask.bool() if mask is not None and not bool(mask.all()) else None
        try:
            yield
        finally:
            self._valid = None

    # Hooks are partials of methods, not closures: a deep copy of a model then records for itself.

    def _see_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._observe(name, "input", next(iter((*args, *kwargs.values())), None))

    def _see_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._observe(name, "output", output)

    def _observe(self, name: str, kind: str, x: Any) -> None:
        if not isinstance(x, torch.Tensor):
            return
        if self._valid is not None:
            x = _without_padding(x, self._valid.to(x.device))
        if x.numel():
            self.measurements.observe(name, kind, TensorStatistics.of(x))


def _without_padding(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows of `[batch, length, …]` or `[batch · length, …]` that are not padding; other shapes are kept whole."""
    if x.ndim >= 3 and x.shape[:2] == valid.shape:
        return x[valid]
    if x.ndim == 2 and x.shape[0] == valid.numel():
        return x[valid.flatten()]
    return x
