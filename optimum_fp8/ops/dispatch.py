"""Which kernel runs an operator, and a record of what really ran.

A kernel belongs to a backend ("reference", "cpu_avx2", …), serves some device types, and may refuse a
call with a reason. The first registered kernel that serves the device and does not refuse runs; the reference serves
everything. Calls and refusals are counted per owner (a module), so that a report can tell what happened, not what was
hoped for.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import FP8ConfigError, FP8NotAvailableError, nearest

logger = logging.getLogger(__name__)

REFERENCE = "reference"


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator.

    Attributes:
        backend: the name it is forced and reported by.
        devices: device types it serves unasked; None serves all, () none: it runs where its backend is forced.
        run: called with the operator's arguments (without `owner`).
        refuses: called with the same arguments; the reason why this call cannot be served, or None.
        prepare: called with the arguments of a call that it serves; what is to take the next ones of the same owner, as
            they are likely to be alike, and answers None to those that are not. None if it would not be quicker.
    """

    backend: str
    devices: tuple[str, ...] | None
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args: None
    prepare: Callable[..., Callable[..., Any] | None] = lambda *args: None

    def serves(self, device: str) -> bool:
        return self.devices is None or device in self.devices


@dataclass
class CallRecord:
    """What an owner's calls ran on: `kernels[(op, backend)]` and `fallbacks[(op, backend, reason)]` are counts."""

    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    fallbacks: Counter[tuple[str, str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Prepared:
    """A kernel that knows what an owner calls it with, and the counters of its calls."""

    run: Callable[..., Any]
    kernel: tuple[str, str]
    counters: list[Counter[tuple[str, str]]]


_kernels: dict[str, list[Kernel]] = {}
_prepared: dict[tuple[str, int | tuple[int, ...]], _Prepared] = {}
_records: dict[int, CallRecord] = {}
_NO_TENSORS = frozenset({type(None), float, str, int, bool, torch.dtype})
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_is_compiling, _is_profiling = torch.compiler.is_compiling, torch.autograd._profiler_enabled
_records_gradients, _modes = torch.is_grad_enabled, torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_missing: dict[str, str] = {}
_warned: set[str] = set()
_next_owner = itertools.count(1)  # 0 is "nobody"
_forced: ContextVar[str | None] = ContextVar("optimum_fp8_backend", default=None)


def register_kernel(op: str, kernel: Kernel) -> None:
    """Add a kernel for `op`. It is preferred to the reference, and to kernels registered before it."""
    kernels = _kernels.setdefault(op, [])
    kernels[:] = [known for known in kernels if known.backend != kernel.backend]
    kernels.insert(0 if kernel.backend != REFERENCE else len(kernels), kernel)
    _prepared.clear()


def backends() -> list[str]:
    """Names of all backends that have a kernel."""
    return sorted({kernel.backend for kernels in _kernels.values() for kernel in kernels})


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator called inside on the backend `name`, on whatever device the tensors are.

    Raises:
        FP8ConfigError: no such backend.
        FP8NotAvailableError: there is such a backend, but not here; or (from the call) it has no kernel for the
            operator, or refuses the call.
    """
    if name not in backends():
        if name in _missing:
            here = ", ".join(backends())
            raise FP8NotAvailableError(f"backend {name!r} cannot run: {_missing[name]}; here run {here}")
        raise FP8ConfigError(f"backend {name!r} is unknown: {nearest(name, backends())}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def new_owner() -> int:
    """A number under which a module's calls are counted."""
    return next(_next_owner)


def calls(owner: int) -> CallRecord:
    """What has run for `owner` so far (empty if nothing has)."""
    return _records.get(owner, CallRecord())


def note_missing(name: str, reason: str) -> None:
    """Remember why a backend is not there, or all kernels for a device type: of those it is said once, when the
    reference first runs instead."""
    _missing[name] = reason


def missing(device: str) -> str | None:
    """Why the kernels for a device type are not there, or None if they are (or if there are none yet)."""
    return _missing.get(device)


def is_plain(*arguments: Any) -> bool:
    """Whether a call on these arguments means the same with and without torch's dispatcher: no tensor subclass, no
    values left out (meta), no gradient, no tracing, no mode and no profiler that would want to see the operator."""
    if _is_compiling() or _modes() or _transforms() is not None or _is_profiling():
        return False
    return _are_plain(arguments, _records_gradients())


def _are_plain(arguments: Sequence[Any], gradients: bool) -> bool:
    for argument in arguments:
        kind = type(argument)
        if kind in _NO_TENSORS:
            continue
        if kind in _PLAIN_TENSORS:
            if gradients and argument.requires_grad or argument.is_meta:
                return False
        elif kind is list or kind is tuple:
            if not _are_plain(argument, gradients):
                return False
        elif isinstance(argument, torch.Tensor):
            return False
    return True


def note_fallback(owner: int, op: str, reason: str) -> None:
    """Count a call that `owner` did not make to `op`, because it had to stay in high precision for `reason`."""
    _records.setdefault(owner, CallRecord()).fallbacks[op, "high precision", reason] += 1


def run_prepared(op: str, owner: int | Sequence[int], x: torch.Tensor, *rest: Any) -> Any:
    """As `run`, in a fraction of its time, where the owner's last call was plain and just like this one; else None."""
    if not is_plain(x) or _records_gradients() or _forced.get() is not None:
        return None
    prepared = _prepared.get((op, owner if isinstance(owner, int) else tuple(owner)))
    if prepared is None:
        return None
    found = prepared.run(x, *rest)
    if found is not None:
        for counter in prepared.counters:
            counter[prepared.kernel] += 1
    return found


def _prepare(
    kernel: Kernel, op: str, owner: int | Sequence[int], records: list[CallRecord], args: Sequence[Any]
) -> None:
    if not records or _records_gradients() or _forced.get() is not None or not is_plain(*args):
        return
    run = kernel.prepare(*args)
    if run is not None:
        counters = [record.kernels for record in records]
        _prepared[op, owner if isinstance(owner, int) else tuple(owner)] = _Prepared(
            run, (op, kernel.backend), counters
        )


def run(op: str, owner: int | Sequence[int], *args: Any) -> Any:
    """Run `op` on the best kernel for its first argument's device, or on the forced backend; count it for `owner`, or
    for each of several."""
    device, forced = args[0].device.type, _forced.get()
    records = _records_of(owner)
    for kernel in _kernels[op]:
        if kernel.backend != forced if forced else not kernel.serves(device):
            continue
        reason = kernel.refuses(*args)
        if reason is None:
            for record in records:
                record.kernels[op, kernel.backend] += 1
            if kernel.backend == REFERENCE and not forced:
                _warn_of_missing(device)
            _prepare(kernel, op, owner, records, args)
            if torch.is_autocast_enabled(device):  # where an operator rounds is its own affair
                with torch.autocast(device, enabled=False):
                    return kernel.run(*args)
            return kernel.run(*args)
        if forced:
            raise FP8NotAvailableError(f"backend {forced!r} cannot run {op!r} here: {reason}; leave the backend free")
        for record in records:
            record.fallbacks[op, kernel.backend, reason] += 1
    raise FP8NotAvailableError(f"backend {forced!r} has no kernel for {op!r}; leave the backend free")


def _records_of(owner: int | Sequence[int]) -> list[CallRecord]:
    owners = [owner] if isinstance(owner, int) else owner
    found = []
    for each in owners:
        if each:
            record = _records.get(each)
            if record is None:
                record = _records[each] = CallRecord()
            found.append(record)
    return found


def _warn_of_missing(device: str) -> None:
    if device in _missing and device not in _warned:
        _warned.add(device)
        logger.warning("FP8 runs on the slow reference operators: %s", _missing[device])
