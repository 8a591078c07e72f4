"""A mode of torch functions for attention modules that multiply themselves: their products are observed, or in FP8.

Nothing is patched: hooks switch on torch's function overriding when such a module is entered and off when it is left,
and only what is called in between, in that thread, is looked at.

The first product before the softmax takes "q" and "k", the first after it "p" and "v"; further ones (relative
positions, loops over chunks) are numbered, "q2" and "k2" for the second before the softmax. Each operand has a scale of
its own.

A `Matmul` with INC's attribute `no_input_quant` takes its second operand as it is: codes that its model makes itself,
or a tensor in high precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from .. import ops
from ..errors import FP8Error
from ..formats import is_fp8
from ..ops.fp8_tensor import FP8Tensor
from ..scales import Scheme, inf_as_nan
from .detect import Kind, attention_kind
from .einsum import einsum_product, has_sums
from .heads import Heads
from .plan import AttentionPlan, plan_of
from .scale_module import scale_of

_PER_HEAD = ("q", "k", "v")  # operands that each head may have a scale of its own for
_PRODUCT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def enter_mode(module: nn.Module) -> None:
    """Have `module` run in this mode from now on; its plan says what becomes of its products."""
    leave_mode(module)
    module.register_forward_pre_hook(_enter, with_kwargs=True)
    module.register_forward_hook(_leave, always_call=True)


def leave_mode(module: nn.Module) -> None:
    """Have `module` run without the mode again."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    plan = plan_of(module)
    if plan is not None:
        AttentionMode(module, plan, Heads(module, (*args, *kwargs.values()))).__enter__()


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    mode = _get_current_function_mode()
    if isinstance(mode, AttentionMode) and mode.module is module:
        mode.__exit__(None, None, None)


