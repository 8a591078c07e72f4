"""Records of what operators ran on: one for each module, held by the module and by nothing else.

A module hands its record to the operators it calls. Calls that reach an operator without one, from a compiled graph for
example, are attributed by the module's own tensors: `CallRecord.watch` remembers where those lie in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch


class Prepared(NamedTuple):
    """A kernel that knows what a module calls it with (see `prepared.py`).

    Attributes:
        run: given a call, its result, or None where the call is not like the one that was prepared for.
        kernel: operator and backend, as counted.
        registry: what `dispatch.registry()` was then; another one may prefer another kernel.
    """

    run: Callable[[Any], Any]
    kernel: tuple[str, str]
    registry: int


@dataclass(eq=False)
class CallRecord:
    """What a module's calls ran on. A copy of it, as a copied or unpickled module has, is a new, empty record.

    Attributes:
        kernels: counts by `(operator, backend)`.
        fallbacks: counts of refusals, and of calls that took a longer way, by `(operator, backend, reason)`.
        prepared: calls prepared for the module's next ones, by operator.
    """

    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    fallbacks: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    prepared: dict[str, Prepared] = field(default_factory=dict, repr=False)

    def watch(self, *tensors: torch.Tensor | None) -> None:
        """Count calls with these tensors (a weight; the scales of attention) here, where they come without a record.

        Tensors are known by where they lie in memory: watch them again after they were moved or replaced. Of modules
        that share a tensor, the last to watch it gets the counts. None and tensors without memory (meta) are passed
        over.
        """
        for tensor in tensors:
            if tensor is not None and not tensor.is_meta and tensor.numel():
                _watched[tensor.data_ptr()] = self

    def __reduce__(self) -> tuple[type[CallRecord], tuple[()]]:
        return CallRecord, ()


_watched: WeakValueDictionary[int, CallRecord] = WeakValueDictionary()


def record_of(tensors: Iterable[torch.Tensor | None]) -> CallRecord | None:
    """The record that watches the first of these tensors that is watched."""
    for tensor in tensors:
        if tensor is not None and (record := _watched.get(tensor.data_ptr())) is not None:
            return record
    return None


def note_fallback(record: CallRecord | None, op: str, reason: str) -> None:
    """Count a call to `op` that a module did not make, because it had to stay in high precision for `reason`."""
    if record is not None:
        record.fallbacks[op, "high precision", reason] += 1
