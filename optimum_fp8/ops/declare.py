"""How an operator is declared: to torch (schema, fake kernel, gradient) and to the dispatch (its reference).

An operator's schema, fake kernel, gradient and public function stand side by side in `casts.py`, `linear.py`,
`conv.py`, `embedding.py`, `attention.py`, `experts.py` and `grouped_linear.py`.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from ..errors import FP8NotAvailableError
from . import dispatch
from .arguments import DynamicScaleCall
from .dynamic import DynamicScale, inf_as_nan
from .gradients import Gradient, autograd_kernel, composed_autograd_kernel, recomputed, wants_gradient
from .operands import refuse_absent
from .prepared import is_plain, run, run_prepared
from .records import CallRecord, record_of
from .reference_gradients import recompute

_library = torch.library.Library("optimum_fp8", "DEF")
_calling: ContextVar[CallRecord | None] = ContextVar("optimum_fp8_record", default=None)
_is_compiling = torch.compiler.is_compiling
_NO_ONNX = "optimum_fp8::{} cannot be exported to ONNX: export what optimum_fp8.dequantize(model) returns"


def call(op: str, arguments: Any, record: CallRecord | None = None) -> Any:
    """Call an operator: through torch's dispatcher where something on the way wants to see the call, else at once.

    Where the `input_scale` is a rule (`DynamicScale`), the scale is found here, unless the kernel is prepared to.
    """
    if _is_compiling():
        arguments = _with_its_scale(arguments)
        if torch.onnx.is_in_onnx_export():
            raise FP8NotAvailableError(_NO_ONNX.format(op))
        # What a traced kernel calls has no gradient; the operator has.
        if not wants_gradient(arguments) and (kernel := dispatch.traced_kernel(op, arguments)) is not None:
            return kernel.run(arguments)
        # A graph has no records: its calls are attributed by the tensors they come with.
        return getattr(torch.ops.optimum_fp8, op)(*arguments)
    if record is not None and is_plain(arguments[:1]) and (found := run_prepared(op, arguments, record)) is not None:
        return found
    arguments = _with_its_scale(arguments)
    if is_plain(arguments):
        return run(op, arguments, record)
    if torch.onnx.is_in_onnx_export():
        raise FP8NotAvailableError(_NO_ONNX.format(op))
    token = _calling.set(record)
    try:
        return getattr(torch.ops.optimum_fp8, op)(*arguments)
    finally:
        _calling.reset(token)


def scaled_input(
    x: torch.Tensor, input_scale: torch.Tensor | DynamicScale | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a product takes for its input and the scale of that, which may be a rule."""
    if not isinstance(input_scale, DynamicScale):
        return x, input_scale
    scale = call("dynamic_scale", DynamicScaleCall(x, *input_scale))
    return inf_as_nan(x), scale


def _with_its_scale(arguments: Any) -> Any:
    """The arguments with the scale of their input in the place of a rule."""
    if not isinstance(getattr(arguments, "input_scale", None), DynamicScale):
        return arguments
    x, scale = scaled_input(arguments.x, arguments.input_scale)
    return arguments._replace(x=x, input_scale=scale)


def declare(
    op: str,
    schema: str,
    arguments: Any,
    fake: Callable[[Any], Any],
    reference: Callable[[Any], Any],
    attributed_by: tuple[str, ...] = (),
    gradient: Gradient | tuple[str, ...] | None = None,
) -> None:
    """Make an operator known to torch and to the dispatch.

    Args:
        op: its name.
        schema: its arguments and results, as torch writes them.
        arguments: the type of its arguments as one value, with the schema's names.
        fake: a result of the right shape, dtype and layout, from a call without values.
        reference: the definition.
        attributed_by: arguments that tell which module calls, where the call comes without a record.
        gradient: how it is differentiated, or the names of the arguments that have a gradient, which is computed by an
            operator `<op>_gradient` through the reference; None: a gradient that is asked for is refused.
    """

    if isinstance(gradient, tuple):
        _declare_gradient(op, schema, arguments, reference, attributed_by)
        gradient = recomputed(op, gradient)
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
    _library.impl(op, autograd_kernel(op, arguments, implementation, gradient), "Autograd", with_keyset=True)
    torch.library.register_fake(f"optimum_fp8::{op}", without_values, lib=_library)
    dispatch.register_kernel(op, dispatch.Kernel(dispatch.REFERENCE, None, reference))


def declare_composed(op: str, schema: str, fake: Callable[..., Any], composed: Callable[..., Any]) -> None:
    """Make an operator known to torch that is composed of others: these are dispatched, and have the gradients."""

    def without_values(*args: Any) -> Any:
        refuse_absent(op, [argument.name for argument in overload._schema.arguments], args)
        return fake(*args)

    _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op, composed, "CompositeExplicitAutograd")
    _library.impl(op, composed_autograd_kernel(op, composed), "Autograd", with_keyset=True)
    torch.library.register_fake(f"optimum_fp8::{op}", without_values, lib=_library)
    overload = getattr(torch.ops.optimum_fp8, op).default


def _declare_gradient(
    op: str, schema: str, arguments: Any, reference: Callable[[Any], Any], attributed_by: tuple[str, ...]
) -> None:
    """Declare `<op>_gradient`: from the gradient of an operator's result, those of the arguments called `wanted`."""
    named: Any = namedtuple  # of fields that type checkers cannot know
    call = named("GradientCall", ("grad", "wanted", "constants", *arguments._fields))
    call.operator = arguments
    declare(
        f"{op}_gradient",
        schema.replace("(", "(Tensor grad, str[] wanted, str[] constants, ", 1).replace("-> Tensor", "-> Tensor[]"),
        call,
        lambda call: [torch.empty_like(getattr(call, name)) for name in call.wanted],
        lambda call: recompute(reference, call),
        attributed_by,
    )
