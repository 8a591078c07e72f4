"""Forward passes of a whole model: when one begins and ends, and what of it is padding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

Inside = Callable[[nn.Module, dict[str, Any]], AbstractContextManager[Any] | None]


class ForwardPasses:
    """Has something entered for each forward pass of a model, and left at its end, until `remove()`.

    What activation checkpointing runs once more for the backward pass is no forward pass of the model.

    Args:
        model: the model.
        inside: what to enter, given the model and its keyword arguments; None: nothing this time.
    """

    def __init__(self, model: nn.Module, inside: Inside):
        self._inside = inside
        self._entered: list[AbstractContextManager[Any]] = []
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardPasses:
        copied = object.__new__(type(self))  # a copy of the model is one that nobody asked to look at
        copied._inside, copied._entered, copied._handles = (lambda module, inputs: None), [], []
        return copied

    def remove(self) -> None:
        """Leave no trace on the model."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = self._inside(module, kwargs)
        if entered is not None:
            entered.__enter__()
            self._entered.append(entered)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._entered:
            self._entered.pop().__exit__(None, None, None)


def samples_in(inputs: dict[str, Any]) -> int:
    """How many samples a forward pass is of: the length of its first input."""
    return next((len(value) for value in inputs.values() if getattr(value, "ndim", 0)), 0)
