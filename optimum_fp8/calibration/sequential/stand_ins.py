"""Stand-ins for parts of a model: code that answers calls in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

Forward = Callable[..., Any]
Answer = Callable[[str, Forward, tuple[Any, ...], dict[str, Any]], Any]


class Reached(BaseException):
    """Ends a forward pass that has gone as far as it is needed; no error, so that no model catches it."""


@contextmanager
def answered(parts: Mapping[str, nn.Module], answer: Answer) -> Iterator[None]:
    """Have `answer(name, forward, args, kwargs)` return what the modules would, while inside."""
    before = {name: module.__dict__.get("forward") for name, module in parts.items()}
    for name, module in parts.items():
        module.forward = _stand_in(name, module.forward, answer)
    try:
        yield
    finally:
        for name, module in parts.items():
            if (own := before[name]) is not None:
                module.forward = own
            else:
                module.__dict__.pop("forward", None)


def _stand_in(name: str, forward: Forward, answer: Answer) -> Forward:
    @wraps(forward)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return answer(name, forward, args, kwargs)

    return stand_in


@dataclass(frozen=True)
class _Given:
    """In the place of something that a module returned as it was given: where it stood among its arguments."""

    at: int | str


@dataclass(frozen=True)
class _Like:
    """In the place of a tensor: what it was like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def filled(self, value: float) -> torch.Tensor:
        """One full of `value`, or of zeros where it is not of floating-point numbers."""
        value = value if self.dtype.is_floating_point else 0
        return torch.full(self.shape, value, dtype=self.dtype, device=self.device)


class Output:
    """What a module returned, less the tensors: its structure, and what of it is an argument passed on.

    Args:
        output: what it returned.
        args: what it was called with.
        kwargs: the same.
        versions: of the arguments before the call, as `versions_of` gives them: what was changed was not passed on.
    """

    def __init__(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], versions: Mapping[int, int]):
        places: dict[int, int | str] = {}
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for at, value in named:
            if _is_object(value) and versions.get(id(value), 0) == _version(value):
                places[id(value)] = at
        self.tensors: list[torch.Tensor] = []
        self._like: list[_Like] = []

        def without_data(leaf: Any) -> Any:
            if id(leaf) in places:
                return _Given(places[id(leaf)])
            if not isinstance(leaf, torch.Tensor):
                return leaf
            self.tensors.append(leaf)
            self._like.append(_Like(leaf.shape, leaf.dtype, leaf.device))
            return self._like[-1]

        self._tree = tree_map(without_data, output, is_leaf=lambda leaf: id(leaf) in places)

    def take_tensors(self) -> list[torch.Tensor]:
        """The tensors, which are here no longer."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def filled(self, value: float, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output for other arguments, with `value` for what it calculated."""
        return self.of((like.filled(value) for like in self._like), args, kwargs)

    def of(self, tensors: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The output with these tensors, in the order of `tensors`, and these arguments."""
        given = iter(tensors)

        def with_data(leaf: Any) -> Any:
            if isinstance(leaf, _Given):
                return args[leaf.at] if isinstance(leaf.at, int) else kwargs[leaf.at]
            return next(given) if isinstance(leaf, _Like) else leaf

        return tree_map(with_data, self._tree, is_leaf=lambda leaf: isinstance(leaf, (_Given, _Like)))


def versions_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, int]:
    """How often tensors among arguments have been changed, by their identity."""
    return {id(value): _version(value) for value in (*args, *kwargs.values())}


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """All tensors in structures of tuples, lists, dicts and the outputs of models."""
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]


def digest_of(tensors: list[torch.Tensor]) -> str:
    """A digest of the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _version(value: Any) -> int:
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(value, (bool, int, float, str, type))
