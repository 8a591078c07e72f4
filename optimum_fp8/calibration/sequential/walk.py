"""Walk: calibration data on their way through a model, part by part; and Route: in which order, and what reads what.

To run one part on just what the model gives it, the model's own forward is called, and stand-ins answer for the parts
before it: with what these returned where a later part reads it, with NaN elsewhere, which would not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...errors import FP8CalibrationError
from .blocks import WHOLE
from .kept import InMemory, Kept
from .stand_ins import Answer, Forward, Output, Reached, answered, digest_of, tensors_in, versions_of

_WHY = "calibration='sequential' runs the parts of a model one after the other, but"


@dataclass(frozen=True)
class Route:
    """How data go through the parts of a model.

    Attributes:
        order: their names, as they are called.
        readers: of each, the parts that read what it returned.
    """

    order: tuple[str, ...]
    readers: Mapping[str, frozenset[str]]


class Walk:
    """Batches on their way through a model; each part runs once for each batch, but for those one asks for.

    Args:
        model: the model; its modules may be replaced between two calls.
        parts: names of all parts.
        route: how data go through them.
        run: calls the model with the batch of a number.
        kept: for what parts returned, as long as others will read it.
    """

    def __init__(self, model: nn.Module, parts: Collection[str], route: Route, run: Callable[[int], None], kept: Kept):
        self._model, self._parts, self._route, self._run, self._kept = model, parts, route, run, kept
        self._place = {name: place for place, name in enumerate(route.order)}
        self._known: dict[tuple[int, str], Output] = {}
        self._waiting: dict[int, list[str]] = {}

    def to(self, batch: int, goal: str, *, keep: bool = False) -> list[torch.Tensor]:
        """Run a batch as far as a part, and through it.

        Args:
            batch: its number.
            goal: name of the part.
            keep: whether it need not run again: else it does when a later part is the goal.

        Returns:
            the tensors that the part returned; none if it is not called.

        Raises:
            FP8CalibrationError: parts are called in another order than on the route.
        """
        result: list[torch.Tensor] = []

        def answer(name: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (batch, name) in self._known:
                return self._recalled(batch, name, args, kwargs)
            if self._place.get(name, len(self._place)) > self._place[goal]:
                raise FP8CalibrationError(
                    f"{_WHY} batch {batch} calls {name} before {goal}, in another order than the first batch with the "
                    f"same inputs: {WHOLE}"
                )
            versions = versions_of(args, kwargs)
            output = forward(*args, **kwargs)
            if name != goal or keep:
                self._remember(batch, name, Output(output, args, kwargs, versions))
            if name == goal:
                result.extend(tensors_in(output))
                raise Reached
            return output

        _pass(self._model, self._parts, lambda: self._run(batch), answer)
        self._release(batch, goal)
        return result

    def _remember(self, batch: int, name: str, output: Output) -> None:
        self._known[batch, name], tensors = output, output.take_tensors()
        if self._route.readers[name]:
            self._kept.put((batch, name), tensors)
            self._waiting.setdefault(batch, []).append(name)

    def _recalled(self, batch: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self._known[batch, name]
        if name in self._waiting.get(batch, ()):
            return output.of(self._kept.get((batch, name)), args, kwargs)
        return output.filled(torch.nan, args, kwargs)

    def _release(self, batch: int, goal: str) -> None:
        """Drop what only parts before `goal` read: they have run."""
        here, waiting = self._place[goal], self._waiting.get(batch, [])
        for name in [name for name in waiting if all(self._place[r] < here for r in self._route.readers[name])]:
            self._kept.drop((batch, name))
            waiting.remove(name)


def _pass(model: nn.Module, parts: Collection[str], run: Callable[[], None], answer: Answer) -> None:
    with answered({name: model.get_submodule(name) for name in parts}, answer), suppress(Reached):
        run()


def scouted(model: nn.Module, parts: Collection[str], run: Callable[[], None]) -> Route:
    """The route of one batch: it runs through the whole model, and then part by part, which has to give the same.

    Args:
        model: the model.
        parts: names of all parts.
        run: calls the model with the batch.

    Raises:
        FP8CalibrationError: the parts cannot be run one after the other; the message says why.
    """
    outputs, digests = _run_whole(model, parts, run)
    order = tuple(outputs)
    try:
        readers = {name: _readers(model, name, outputs, run) for name in order}
        route = Route(order, readers)
        walk = Walk(model, parts, route, lambda _: run(), InMemory())
        differing = next((name for name in order if digest_of(walk.to(0, name, keep=True)) != digests[name]), None)
    except FP8CalibrationError as error:
        raise FP8CalibrationError(f"{_WHY} {type(model).__name__} cannot be run so ({error}): {WHOLE}") from error
    if differing is not None:
        raise FP8CalibrationError(
            f"{_WHY} {differing} does not return the same so: it reads more than what other parts return (their keys "
            f"and values in a cache, say), or is random: {WHOLE}"
        )
    return route


def _run_whole(
    model: nn.Module, parts: Collection[str], run: Callable[[], None]
) -> tuple[dict[str, Output], dict[str, str]]:
    """What each part that is called returned, less the tensors, in the order of the calls; and digests of these."""
    outputs: dict[str, Output] = {}
    digests: dict[str, str] = {}
    inside: list[str] = []

    def answer(name: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in outputs or inside:
            how = f"inside of {inside[0]}" if inside else "several times for one batch"
            raise FP8CalibrationError(f"{_WHY} {name} is called {how}: {WHOLE}")
        inside.append(name)
        versions = versions_of(args, kwargs)
        output = forward(*args, **kwargs)
        inside.pop()
        digests[name] = digest_of(tensors_in(output))
        outputs[name] = Output(output, args, kwargs, versions)
        outputs[name].take_tensors()
        return output

    _pass(model, parts, run, answer)
    return outputs, digests


def _readers(model: nn.Module, source: str, outputs: Mapping[str, Output], run: Callable[[], None]) -> frozenset[str]:
    """The parts that read what `source` returned, or what became of it on the way: NaN from it reaches them."""
    found: set[str] = set()
    last = list(outputs)[-1]

    def answer(name: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name != source and any(_has_nan(tensor) for tensor in tensors_in(args, kwargs)):
            found.add(name)
        if name == last:
            raise Reached
        return outputs[name].filled(torch.nan if name == source else 0.0, args, kwargs)

    if source != last:
        _pass(model, outputs, run, answer)
    return frozenset(found)


def _has_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def joined(routes: Sequence[Route]) -> Route:
    """One route for batches of several kinds, some of which do not go through all parts.

    Raises:
        FP8CalibrationError: they go through parts in different orders.
    """
    before: dict[str, set[str]] = {}
    readers: dict[str, frozenset[str]] = {}
    for route in routes:
        for name in route.order:
            before.setdefault(name, set())
            readers[name] = readers.get(name, frozenset()) | route.readers[name]
        for first, second in pairwise(route.order):
            before[second].add(first)
    try:
        order = tuple(TopologicalSorter(before).static_order())
    except CycleError as error:
        names = ", ".join(error.args[1])
        raise FP8CalibrationError(f"{_WHY} batches call these in different orders: {names}: {WHOLE}") from None
    return Route(order, readers)
