"""The way from a call to its kernel, and the short way for calls like an earlier one of the same module.

Choosing a kernel, asking whether it refuses and packing its arguments takes longer than a small product. A kernel may
therefore prepare: the first call of a module packs the operands that stay, in whatever layout the backend wants, and
the record of the module keeps that for the next calls (`Kernel.prepare`). This is a backend's packing step: what it
makes of a weight lives and dies with the module, and the checkpoint never sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from . import dispatch
from .records import CallRecord, Prepared

_NO_TENSORS = frozenset({type(None), float, str, int, bool, torch.dtype})
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_is_compiling, _records_gradients = torch.compiler.is_compiling, torch.is_grad_enabled


def _watchers(namespace: Any = torch) -> tuple[Callable[[], Any], ...] | None:
    """Torch's own questions for modes, function transforms, torch.jit.trace, the profiler and function modes; None
    where it has moved one of them."""
    try:
        C, _ = namespace._C, namespace.autograd.forward_ad._current_level
        modes, transforms, is_tracing = C._len_torch_dispatch_stack, C._functorch.peek_interpreter_stack, C._is_tracing
        functions, _ = C._len_torch_function_stack, C._get_function_stack_at
        return modes, transforms, is_tracing, namespace.autograd._profiler_enabled, functions
    except AttributeError:
        return None


_torch_watches = _watchers()


def is_plain(arguments: Iterable[Any]) -> bool:
    """Whether a call on these arguments means the same with and without torch's dispatcher: no tensor subclass, no
    values left out (meta), no gradient, no tracing, no mode and no profiler that would want to see the operator."""
    if _torch_watches is None or _is_compiling():
        return False
    modes, transforms, is_tracing, is_profiling, functions = _torch_watches
    if modes() or transforms() is not None or is_tracing() or is_profiling() or forward_ad._current_level >= 0:
        return False
    if (depth := functions()) and any(_sees_operators(place) for place in range(depth)):
        return False
    gradients = _records_gradients()
    for argument in arguments:
        kind = type(argument)
        if kind in _PLAIN_TENSORS:
            if gradients and argument.requires_grad or argument.is_meta:
                return False
        elif kind not in _NO_TENSORS and isinstance(argument, torch.Tensor):
            return False
    return True


def _sees_operators(place: int) -> bool:
    """Whether the function mode at a place of torch's stack is another's; ours say that operators are not for them."""
    return getattr(torch._C._get_function_stack_at(place), "sees_operators", True)


def run_prepared(op: str, call: Any, record: CallRecord) -> Any:
    """As `run`, in a fraction of its time, where an earlier call of the module was just like this one; else None. The
    input must be plain; the operands that stay are, if they are those of that call."""
    prepared = record.prepared.get(op)
    if prepared is None or prepared.registry != dispatch.registry():
        return None
    if _records_gradients() or dispatch.forced_backend() is not None:
        return None
    found = prepared.run(call)
    if found is not None:
        record.kernels[prepared.kernel] += 1
    return found


def run(op: str, call: Any, record: CallRecord | None) -> Any:
    """Run `op` on the kernel that `dispatch.choose` finds, and let it prepare for the module's next calls."""
    device = call[0].device.type
    kernel, refused = dispatch.choose(op, call, device, record)
    unforced = dispatch.forced_backend() is None
    if record is not None and not refused and unforced and not _records_gradients() and is_plain(call):
        prepared = kernel.prepare(call)
        if prepared is not None:
            record.prepared[op] = Prepared(prepared, (op, kernel.backend), dispatch.registry())
    if torch.is_autocast_enabled(device):  # where an operator rounds is part of its definition
        with torch.autocast(device, enabled=False):
            return kernel.run(call)
    return kernel.run(call)
