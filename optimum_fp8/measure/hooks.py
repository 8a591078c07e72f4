"""Hooks that measure the inputs and outputs of modules, and leave no trace when they are removed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .store import Measurements

logger = logging.getLogger(__name__)


class Observers:
    """Forward hooks that measure inputs and outputs of modules into `measurements` until `remove()`.

    Args:
        measurements: where ranges are kept.
        kinds: which tensors of a layer are measured, of "input", "output" and "weight".
    """

    def __init__(self, measurements: Measurements, kinds: Iterable[str] = ("input", "weight")):
        self.measurements, self.kinds = measurements, frozenset(kinds)
        self._handles: list[Any] = []
        self._inputs: list[tuple[str, nn.Module, int]] = []
        self._valid: torch.Tensor | None = None

    def attach(self, name: str, module: nn.Module) -> None:
        """Measure what goes into the module called `name`, and what comes out of it, as `kinds` says."""
        if "input" in self.kinds:
            hook = partial(self._observe_input, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._inputs.append((name, module, self._handles[-1].id))
        if "output" in self.kinds:
            self._handles.append(module.register_forward_hook(partial(self._observe_output, name)))

    @property
    def is_attached(self) -> bool:
        """Whether anything is observed."""
        return bool(self._handles)

    def add(self, handle: Any) -> None:
        """Have `remove()` also call `handle.remove()`: of something else that observes for these measurements."""
        self._handles.append(handle)

    def observe(self, name: str, kind: str, x: Any) -> None:
        """Measure a tensor of any shape, without rows of padding where they show; anything else is ignored.

        Args:
            name: the module.
            kind: which of its tensors: "input", "output", or an operand of a product such as "q" or "p2".
            x: the tensor.
        """
        if not isinstance(x, torch.Tensor):
            return
        if self._valid is not None:
            x = _without_padding(x, self._valid.to(x.device))
        if x.numel():
            self.measurements.observe(name, kind, x)

    def observe_per_head(self, name: str, kind: str, x: torch.Tensor) -> None:
        """Measure an operand or the output of attention, per head and over all.

        Args:
            name: the attention module.
            kind: "q", "k", "v", "output", "k_cache" or "v_cache".
            x: `[batch, heads, length, size]`. Positions of padding are left out where `length` is that of the mask,
                or keys and values go beyond it; other tensors are taken whole, and those of another shape as one head.
        """
        if x.ndim != 4:
            self.observe(name, kind, x)
            return
        tokens, valid = x.transpose(1, 2), self._valid
        if valid is not None and kind in ("k", "v") and x.shape[0] == len(valid) and x.shape[2] > valid.shape[1]:
            generated = valid.new_ones(len(valid), x.shape[2] - valid.shape[1])
            valid = torch.cat([valid, generated], dim=1)  # what follows the prompt is never padding
        if valid is not None and tokens.shape[:2] == valid.shape:
            tokens = tokens[valid.to(x.device)]
        if tokens.numel():
            self.measurements.observe(name, kind, tokens.reshape(-1, *x.shape[1::2]), per_head=True)

    def remove(self) -> None:
        """Remove all hooks; warns of others that may have changed an input after it was measured."""
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

    def _observe_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.observe(name, "input", next(iter((*args, *kwargs.values())), None))

    def _observe_output(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.observe(name, "output", output)


def _without_padding(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows of `[batch, length, …]` or `[batch · length, …]` that are not padding; other shapes are kept whole."""
    if x.ndim >= 3 and x.shape[:2] == valid.shape:
        return x[valid]
    if x.ndim == 2 and x.shape[0] == valid.numel():
        return x[valid.flatten()]
    return x
