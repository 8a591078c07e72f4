"""Which kernel runs an operator, and a record of what really ran.

A kernel belongs to a backend ("reference", "cpu_avx2", …), serves some device types, and may refuse a
call with a reason. The first registered kernel that serves the device and does not refuse runs; the reference serves
everything. Calls and refusals are counted per module (`records.py`), so that a report can tell what happened, not what
was hoped for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..errors import FP8ConfigError, FP8NotAvailableError, nearest
from .compiling import constant_while_compiling
from .records import CallRecord

logger = logging.getLogger(__name__)

REFERENCE = "reference"


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator. Its functions are given the operator's arguments as one value
    (`arguments.py`); a function that takes them one by one is registered as `lambda call: function(*call)`.

    Attributes:
        backend: the name it is forced and reported by.
        devices: device types it serves unasked; None serves all, () none: it runs where its backend is forced.
        run: computes the result of a call.
        refuses: the reason why a call cannot be served, or None.
        prepare: packs what does not change from call to call: given a call that the kernel serves, a function for the
            module's next ones, which are likely to be alike, that answers None to those that are not. None if that
            would not be quicker.
        traced: whether compilers are to see what `run` calls, operators that they know, and not the operator itself.
        slower: the reason why a call that it serves takes a longer way than the one it is for, or None. Such calls are
            told as refused ones are, and nothing is prepared for them.
    """

    backend: str
    devices: tuple[str, ...] | None
    run: Callable[[Any], Any]
    refuses: Callable[[Any], str | None] = lambda call: None
    prepare: Callable[[Any], Callable[[Any], Any] | None] = lambda call: None
    traced: bool = False
    slower: Callable[[Any], str | None] = lambda call: None

    def serves(self, device: str) -> bool:
        return self.devices is None or device in self.devices


_kernels: dict[str, list[Kernel]] = {}
_registered = 0
_missing: dict[str, str | Callable[[], str | None]] = {}
_missing_devices: dict[str, str] = {}
_warned: set[str] = set()
_forced: ContextVar[str | None] = ContextVar("optimum_fp8_backend", default=None)
forced_backend = _forced.get


def register_kernel(op: str, kernel: Kernel) -> None:
    """Add a kernel for `op`. It is preferred to the reference, and to kernels registered before it.

    Raises:
        FP8ConfigError: there is no such operator; the message names the nearest.
    """
    global _registered
    if kernel.backend != REFERENCE and op not in _kernels:
        raise FP8ConfigError(f"operator {op!r} is unknown: {nearest(op, _kernels)}")
    kernels = _kernels.setdefault(op, [])
    kernels[:] = [known for known in kernels if known.backend != kernel.backend]
    kernels.insert(0 if kernel.backend != REFERENCE else len(kernels), kernel)
    _registered += 1


def registry() -> int:
    """A number that changes with every kernel that is registered."""
    return _registered


def backends() -> list[str]:
    """Names of all backends that have a kernel and can run."""
    names = {kernel.backend for kernels in _kernels.values() for kernel in kernels}
    return sorted(name for name in names if missing(name) is None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator called inside on the backend `name`, on whatever device the tensors are.

    Raises:
        FP8ConfigError: no such backend.
        FP8NotAvailableError: there is such a backend, but not here; or (from the call) it has no kernel for the
            operator, or refuses the call.
    """
    if name not in backends():
        if (reason := missing(name)) is not None:
            here = ", ".join(backends())
            raise FP8NotAvailableError(f"backend {name!r} cannot run: {reason}; here run {here}")
        raise FP8ConfigError(f"backend {name!r} is unknown: {nearest(name, backends())}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def note_missing(name: str, reason: str | Callable[[], str | None], *, device: bool = False) -> None:
    """Remember why a backend is not there, or all kernels for a device type (`device`): of those it is said once, when
    the reference first runs instead. Of a backend that comes and goes `reason` is asked (None: it is there)."""
    if device:
        assert isinstance(reason, str)
        _missing_devices[name] = reason
    else:
        _missing[name] = reason


def missing(name: str) -> str | None:
    """Why a backend, or the kernels for a device type, are not there; None if they are, or if there are none at all."""
    reason = _missing.get(name) or _missing_devices.get(name)
    return reason() if callable(reason) else reason


def why_reference(device: str | None = None) -> str | None:
    """Why the reference runs on a device type (None: on any) whose kernels are missing; None if none are."""
    reasons = _missing_devices if device is None else {device: _missing_devices.get(device)}
    return "; ".join(reason for reason in reasons.values() if reason) or None


def choose(op: str, call: Any, device: str, record: CallRecord | None) -> tuple[Kernel, bool]:
    """The best kernel for `call` on a device type, or that of the forced backend; counted in `record`.

    Returns:
        the kernel, and whether its best way, or a kernel that is preferred to it, refused the call, and may take the
        next.
    """
    forced, refused = _forced.get(), False
    for kernel in _kernels[op]:
        if kernel.backend != forced if forced else not kernel.serves(device):
            continue
        reason = kernel.refuses(call)
        if reason is None:
            if record is not None:
                record.kernels[op, kernel.backend] += 1
                if (slower := kernel.slower(call)) is not None:
                    record.fallbacks[op, kernel.backend, slower] += 1
                    refused = True
            if kernel.backend == REFERENCE and not forced:
                _warn_of_missing(device)
            return kernel, refused
        if forced:
            raise FP8NotAvailableError(f"backend {forced!r} cannot run {op!r} here: {reason}; leave the backend free")
        if record is not None:
            record.fallbacks[op, kernel.backend, reason] += 1
        refused = True
    raise FP8NotAvailableError(f"backend {forced!r} has no kernel for {op!r}; leave the backend free")


def preferred(op: str, device: str) -> str:
    """The backend whose kernel for `op` is asked first for calls on a device type, where none is forced."""
    return next(kernel.backend for kernel in _kernels[op] if kernel.serves(device))


def traced_kernel(op: str, call: Any) -> Kernel | None:
    """While compiling: the kernel whose own calls the compiler is to see; None: it sees the operator.

    Raises:
        FP8NotAvailableError: such a backend is forced and refuses the call.
    """
    name = traced_backend(call[0].device.type)
    for kernel in _kernels[op] if name else ():
        if kernel.backend == name and kernel.traced:
            reason = kernel.refuses(call)
            if reason is None:
                return kernel
            if name == _forced_now():
                raise FP8NotAvailableError(f"backend {name!r} cannot run {op!r} here: {reason}; leave the backend free")
    return None


@constant_while_compiling
def traced_backend(device: str) -> str:
    """The backend whose calls compilers are to see: the forced one, or that which serves the device; else none."""
    forced, kernels = _forced.get(), [kernel for kernels in _kernels.values() for kernel in kernels if kernel.traced]
    return next(
        (kernel.backend for kernel in kernels if (kernel.backend == forced if forced else kernel.serves(device))), ""
    )


@constant_while_compiling
def _forced_now() -> str:
    return _forced.get() or ""


def _warn_of_missing(device: str) -> None:
    if device in _missing_devices and device not in _warned:
        _warned.add(device)
        logger.warning("FP8 runs on the slow reference operators: %s", _missing_devices[device])
