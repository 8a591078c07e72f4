"""The attention function of all models of transformers that look theirs up: `attn_implementation="optimum_fp8"`.

What it does is looked up at each call, in the plan of the module that calls it: observe, round to FP8, or (no plan)
compute what the model's own eager attention computes. Scales are in a small module inside that module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import output_capturing

from .. import ops
from ..errors import FP8Error, FP8NotAvailableError, FP8StateError
from ..ops.fp8_tensor import FP8Tensor
from ..scales import Scheme, inf_as_nan
from .plan import AttentionPlan, plan_of
from .scale_module import scale_of
from .selection import with_selection

NAME = "optimum_fp8"


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that models call.

    Args:
        module: the attention module; its plan and its scales decide.
        query: `[B, H, S, D]`.
        key: `[B, Hkv, T, D]`, or an `FP8Tensor` of that shape.
        value: `[B, Hkv, T, Dv]`, likewise.
        attention_mask: additive or boolean, broadcastable to `[B, H, S, T]`, or None.
        scaling: of the scores; None: 1 / √D.
        dropout: of the probabilities, while measuring.
        softcap: scores become softcap · tanh(scores / softcap).
        position_bias: added to the scores, broadcastable to `[B, H, S, T]`.
        sinks: scores without a value, `[B, H, S, 1]` or `(H,)`; also as `s_aux`, or an attribute of the module.
        kwargs: "indices" or "block_indices" select the keys to attend to (`selection.py`).

    Returns:
        `[B, S, H, Dv]` in the query's dtype, and the probabilities `[B, H, S, T]` (in FP8 only if they are asked for).

    Raises:
        FP8NotAvailableError: dropout in FP8, or arguments that select keys in a way that is not known.
        FP8StateError: shapes that do not go together in FP8.
    """
    attention_mask = with_selection(module, attention_mask, query, key.shape[2], kwargs)
    sinks = next((found for found in (sinks, s_aux, getattr(module, "sinks", None)) if found is not None), None)
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if position_bias is not None:
        attention_mask = position_bias if attention_mask is None else position_bias + _additive(attention_mask, query)
    plan = plan_of(module)
    cached = isinstance(key, FP8Tensor) or isinstance(value, FP8Tensor)
    if plan is not None and plan.scheme is not None and (plan.scheme.rounds_attention or cached):
        if dropout and module.training:
            raise FP8NotAvailableError(
                f"{_named(module)}: no dropout of {dropout} in FP8 attention: call model.eval(), or dequantize"
            )
        wanted = _weights_wanted(module, kwargs)
        return _in_fp8(module, plan, query, key, value, attention_mask, scaling, softcap or 0.0, sinks, wanted)
    key, value = values_of(key), values_of(value)
    dropout = dropout if module.training else 0.0
    output, weights = in_high_precision(query, key, value, attention_mask, scaling, dropout, softcap, sinks)
    if plan is not None and plan.observe is not None:
        for kind, tensor in (("q", query), ("k", key), ("v", value), ("output", output.transpose(1, 2))):
            plan.observe(kind, tensor)
    return output, weights


def in_high_precision(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the eager attention of transformers' models computes, step by step and rounding by rounding."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + _additive(mask, query)[..., : key.shape[2]]
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    weights = F.dropout(weights if sinks is None else weights[..., :-1], p=dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _in_fp8(
    module: nn.Module,
    plan: AttentionPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
    weights_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scheme, given = plan.scheme, (query, key, value)
    assert scheme is not None
    (query, q_scale), (key, k_scale), (value, v_scale) = (
        _operand(module, f"{name}_scale", x, scheme) for name, x in (("q", query), ("k", key), ("v", value))
    )
    p_scale: torch.Tensor | None = scale_of(module, "p_scale")
    options: dict[str, Any] = {
        "sinks": sinks,
        "scaling": scaling,
        "softcap": softcap,
        "dtype": scheme.fmt.dtype,
        "full_scale": scheme.fmt.full_scale,
        "dataflow": scheme.attention_dataflow,
        "record": plan.record,
    }
    output_scale = scale_of(module, "output_scale")
    try:
        output = ops.attention(query, key, value, q_scale, k_scale, v_scale, p_scale, output_scale, mask, **options)
    except RuntimeError as error:
        if isinstance(error, FP8Error):
            raise
        try:
            query, key, value = map(values_of, given)
            found = in_high_precision(query, key, value, mask, scaling, softcap=softcap, sinks=sinks)
        except (RuntimeError, IndexError, ValueError):
            _refuse_shapes(module, query, key, value, mask, error)
            raise error from None
        ops.note_fallback(plan.record, "attention", str(error).partition("\n")[0])
        return found
    if not weights_wanted:
        return output, None
    ops.note_fallback(plan.record, "attention", "output_attentions: the probabilities were computed a second time")
    return output, ops.attention_weights(query, key, q_scale, k_scale, p_scale, mask, **options)


def _operand(module: nn.Module, name: str, x: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the operator takes for `x`: the codes of a cache, or `x` and the scale to round it with (None: not)."""
    if isinstance(x, FP8Tensor):
        return x.codes, x.scale
    if not scheme.rounds_attention:
        return x, None
    if not scheme.is_static:
        return inf_as_nan(x), scheme.dynamic_scale(x, scheme.operands)
    scale = scale_of(module, name)
    if scale is None:
        raise FP8StateError(f"{_named(module)}: there is no {name}: convert the model again, with calibration data")
    return x, scale


def values_of(x: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor of the same values."""
    return x.dequantize() if isinstance(x, FP8Tensor) else x


def _additive(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def _weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asked for the probabilities, as an argument or of transformers' recorder of outputs."""
    if kwargs.get("output_attentions"):
        return True
    active = output_capturing._active_collector
    # In a layer compiled alone, the recorder of versions that say whether it is `compiling` cannot be asked without
    # ending the graph; a hook tells that there is one.
    asking_breaks = torch.compiler.is_compiling() and not getattr(active, "compiling", True)
    if asking_breaks and not module._forward_hooks:
        return False
    collector = active.get()
    return collector is not None and any("attentions" in key for key in collector)


def _named(module: nn.Module) -> str:
    """How messages call a module: by its name in the model, if it is known, and its class."""
    plan = plan_of(module)
    return f"{plan.name} ({type(module).__name__})" if plan is not None and plan.name else type(module).__name__


def _refuse_shapes(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    error: Exception,
) -> None:
    """After an error: say so if it is the shapes that do not go together."""
    fits = query.ndim == key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3]
    fits = fits and query.shape[1] % key.shape[1] == 0 and query.shape[3] == key.shape[3]
    fits = fits and (mask is None or mask.shape[-1] >= key.shape[2])
    if not fits:
        raise FP8StateError(
            f"{_named(module)}: queries {tuple(query.shape)}, keys {tuple(key.shape)}, values {tuple(value.shape)} and "
            f"mask {None if mask is None else tuple(mask.shape)} do not go together: expected [batch, heads, length, "
            "size], as many or a divisor of the heads for keys and values, and a mask over all keys; look at the "
            "inputs, the cache and the mask given to the model"
        ) from error