class AttentionMode(TorchFunctionMode):
    """The mode of torch functions while one attention module runs: its products are observed, or computed in FP8."""

    sees_operators = False  # those of optimum_fp8 may take their short way

    def __init__(self, module: nn.Module, plan: AttentionPlan, heads: Heads | None = None):
        super().__init__()
        self.module, self.plan, self.heads = module, plan, heads
        self._after_softmax = False
        self._products = 0
        self._drawn: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, partial(func, *args, **(kwargs or {})), *args, **(kwargs or {}))

    def softmax(self, compute: Callable[[], torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The softmax: products that follow multiply probabilities with values."""
        self._after_softmax, self._products = True, 0
        return compute()

    def product(self, compute: Callable[[], torch.Tensor], a: Any, b: Any, **kwargs: Any) -> torch.Tensor:
        """a @ b: observed, or computed in FP8."""
        if self._is_layer(a, b):
            return compute()
        out = kwargs.pop("out", None)
        found = self._product(a, b, f"called with {', '.join(kwargs)}" if kwargs else "")
        if found is None:
            return compute()
        return found if out is None else out.resize_(found.shape).copy_(found)

    def reversed_product(self, compute: Callable[[], torch.Tensor], a: Any, b: Any) -> torch.Tensor:
        return self.product(compute, b, a)

    def einsum(self, compute: Callable[[], torch.Tensor], equation: str, *operands: Any) -> torch.Tensor:
        """torch.einsum of two activations that is one product for each batch: observed, or computed in FP8."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if self._is_layer(*operands) or not has_sums(equation):
            return compute()
        product = einsum_product(equation, *operands) if len(operands) == 2 else None
        if product is None:
            if self.plan.scheme is not None and self.plan.scheme.rounds_attention:
                ops.note_fallback(self.plan.record, "matmul", f"einsum {equation!r}: not one product for each batch")
            return compute()
        found = self._product(product.left, product.right)
        return compute() if found is None else product.restore(found)

    def drawn(self, compute: Callable[[], torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Random numbers that a module draws to project on, as a weight that it makes anew each time."""
        self._drawn.append(compute())
        return self._drawn[-1]

    def _is_layer(self, *operands: Any) -> bool:
        """Whether a product is a layer's, as FalconLinear's: with a parameter, or with what stands for one."""
        return any(_is_weight(x) or any(x is drawn for drawn in self._drawn) for x in operands)

    def _product(self, a: Any, b: Any, other: str = "") -> torch.Tensor | None:
        """Observe a product, or compute it in FP8; None where torch is to compute it, as with `other` demands on it."""
        names = self._next_names()
        if self.plan.observe is not None:
            self._observe(names, a, b)
        elif self.plan.scheme is not None and other:
            ops.note_fallback(self.plan.record, "matmul", f"{', '.join(names)}: {other}")
        elif self.plan.scheme is not None:
            return self._attempt("matmul", partial(self._rounded_product, names, a, b, self.plan.scheme))
        return None

    def cast(self, compute: Callable[[], torch.Tensor], x: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Tensor.to: codes of a cache stay codes in any dtype that a product is to be taken in."""
        given = (*args, *kwargs.values())
        if isinstance(x, FP8Tensor) and len(given) == 1 and any(given[0] is dtype for dtype in _PRODUCT_DTYPES):
            return FP8Tensor(x.codes, x.scale, given[0])
        return compute()

    def added_product(
        self,
        compute: Callable[[], torch.Tensor],
        added: Any,
        batch1: Any,
        batch2: Any,
        *,
        beta: Any = 1,
        alpha: Any = 1,
    ) -> torch.Tensor:
        """beta · added + alpha · (batch1 @ batch2), the product rounded to its dtype before it is added."""
        found = self._product(batch1, batch2)
        return compute() if found is None else alpha * found + (beta * added if beta else 0)

    def fused(
        self,
        compute: Callable[[], torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """scaled_dot_product_attention: observed, or computed in FP8."""
        plan, operands = self.plan, (("q", query), ("k", key), ("v", value))
        if plan.observe is not None:
            output = compute()
            for kind, x in operands:
                self._observe_operand(kind, x)
            return output
        cached = isinstance(key, FP8Tensor)
        if plan.scheme is None or not (plan.scheme.rounds_attention or cached):
            return compute()
        if dropout_p:
            ops.note_fallback(plan.record, "attention", f"a dropout of {dropout_p}")
            return compute()
        values = [name for name, x in operands if not isinstance(x, FP8Tensor)]
        if self._unseen("attention", values, plan.scheme) and not cached:
            return compute()
        options = (attn_mask, is_causal, scale, sinks, plan.scheme)
        rounded = partial(self._rounded_attention, query, key, value, *options)
        found = self._attempt("attention", rounded)
        return compute() if found is None else found

    def _attempt(self, op: str, rounded: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """What our operator computes; None where it does not take what torch's may, which the report tells."""
        try:
            return rounded()
        except RuntimeError as error:
            if isinstance(error, FP8Error):
                raise
            ops.note_fallback(self.plan.record, op, str(error).partition("\n")[0])
            return None

    def _rounded_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        sinks: torch.Tensor | None,
        scheme: Scheme,
    ) -> torch.Tensor:
        shape = query.shape
        length, positions = shape[-2], key.shape[-2]
        if is_causal:
            mask = torch.ones(length, positions, dtype=torch.bool, device=query.device).tril()
        if query.ndim != 4:
            heads = max(key.shape[-3] if key.ndim > 3 else 1, 1)
            query, key, value = (x.reshape(-1, heads, *x.shape[-2:]) for x in (query, key, value))
            mask = None if mask is None else mask.expand(*shape[:-1], positions).reshape(-1, heads, length, positions)
        query, q_scale = self._operand("q", _values(query), scheme)
        key, k_scale = self._operand("k", key, scheme)
        value, v_scale = self._operand("v", value, scheme)
        output = ops.attention(
            query,
            key,
            value,
            q_scale,
            k_scale,
            v_scale,
            scale_of(self.module, "p_scale"),
            scale_of(self.module, "output_scale"),
            mask,
            sinks=sinks,
            scaling=shape[-1] ** -0.5 if scale is None else scale,
            dtype=scheme.fmt.dtype,
            full_scale=scheme.fmt.full_scale,
            dataflow=scheme.attention_dataflow,
            record=self.plan.record,
        )
        return output.transpose(1, 2).reshape(*shape[:-1], value.shape[-1])

    def _next_names(self) -> tuple[str, str]:
        self._products += 1
        number = "" if self._products == 1 else str(self._products)
        return (f"p{number}", f"v{number}") if self._after_softmax else (f"q{number}", f"k{number}")

    def _observe(self, names: tuple[str, str], a: Any, b: Any) -> None:
        assert self.plan.observe is not None
        if attention_kind(self.module) is Kind.MAPPING and _fits(a) and _fits(b):
            b = torch.where((a != 0).any(dim=-2).unsqueeze(-1), b, 0)  # what no row takes may be anything
        for name, x in zip(names, (a, b), strict=True):
            if _fits(x) and not (x is b and is_taken_as_it_is(self.module)):
                self._observe_operand(name, x.mT if name.startswith("k") else x)  # the tokens of all are rows

    def _observe_operand(self, name: str, x: torch.Tensor) -> None:
        """Measure an operand, `[batch, heads, length, size]` where it is one of those that each head has a scale of."""
        assert self.plan.observe is not None
        by_heads = self.heads.view(x) if self.heads is not None and name in _PER_HEAD else None
        if by_heads is None or self.plan.observe_per_head is None:
            self.plan.observe(name, x)
        else:
            self.plan.observe_per_head(name, by_heads)

    def _rounded_product(self, names: tuple[str, str], a: Any, b: Any, scheme: Scheme) -> torch.Tensor | None:
        """The product of rounded operands, or with the codes of a cache; None where torch is to compute it."""
        if not (_fits(a) and _fits(b)):
            return None
        if isinstance(a, FP8Tensor) and not isinstance(b, FP8Tensor):  # the operator takes codes on the right
            turned = self._rounded_product(names[::-1], b.mT, a.mT, scheme)
            return None if turned is None else turned.mT
        cached, as_it_is = isinstance(b, FP8Tensor), is_taken_as_it_is(self.module)
        if not (scheme.rounds_attention or cached):
            return None
        if self._unseen("matmul", names[:1] if cached or as_it_is else names, scheme) and not cached:
            return None
        a, a_scale = self._operand(names[0], _values(a), scheme)
        if as_it_is and not cached:
            b_scale = self._scale_of_codes(b)
        else:
            b, b_scale = self._operand(names[1], b, scheme, columns=not names[1].startswith("v"))
        return ops.matmul(
            a,
            b,
            a_scale,
            b_scale,
            dtype=scheme.fmt.dtype,
            full_scale=scheme.fmt.full_scale,
            arithmetic="qdq" if scheme.dataflow == "qdq" else "fused",
            record=self.plan.record,
        )

    def _scale_of_codes(self, b: torch.Tensor) -> torch.Tensor | None:
        """The scale of a second operand that is not to be rounded; None where it is in high precision."""
        if not is_fp8(b.dtype):
            return None
        scale = scale_of(self.module, "k_scale")
        return torch.ones(1, device=b.device) if scale is None else scale

    def _unseen(self, op: str, names: Sequence[str], scheme: Scheme) -> bool:
        """Whether calibration has not seen some of the operands that are to be rounded; the report tells which."""
        if not scheme.rounds_attention or not scheme.is_static:
            return False
        missing = [name for name in names if scale_of(self.module, f"{name}_scale") is None]
        if missing:
            ops.note_fallback(self.plan.record, op, f"{', '.join(missing)}: not seen by calibration")
        return bool(missing)

    def _operand(
        self, name: str, x: torch.Tensor, scheme: Scheme, columns: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What an operator takes for `x`: the codes of a cache, or `x` and the scale to round it with (None: not).

        Args:
            columns: whether the tokens, which have dynamic scales of their own, are the columns of `x`, not its rows.
        """
        if isinstance(x, FP8Tensor):
            return x.codes, x.scale
        if not scheme.rounds_attention:
            return x, None
        if scheme.is_static:
            scale = scale_of(self.module, f"{name}_scale")
            return x, scale if scale is None or self.heads is None else self.heads.scale_for(scale, x)
        rule = scheme.operands
        return inf_as_nan(x), scheme.dynamic_scale(x.mT, rule).mT if columns else scheme.dynamic_scale(x, rule)


def is_taken_as_it_is(module: nn.Module) -> bool:
    """Whether the second operand of a product is not to be rounded, as INC has it."""
    return hasattr(module, "no_input_quant")


def _values(x: torch.Tensor) -> torch.Tensor:
    return x.dequantize() if isinstance(x, FP8Tensor) else x


def _is_weight(x: Any) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(x, torch.Tensor) and isinstance(x if x._base is None else x._base, nn.Parameter)


def _fits(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim >= 2 and x.numel() > 0


_HANDLERS: dict[Any, Callable[..., torch.Tensor]] = {
    torch.matmul: AttentionMode.product,
    torch.Tensor.matmul: AttentionMode.product,
    torch.Tensor.__matmul__: AttentionMode.product,
    torch.Tensor.__rmatmul__: AttentionMode.reversed_product,
    torch.bmm: AttentionMode.product,
    torch.Tensor.bmm: AttentionMode.product,
    torch.baddbmm: AttentionMode.added_product,
    torch.Tensor.baddbmm: AttentionMode.added_product,
    torch.einsum: AttentionMode.einsum,
    torch.randn: AttentionMode.drawn,
    torch.Tensor.to: AttentionMode.cast,
    F.softmax: AttentionMode.softmax,
    torch.softmax: AttentionMode.softmax,
    torch.Tensor.softmax: AttentionMode.softmax,
    torch.logsumexp: AttentionMode.softmax,  # of a softmax whose parts are needed by themselves
    torch.Tensor.logsumexp: AttentionMode.softmax,
    F.scaled_dot_product_attention: AttentionMode.fused,
}
