"""torch's own nn.MultiheadAttention: its in-projection in FP8, and its out_proj as the linear layer that it is.

torch multiplies by the weights of both in one function. Here the products are calls: of the FP8 module's own operator,
and of `out_proj`, whatever stands there. What is between them is computed in high precision, as torch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..errors import FP8NotAvailableError
from ..measure import Observers
from ..scales import Scheme
from .autocast import autocast
from .handler import Reason, Row, Surroundings, Target, Why, register_handler
from .measured_forward import MeasuredForward, sees
from .named_weights import FP8NamedWeights
from .named_weights_handler import NamedWeightsHandler

_PACKED, _SEPARATE = ("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_INPUTS = ("input", "input_key", "input_value")  # what is measured: the query, the key and the value that come in
_SCALES = tuple(f"{name}_scale" for name in _INPUTS)

Tensor = torch.Tensor
Project = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def attended(
    module: Any,
    project: Project,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention.forward` returns for the same arguments; `out_proj` is called.

    Args:
        module: the original, or what stands for it.
        project: gives the projections of query, key and value, as they come in.
        query: as all that follow, as `nn.MultiheadAttention` takes it.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise FP8NotAvailableError("nn.MultiheadAttention in FP8 takes no nested tensors: pass padded ones and a mask")
    is_batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, module.num_heads)  # type: ignore[attr-defined]
    if is_causal and attn_mask is None:
        raise RuntimeError("nn.MultiheadAttention needs attn_mask where is_causal=True, which is a hint about it")
    q, k, v = (_batch_first(x, module, is_batched) for x in project(query, key, value))
    if module.bias_k is not None:
        k, v = (torch.cat([x, bias.expand(len(x), 1, -1)], 1) for x, bias in ((k, module.bias_k), (v, module.bias_v)))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, q, k.shape[2])
    dropout = module.dropout if module.training else 0.0
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        mixed = weights @ v
    else:
        mixed, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    output = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if weights is not None:
        weights = weights.mean(dim=1) if average_attn_weights else weights
        weights = weights if is_batched else weights.squeeze(0)
    if not is_batched:
        return output.squeeze(0), weights
    return output if module.batch_first else output.transpose(0, 1), weights


def _batch_first(x: Tensor, module: Any, is_batched: bool) -> Tensor:
    """`[batch, length, size]`."""
    if not is_batched:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """Both masks as one that is added to scores `[batch, heads, length, keys]`; what was added to the keys is seen."""
    batch, heads, length, _ = q.shape
    found = []
    if attn_mask is not None:
        mask = attn_mask if attn_mask.ndim == 2 else attn_mask.view(batch, heads, length, -1)
        found.append(_added(mask, q.dtype))
    if key_padding_mask is not None:
        found.append(_added(key_padding_mask, q.dtype).view(batch, 1, 1, -1))
    padded = [F.pad(mask, (0, keys - mask.shape[-1])) for mask in found]
    return sum(padded[1:], padded[0]) if padded else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _parts(module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, int, int]]:
    """Which rows of a packed weight multiply what: an input, and of the three projections the first and the last."""
    if query is key and key is value:
        return [(query, 0, 3)]
    return [(query, 0, 1), (key, 1, 3)] if key is value else [(query, 0, 1), (key, 1, 2), (value, 2, 3)]


def _projected(module: Any, product: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The projections of query, key and value by `product(x, name, rows, which)`.

    That multiplies by the rows of the weight with a name; `which` of the inputs it is tells the scale, and `rows` what
    of the bias is added.
    """
    size, found = module.embed_dim, []
    if module._qkv_same_embed_dim:
        for x, first, last in _parts(module, *inputs):
            found += product(x, _PACKED[0], slice(first * size, last * size), first).split(size, dim=-1)
    else:
        for which, (x, name) in enumerate(zip(inputs, _SEPARATE, strict=True)):
            found.append(product(x, name, None, which))
    return tuple(found)  # type: ignore[return-value]


def _bias(module: Any, rows: slice | None, which: int) -> Tensor | None:
    size = module.embed_dim
    own = slice(which * size, (which + 1) * size) if rows is None else rows
    return None if module.in_proj_bias is None else module.in_proj_bias[own]


