"""How an operator is declared: to torch (schema, fake kernel, no gradient) and to the dispatch (its reference).

An operator's schema, fake kernel and public function stand side by side in `casts.py`, `linear.py`, `conv.py`,
`embedding.py`, `attention.py`, `experts.py` and `grouped_linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from ..errors import FP8NotAvailableError
from . import dispatch
from .operands import refuse_absent
from .prepared import is_plain, run, run_prepared
from .records import CallRecord, record_of

_library = torch.library.Library("optimum_fp8", "DEF")
_calling: ContextVar[CallRecord | None] = ContextVar("optimum_fp8_record", default=None)
_is_compiling = torch.compiler.is_compiling
_NO_ONNX = "optimum_fp8::{} cannot be exported to ONNX: export what optimum_fp8.dequantize(model) returns"
_NO_GRADIENT = (
    "there is no gradient through optimum_fp8::{}: FP8 modules are for inference; "
    "call optimum_fp8.dequantize(model) to fine-tune, or run under torch.no_grad()"
)


def call(op: str, arguments: Any, record: CallRecord | None = None) -> Any:
    """Call an operator: through torch's dispatcher where something on the way wants to see the call, else at once."""
    if _is_compiling():
        if torch.onnx.is_in_onnx_export():
            raise FP8NotAvailableError(_NO_ONNX.format(op))
        if (kernel := dispatch.traced_kernel(op, arguments)) is not None:
            return kernel.run(arguments)
        # A graph has no records: its calls are attributed by the tensors they come with.
        return getattr(torch.ops.optimum_fp8, op)(*arguments)
    if record is not None and is_plain(arguments[:1]) and (found := run_prepared(op, arguments, record)) is not None:
        return found
    if is_plain(arguments):
        return run(op, arguments, record)
    if torch.onnx.is_in_onnx_export():
        raise FP8NotAvailableError(_NO_ONNX.format(op))
    token = _calling.set(record)
    try:
        return getattr(torch.ops.optimum_fp8, op)(*arguments)
    finally:
        _calling.reset(token)


def declare(
    op: str,
    schema: str,
    arguments: Any,
    fake: Callable[[Any], Any],
    reference: Callable[[Any], Any],
    attributed_by: tuple[str, ...] = (),
) -> None:
    """Make an operator known to torch and to the dispatch.

    Args:
        op: its name.
        schema: its arguments and results, as torch writes them.
        arguments: the type of its arguments as one value, with the schema's names.
        fake: a result of the right shape, dtype and layout, from a call without values.
        reference: the definition.
        attributed_by: arguments that tell which module calls, where the call comes without a record.
    """

    places = [arguments._fields.index(name) for name in attributed_by]

    def implementation(*args: Any) -> Any:
        call, record = arguments._make(args), _calling.get()
        if record is None and places:
            record = record_of([args[place] for place in places])
        found = None if record is None else run_prepared(op, call, record)
        return run(op, call, record) if found is None else found

    def without_values(*args: Any, **kwargs: Any) -> Any:
        call = arguments(*args, **kwargs)
        refuse_absent(op, call._fields, call)
        return fake(call)

    _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, implementation, "CompositeExplicitAutograd")
    _library.impl(op, _autograd(op, implementation), "Autograd", with_keyset=True)
    torch.library.register_fake(f"optimum_fp8::{op}", without_values, lib=_library)
    dispatch.register_kernel(op, dispatch.Kernel(dispatch.REFERENCE, None, reference))


def _autograd(op: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's kernel at the key "Autograd": a plain call goes straight to its kernel, which is quicker than what
    torch makes of `register_autograd`; a gradient that is wanted is refused when it is asked for."""
    overload = getattr(torch.ops.optimum_fp8, op).default

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            return below(keyset, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise FP8NotAvailableError(_NO_GRADIENT.format(op))

    def kernel(keyset: Any, *args: Any) -> Any:
        if is_plain(args):
            return implementation(*args)
        if any(_has_tangent(arg) for arg in args):
            raise FP8NotAvailableError(_NO_GRADIENT.format(op))
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return NoGradient.apply(keyset, *args)
        return below(keyset, *args)

    return kernel


def _has_tangent(argument: Any) -> bool:
    """Whether it carries a gradient forwards, as inside of torch.func.jvp."""
    if forward_ad._current_level < 0 or not isinstance(argument, torch.Tensor):
        return False
    return forward_ad.unpack_dual(argument).tangent is not None
