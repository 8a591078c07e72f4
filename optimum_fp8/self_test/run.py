"""The self-test: every operator on a device, beside the reference on the CPU."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from .. import ops
from ..errors import FP8ConfigError, FP8NotAvailableError, nearest
from ..formats import FP8_DTYPES, NumberFormat, is_fp8, number_format
from ..ops.constants import mark_constants
from ..ops.declare import call as call_operator
from ..ops.dispatch import REFERENCE
from .case import Case
from .cases import all_cases
from .compare import difference
from .device import available_device, synchronize, target_of
from .report import FAILED, PASSED, REFUSED, Row, SelfTestReport
from .versions import versions


def selftest(
    device: str | None = None,
    *,
    target: str | None = None,
    backend: str | None = None,
    operators: Collection[str] = (),
) -> SelfTestReport:
    """Run every operator on a device, in both FP8 formats, and compare each result with the reference on the CPU.

    Args:
        device: "hpu", "cuda" or "cpu"; None: the accelerator that is there, or the CPU.
        target: whose number formats are used; None: those of the device.
        backend: the backend to force (`ops.backends()`); None: what the device's calls choose.
        operators: names of operators; none: all.

    Returns:
        A row for each case. What raises is a row like the others.

    Raises:
        FP8ConfigError: an unknown device, target, backend or operator.
        FP8NotAvailableError: the device, or the backend, is not here; the message says what was looked for.
    """
    device = available_device(device)
    target = target_of(device) if target is None else target
    formats = [number_format(name, target) for name in FP8_DTYPES]
    with _on(backend):
        pass  # an unknown one is an error of the call, not of every case
    with torch.no_grad():
        rows = [_row(case, fmt, device, backend) for fmt, case in _cases(formats, operators, device, backend)]
    return SelfTestReport(device, target, backend, ops.missing(device), versions(device), rows)


def _cases(
    formats: list[NumberFormat], operators: Collection[str], device: str, backend: str | None
) -> list[tuple[NumberFormat, Case]]:
    """The cases of operators (none: of all), one operator after the other.

    Where kernels take scales as numbers, those whose scales can be given so are there in both ways.

    Raises:
        FP8ConfigError: an unknown operator.
    """
    cases = [(fmt, case) for fmt in formats for case in all_cases(fmt)]
    known = list(dict.fromkeys(case.operator for _, case in cases))
    for name in operators:
        if name not in known:
            raise FP8ConfigError(f"operator {name!r} is unknown: {nearest(name, known)}")
    with _on(backend):
        packing = ops.packing_for(torch.device(device))
    both = packing is not None and packing.constants
    cases = [
        (fmt, each)
        for fmt, case in cases
        if not operators or case.operator in operators
        for each in (_with_constants(case, fmt) if both else [case])
    ]
    return sorted(cases, key=lambda each: known.index(each[1].operator))


def _with_constants(case: Case, fmt: NumberFormat) -> list[Case]:
    """The case, and where some of its scales are in the hardware's set, the same with those as numbers."""
    free = set(fmt.hardware_scales.descending())
    if not any(free.issuperset(scale.flatten().tolist()) for scale in case.scales()):
        return [case]
    return [case, replace(case, name=f"{case.name}, constant scales", constants=True)]


def _on(backend: str | None) -> AbstractContextManager[None]:
    return ops.backend(backend) if backend else nullcontext()


def _row(case: Case, fmt: NumberFormat, device: str, backend: str | None) -> Row:
    """Run a case twice: the second call is what a module's later ones are, prepared for by the first, and timed."""
    record = ops.CallRecord()
    result, why, worst, microseconds = FAILED, "", None, None
    expected = unit = None
    try:
        expected = _expected(case)
        unit = _unit(case, expected)
        with _on(backend):
            call = _packed(case, fmt, torch.device(device))
            first = call_operator(case.operator, call, record)
            synchronize(device)
            started = time.perf_counter()
            second = call_operator(case.operator, call, record)
            synchronize(device)
            microseconds = (time.perf_counter() - started) * 1e6
        worst = max(difference(found, expected, exact=not case.ulps) for found in (first, second))
        result, why = PASSED if worst <= case.ulps else FAILED, _why_slower(case.operator, record, device, backend)
    except FP8NotAvailableError as error:
        result, why = REFUSED if backend else FAILED, str(error)
    except Exception as error:  # whatever goes wrong in a case, the others still run
        why = f"{type(error).__name__}: {error}"
    kernels = dict.fromkeys(name for _, name in record.kernels)
    ran = ", ".join(kernels) if microseconds is not None else ""
    return Row(case.operator, fmt.name, case.name, result, ran, why, worst, case.ulps, unit or "values", microseconds)


def _expected(case: Case) -> Any:
    if case.expected is not None:
        return case.expected
    with ops.backend(REFERENCE):
        return call_operator(case.operator, case.call)


def _packed(case: Case, fmt: NumberFormat, device: torch.device) -> Any:
    """The case's call on a device, with weight and scales in the form in which a module holds them there."""
    call = case.call._make(_copy(value, device) for value in case.call)
    packing = ops.packing_for(device)
    if packing is not None and "weight" in call._fields and call.weight.ndim == 2:
        call = call._replace(weight=packing.matrix(call.weight))
    for scale in case.scales(call) if case.constants else ():
        mark_constants(scale, fmt.hardware_scales)
    return call


def _copy(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _unit(case: Case, expected: Any) -> str:
    if case.ulps:
        return "ulps"
    first = expected[0] if isinstance(expected, tuple) else expected
    return "codes" if is_fp8(first.dtype) else "values"


def _why_slower(operator: str, record: ops.CallRecord, device: str, backend: str | None) -> str:
    """Why the device's own kernels did not run, or took a longer way; empty where one ran as it should, or where the
    reference was asked for."""
    ran = {name for _, name in record.kernels}
    if backend or REFERENCE not in ran:
        return "; ".join(reason for _, name, reason in record.fallbacks if name in ran)
    refusals = "; ".join(f"{name}: {reason}" for _, name, reason in record.fallbacks)
    return refusals or ops.missing(device) or f"there is no kernel of {operator} for {device}"