def measured(module: Any, see: Callable[[str, Tensor], None], *args: Any, **kwargs: Any) -> Any:
    """The forward pass in high precision; `see` is given what comes in, and `out_proj` is called."""

    def product(x: Tensor, name: str, rows: slice | None, which: int) -> Tensor:
        weight = module._parameters[name]
        return F.linear(x, weight if rows is None else weight[rows], _bias(module, rows, which))

    def project(*inputs: Tensor) -> Any:
        for kind, x in zip(_INPUTS, inputs, strict=True):
            see(kind, x)
        return _projected(module, product, *inputs)

    return attended(module, project, *args, **kwargs)


class FP8MultiheadAttention(FP8NamedWeights):
    """nn.MultiheadAttention with its in-projection in FP8, as one weight `[3 · E, E]` or three `[E, …]`.

    Attributes:
        input_scale: float32 `(1,)`, of the query that comes in, or None where activations are not static.
        input_key_scale: the same for the key.
        input_value_scale: the same for the value.
    """

    activation_scales = _SCALES

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return attended(self, partial(_projected, self, self.product), *args, **kwargs)

    def product(self, x: Tensor, name: str, rows: slice | None, which: int) -> Tensor:
        """`[…, out]` of an input `[…, in]`, by some rows of a weight; `which` of the three inputs tells the scale."""
        scheme, x = self.scheme, autocast(x)
        codes, scale = self.codes(name), self.scale(name)
        if rows is not None and rows.stop - rows.start < len(codes):
            scale = ops.scale_of_rows(scale, rows, len(codes))  # type: ignore[assignment]
            codes = codes[rows]  # type: ignore[assignment]
        return ops.linear(
            x,
            codes,
            scale,
            scheme.dynamic() or self._parameters[_SCALES[which]],
            _bias(self, rows, which),
            full_scale=scheme.fmt.full_scale,
            arithmetic=scheme.arithmetic,
            record=self.record,
        )


class MultiheadAttentionHandler(NamedWeightsHandler):
    """The in-projections of nn.MultiheadAttention."""

    kind = "torch attention"
    types = ("MultiheadAttention",)
    classes = (nn.MultiheadAttention,)
    fp8_class = FP8MultiheadAttention

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # models that have none need not be told of them

    def weight_names(self, module: Any) -> tuple[str, ...]:
        return _PACKED if module._qkv_same_embed_dim else _SEPARATE

    def may_have(self, name: str) -> bool:
        return name in (*_PACKED, *_SEPARATE, "in_proj_bias", "bias_k", "bias_v")

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        granularity = scheme.weight.granularity
        if module._qkv_same_embed_dim and module.embed_dim % getattr(granularity, "rows", 1):
            text = f"its projections end within a block: they have {module.embed_dim} rows each, scales are"
            return Why(Reason.UNFIT, f"{text} {granularity}")
        return super().refusal(module, scheme, around)

    def observe(self, target: Target, observers: Observers) -> None:
        see = sees(observers, target.name) if target.scheme.needs_ranges else _nothing
        observers.add(MeasuredForward(target.module, partial(measured, target.module, see)))

    def missing(self, target: Target) -> Why | None:
        unseen = target.scheme.needs_ranges and not set(_INPUTS) <= target.ranges.kinds
        return Why(Reason.NEVER_REACHED) if unseen else None

    def scales_for(self, target: Target) -> dict[str, torch.Tensor]:
        scheme = target.scheme
        if not scheme.is_static:
            return {}
        fixed = scheme.static_scale(0.0)
        kinds = zip(_SCALES, _INPUTS, strict=True)
        return {name: target.static_scale(kind) if scheme.needs_ranges else fixed for name, kind in kinds}

    def row(self, module: Any) -> Row | None:
        row = super().row(module)
        if row is None or not module.scheme.rounds_attention:
            return row
        return Row(**{**vars(row), "scheme": f"{row.scheme}, attention's own products in high precision"})


def _nothing(kind: str, x: Tensor) -> None:
    """What is seen where no ranges are needed; `out_proj` is called all the same."""


register_handler(MultiheadAttentionHandler())
